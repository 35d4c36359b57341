"""Files, hub datasets and TFDS as one list of records, each knowing where it came from.

A source is a path or glob (.jsonl .json .csv .tsv .parquet, also with .gz where it is text),
`hf:NAME[:SUBSET]@SPLIT` for `datasets` (hub name or local folder), or
`tfds:NAME[/CONFIG]@SPLIT[?data_dir=FOLDER]` for TensorFlow Datasets, read without TensorFlow.

    records = read("data/train.*.jsonl", columns={"text": "sentence"})
    records[0].fields["text"]
    records[0].origin            # data/train.en.jsonl:1
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxalign.errors import UserError

LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z]{2,4})?")
PAIR_FIELDS = ("text0", "text1", "lang0", "lang1")


@dataclass(frozen=True)
class Record:
    """One row of data and the place to look at when it is wrong."""

    fields: dict[str, Any]
    origin: str


def read(source: str, columns: Mapping[str, str] | None = None) -> list[Record]:
    """All records of one source.

    Args:
        source: path, glob, `hf:...` or `tfds:...` (module text).
        columns: our field name -> the data's; a dotted name reaches into a dict
            (`translation.de`). Fields that are not named keep their names.

    Returns:
        Records in file order; files of a glob in the order of their names.

    Raises:
        UserError: nothing matches, a row is broken, a column is missing.
    """
    kind, _, rest = source.partition(":")
    rows = SCHEMES[kind](rest) if kind in SCHEMES else _files(source)
    records = [Record(_rename(fields, columns or {}, origin), origin) for fields, origin in rows]
    if not records:
        raise UserError(f"{source} holds no rows; remove it or name another file")
    return records


def read_all(sources: Sequence[str], columns: Mapping[str, str] | None = None) -> list[Record]:
    """The records of several sources, one after the other."""
    return [record for source in sources for record in read(source, columns)]


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean X?' where a name like it exists, else nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _rename(fields: dict[str, Any], columns: Mapping[str, str], origin: str) -> dict[str, Any]:
    out = dict(fields)
    for ours, theirs in columns.items():
        value: Any = fields
        for part in [theirs] if theirs in fields else theirs.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise UserError(
                    f"{origin}: no column {theirs!r} (columns.{ours}); this row has: "
                    f"{', '.join(fields)}{nearest(theirs, fields)}"
                )
            value = value[part]
        out[ours] = value
    return out


# Files -------------------------------------------------------------------------------------------

Row = tuple[dict[str, Any], str]  # fields, origin


def _files(pattern: str) -> Iterator[Row]:
    paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise UserError(
            f"no file matches {pattern!r} (looked from {Path.cwd()}); give a path, a glob, "
            "hf:NAME@SPLIT or tfds:NAME@SPLIT"
        )
    for path in paths:
        suffixes = [s for s in Path(path).suffixes[-2:] if s != ".gz"]
        suffix = suffixes[-1] if suffixes else ""
        if suffix not in READERS or Path(path).is_dir():
            raise UserError(
                f"{path}: unknown file type {suffix or Path(path).name!r}; known are "
                f"{', '.join(READERS)} (text files also with .gz)"
            )
        try:
            yield from READERS[suffix](path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
        except (OSError, EOFError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error


def _open(path: str) -> IO[str]:
    # utf-8-sig: a byte order mark, as spreadsheets write it, must not end up in the first name.
    opener: Callable[..., IO[str]] = gzip.open if path.endswith(".gz") else open  # type: ignore[assignment]
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _json_line(text: str, origin: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}: broken JSON ({error.msg} at column {error.colno}); "
            "each line must be one JSON object"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{origin}: a JSON {type(fields).__name__} where a row must be an object")
    return fields


def _jsonl(path: str) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_line(line, f"{path}:{number}"), f"{path}:{number}"


def _json(path: str) -> Iterator[Row]:
    """JSON lines under the name .json (as in the paper's data), or one list of objects."""
    with _open(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        if start != "[":
            yield from _jsonl(path)
            return
        try:
            items = json.loads(start + file.read())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from error
    for number, item in enumerate(items, start=1):
        origin = f"{path} item {number}"
        if not isinstance(item, dict):
            raise UserError(f"{origin}: a JSON {type(item).__name__} where a row must be an object")
        yield item, origin


def _table(path: str, **dialect: Any) -> Iterator[Row]:
    with _open(path) as file:
        reader = csv.reader(file, **dialect)
        languages = _pair_languages(path)
        header = list(PAIR_FIELDS[:2]) if languages else None
        for cells in reader:
            origin = f"{path}:{reader.line_num}"
            if not cells:
                continue
            if header is None or cells[0] == PAIR_FIELDS[0]:
                header = cells
                continue
            if len(cells) != len(header):
                raise UserError(f"{origin}: {len(cells)} columns where {len(header)} belong")
            yield {**languages, **dict(zip(header, cells, strict=True))}, origin


def _pair_languages(path: str) -> dict[str, str]:
    """{'lang0': 'de', 'lang1': 'en'} for de-en.tsv, the layout of Tatoeba's test sets."""
    name = Path(path).name.removesuffix(".gz")
    stem, _, suffix = name.rpartition(".")
    languages = stem.rsplit("-", 1)
    if suffix != "tsv" or len(languages) != 2 or not all(map(LANGUAGE.fullmatch, languages)):
        return {}
    return dict(zip(PAIR_FIELDS[2:], languages, strict=True))


def _csv(path: str) -> Iterator[Row]:
    return _table(path)


def _tsv(path: str) -> Iterator[Row]:
    # Quotes in tab-separated sentences are quotes, not quoting.
    return _table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(path: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield fields, f"{path} row {number}"
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


# Hugging Face datasets and TFDS ------------------------------------------------------------------


def _hub(rest: str) -> Iterator[Row]:
    from datasets import load_dataset

    name, _, split = rest.partition("@")
    name, _, subset = name.partition(":")
    try:
        data = load_dataset(name, subset or None, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; all mean "not found so"
        raise UserError(
            f"hf:{rest} cannot be loaded ({_first_line(error)}); the form is hf:NAME[:SUBSET]@SPLIT"
        ) from error
    labels = {n: f.int2str for n, f in data.features.items() if hasattr(f, "int2str")}
    for number, fields in enumerate(data, start=1):
        yield _label_names(fields, labels), f"hf:{rest} row {number}"


def _tfds(rest: str) -> Iterator[Row]:
    import tensorflow_datasets as tfds

    name, _, folder = rest.partition("?data_dir=")
    name, _, split = name.partition("@")
    try:
        data = tfds.data_source(name, split=split or "train", data_dir=folder or None)
    except Exception as error:
        raise UserError(
            f"tfds:{rest} cannot be loaded ({_first_line(error)}); the form is "
            "tfds:NAME[/CONFIG]@SPLIT?data_dir=FOLDER, prepared as array_record"
        ) from error
    labels = {n: f.int2str for n, f in data.dataset_info.features.items() if hasattr(f, "int2str")}
    for number in range(len(data)):
        fields = {key: _plain(value) for key, value in data[number].items()}
        yield _label_names(fields, labels), f"tfds:{rest} row {number + 1}"


def _label_names(
    fields: Mapping[str, Any], labels: Mapping[str, Callable[[int], str]]
) -> dict[str, Any]:
    """Class labels as names: an intent is 'alarm_set', not 48; -1 (unknown) stays a number."""
    return {
        key: labels[key](value)
        if key in labels and isinstance(value, int) and value >= 0
        else value
        for key, value in fields.items()
    }


def _plain(value: Any) -> Any:
    """TFDS gives bytes and NumPy; records hold str, int, float, list and dict."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


SCHEMES: dict[str, Callable[[str], Iterator[Row]]] = {"hf": _hub, "tfds": _tfds}
