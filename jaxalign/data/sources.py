"""Files, hub datasets and TFDS as one list of records, each knowing where it came from.

A source is a path or glob (.jsonl .ndjson .json .csv .tsv .parquet, also with .gz where it is
text), `hf:NAME[:SUBSET]@SPLIT` for `datasets` (hub name or local folder), or
`tfds:NAME[/CONFIG]@SPLIT[?data_dir=FOLDER]` for TensorFlow Datasets, read without TensorFlow.

    records = read("data/train.*.jsonl", columns={"text": "sentence"})
    records[0].fields["text"]
    records[0].origin            # data/train.en.jsonl:1
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.checksums import file_digests, text_digest
from jaxalign.data.files import Row, guarded, matches, read_as, read_files
from jaxalign.errors import UserError, first_line


@dataclass(frozen=True)
class Record:
    """One row of data and the place to look at when it is wrong."""

    fields: dict[str, Any]
    origin: str
    companion: Companion | None = None
    columns: str = ""  # the setting that renames its fields, if there is one


@dataclass(frozen=True)
class Companion:
    """The same row in another language, and what becomes of both (`data/fusion.py`)."""

    record: Record
    form: str
    order: str = "own"


def read(source: str, columns: Mapping[str, str] | None = None, key: str = "") -> list[Record]:
    """All records of one source.

    Args:
        source: path, glob, `hf:...` or `tfds:...` (module text).
        columns: our field name -> the data's; a dotted name reaches into a dict
            (`translation.de`, whose `src` or `tgt` has that language). Fields that are not named
            keep their names.
        key: the setting that `columns` is, for sentences.

    Returns:
        Records in file order; files of a glob in the order of their names.

    Raises:
        UserError: nothing matches, a row is broken, a column is missing.
    """
    scheme, name = _scheme(source)
    records = [
        Record(_rename(fields, columns or {}, origin, key), origin, columns=key)
        for fields, origin in guarded(scheme.rows(name), source, "rows")
    ]
    if not records:
        raise UserError(f"{source} holds no rows; remove it or name another file")
    return records


def read_all(
    sources: Sequence[str], columns: Mapping[str, str] | None = None, key: str = ""
) -> list[Record]:
    """The records of several sources, one after the other; arguments as `read`."""
    return [record for source in sources for record in read(source, columns, key)]


def check_once(sources: Sequence[str], key: str) -> None:
    """Refuses what these sources name twice: rows that are judged would count twice.

    Args:
        sources: of `read_all`; for rows to train on, naming one again is a way to weigh it.
        key: the setting that holds them.

    Raises:
        UserError: names what it is, and both sources.
    """
    seen: dict[str, str] = {}
    for source in sources:
        scheme, name = _scheme(source)
        for one in matches(name) if scheme is FILES else [source]:
            place = os.path.realpath(one) if scheme is FILES else one
            if place in seen:
                raise UserError(
                    f"{key}: {one} is named by {seen[place]} and by {source}, and its rows would "
                    "count twice; leave one of them out"
                )
            seen[place] = source


def digest_of(sources: Sequence[str], names: bool = True) -> str:
    """SHA-256 of what is in these sources, one after the other.

    Of a file's name only what decides its rows matters: its reader, and the languages of XX-YY.tsv.
    '' where it would say nothing: no sources, or one that is gone or cannot be reached.

    Args:
        sources: of `read_all`.
        names: False: names of files do not matter at all, as in the records of earlier versions.
    """
    try:
        parts = [_parts(*_scheme(source), names) for source in sources]
    except UserError:
        return ""
    return text_digest("".join(itertools.chain(*parts))) if parts and all(parts) else ""


def _parts(scheme: Scheme, name: str, names: bool) -> list[str]:
    parts = scheme.parts(name)
    if not names or not scheme.said:
        return parts
    return [part + said for part, said in zip(parts, scheme.said(name), strict=True)]


def in_files(sources: Sequence[str]) -> bool:
    """Whether all of these are files: nothing is asked of a hub to read them again."""
    return all(_scheme(source)[0] is FILES for source in sources)


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean X?' where a name like it exists, else nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def names(fields: Mapping[str, Any]) -> str:
    """The names of a row's fields, as a sentence lists them."""
    shown = [name if len(name) <= 40 else f"{name[:40]}..." for name in map(str, fields)]
    return ", ".join(shown[:20] + (["..."] if len(shown) > 20 else [])) or "no fields"


def _rename(
    fields: dict[str, Any], columns: Mapping[str, str], origin: str, key: str
) -> dict[str, Any]:
    out = dict(fields)
    for ours, theirs in columns.items():
        value: Any = fields
        for part in [theirs] if theirs in fields else theirs.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise UserError(
                    f"{origin}: no column {theirs!r} ({key or 'columns'}.{ours}); this row has: "
                    f"{names(fields)}{nearest(theirs, fields)}"
                )
            value = value[part]
        out[ours] = value
        dict_of_sides, _, language = theirs.rpartition(".")
        if dict_of_sides == "translation" and ours in ("src", "tgt"):
            out.setdefault(f"{ours}_lang", language)
    return out


# Hugging Face datasets and TFDS ------------------------------------------------------------------


def _open_hub(rest: str) -> Any:
    from datasets import load_dataset

    name, _, split = rest.partition("@")
    name, _, subset = name.partition(":")
    try:
        return load_dataset(name, subset or None, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; all mean "not found so"
        raise UserError(
            f"hf:{rest} cannot be loaded ({first_line(error)}); the form is hf:NAME[:SUBSET]@SPLIT"
        ) from error


def _open_tfds(rest: str) -> Any:
    import tensorflow_datasets as tfds

    name, _, folder = rest.partition("?data_dir=")
    name, _, split = name.partition("@")
    try:
        return tfds.data_source(name, split=split or "train", data_dir=folder or None)
    except Exception as error:
        raise UserError(
            f"tfds:{rest} cannot be loaded ({first_line(error)}); the form is "
            "tfds:NAME[/CONFIG]@SPLIT?data_dir=FOLDER, prepared as array_record"
        ) from error


def _hub_rows(rest: str) -> Iterator[Row]:
    data = _open_hub(rest)
    labels = {n: f.int2str for n, f in data.features.items() if hasattr(f, "int2str")}
    for number, fields in enumerate(data, start=1):
        yield _label_names(fields, labels), f"hf:{rest} row {number}"


def _tfds_rows(rest: str) -> Iterator[Row]:
    data = _open_tfds(rest)
    labels = {n: f.int2str for n, f in data.dataset_info.features.items() if hasattr(f, "int2str")}
    for number in range(len(data)):
        fields = {key: _plain(value) for key, value in data[number].items()}
        yield _label_names(fields, labels), f"tfds:{rest} row {number + 1}"


def _tfds_parts(rest: str) -> list[str]:
    data = _open_tfds(rest)
    shards = data.dataset_info.splits[data.split].file_instructions
    files = file_digests([Path(shard.filename) for shard in shards])
    return [f"{file}:{shard.skip}:{shard.take}" for file, shard in zip(files, shards, strict=True)]


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


@dataclass(frozen=True)
class Scheme:
    """A kind of source: its rows, and digests that differ where its content does.

    Where the names of its files decide rows, too, `said` is what each of them says.
    """

    rows: Callable[[str], Iterator[Row]]
    parts: Callable[[str], list[str]]
    said: Callable[[str], list[str]] | None = None


FILES = Scheme(
    read_files,
    lambda pattern: file_digests([Path(file) for file in matches(pattern)]),
    lambda pattern: [read_as(file) for file in matches(pattern)],
)
SCHEMES = {
    # The fingerprint follows from the revision, or the files, and the split.
    "hf": Scheme(_hub_rows, lambda rest: [_open_hub(rest)._fingerprint]),
    "tfds": Scheme(_tfds_rows, _tfds_parts),
}


def _scheme(source: str) -> tuple[Scheme, str]:
    kind, _, rest = source.partition(":")
    return (SCHEMES[kind], rest) if kind in SCHEMES else (FILES, source)
