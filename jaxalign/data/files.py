"""Files as rows: JSON lines and lists, CSV, TSV and Parquet, each row with its place.

    for fields, origin in read_files("data/train.*.jsonl"):
        origin                                  # data/train.de.jsonl:1

A file is read as a stranger may have written it: what cannot be a row is one sentence that names
file and line, never a traceback, and nothing is dropped without a word.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxalign.data.languages import language_name, split_direction
from jaxalign.errors import UserError, brief, first_line

# de | de-st | pt-BR | es-419 | deu_Latn | zh-Hans-CN
LANGUAGE = re.compile(r"[a-z]{2,3}([-_]([A-Za-z]{2,4}|[0-9]{3})){0,2}")
PAIR_FIELDS = ("text0", "text1", "lang0", "lang1")
# First rows of XX-YY.tsv that name its columns, and what a name of a column looks like.
HEADINGS = (("source", "target"), ("src", "tgt"), ("text_parallel_0", "text_parallel_1"))
HEADING = r"(?:text|sentence|sent|segment|source|target|src|tgt|lang(?:uage)?)?[-_ ]?(?:[01]|{})?"
# A cell in quotes with doubled ones inside, as CSV escapes them and no text has them.
QUOTED = re.compile(r'"(?=.*"".*")(?:[^"]|"")*"', re.DOTALL)
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half a surrogate pair


Row = tuple[dict[str, Any], str]  # fields, origin
RETURN = "a carriage return is within a line; replace it with a blank, or \\n if it ends a line"
LONGEST = 1 << 26  # characters of a line: a row of data is shorter


def text_lines(path: Path) -> list[str]:
    """The lines of a text in UTF-8, ended by newlines (or carriage return and newline) alone.

    `str.splitlines` also ends lines at U+2028, form feeds and more, which stand within sentences.

    Raises:
        UserError: the file is not text in UTF-8, or cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    lines = [line.removesuffix("\r") for line in lines]
    return lines[:-1] if not lines[-1] else lines


def guarded(rows: Iterator[Row], place: str, what: str) -> Iterator[Row]:
    """The same rows; whatever else their parser raises names the last good one.

    Raises:
        UserError: the parser failed.
    """
    last = ""
    try:
        for row in rows:
            last = row[1]
            yield row
    except UserError:
        raise
    except Exception as error:
        where = f" behind {last}" if last else ""
        raise UserError(f"{place} cannot be read as {what}{where} ({first_line(error)})") from error


def matches(pattern: str) -> list[str]:
    """The files of a path or glob, in the order of their names."""
    return [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))


def read_files(pattern: str) -> Iterator[Row]:
    """The rows of a path or glob, in the order of the files' names.

    Raises:
        UserError: no such file, an unknown type, a row that cannot be read.
    """
    paths = matches(pattern)
    if not paths:
        raise UserError(
            f"no file matches {pattern!r} (looked from {Path.cwd()}); give a path, a glob, "
            "hf:NAME@SPLIT or tfds:NAME@SPLIT"
        )
    for path in paths:
        suffix = _ending(path)
        if suffix not in READERS or Path(path).is_dir():
            raise UserError(
                f"{path}: unknown file type {suffix or Path(path).name!r}; known are "
                f"{', '.join(READERS)} (text files also with .gz)"
            )
        yield from guarded(_told(READERS[suffix](path), path), path, suffix[1:].upper())


def read_as(path: str) -> str:
    """What the name of a file says of its rows: its reader, and the languages of a pair.

    Names of which it differs may give other rows of the same bytes. '' of plain JSON lines and of
    what is no table of rows.
    """
    ending = _ending(path)
    reader = "" if READERS.get(ending, _jsonl) is _jsonl else ending
    zipped = ".gz" if path.endswith(".gz") else ""
    return ":".join([reader + zipped, *_pair_languages(path).values()])


def _ending(path: str) -> str:
    """`.tsv` of de-en.TSV.gz; '' where there is none."""
    suffixes = [s for s in Path(path).suffixes[-2:] if s != ".gz"]
    return suffixes[-1].lower() if suffixes else ""


def _told(rows: Iterator[Row], path: str) -> Iterator[Row]:
    """The same rows; what is wrong with whole files has words of its own."""
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); copy it again") from error


def _open(path: str) -> IO[str]:
    # utf-8-sig: a byte order mark, as spreadsheets write it, must not end up in the first name.
    opener: Callable[..., IO[str]] = gzip.open if path.endswith(".gz") else open  # type: ignore[assignment]
    # A line ends at \n or \r\n; a carriage return alone is a part of its text.
    return opener(path, "rt", encoding="utf-8-sig", newline="\n")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ; of two of one name JSON's parser drops the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = [name for name, _ in pairs]
        twice = next(name for name in seen if seen.count(name) > 1)
        raise UserError(f"{brief(twice)} occurs twice in one object; rename or remove one of them")
    return found


def _parse(text: str, origin: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: names the line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        # JSON may write half a character as an escape; tokenizers refuse it.
        if HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}: broken JSON ({error.msg} at column {error.colno}); "
            "each line must be one JSON object"
        ) from error
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{origin}: half of a character (a lone surrogate, {error.object[error.start]!r}) is "
            "in this row; write the character whole, or remove it"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise UserError(f"{origin}: JSON that cannot be read ({first_line(error)})") from error
    return value


def _json_line(text: str, origin: str) -> dict[str, Any]:
    fields = _parse(text, origin)
    if not isinstance(fields, dict):
        raise UserError(f"{origin}: a JSON {type(fields).__name__} where a row must be an object")
    return fields


def _lines(file: IO[str], path: str) -> Iterator[str]:
    """Every line with its end; none is read beyond a length."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST and not line.endswith("\n"):
            raise UserError(f"{path}:{number}: a line of {LONGEST} characters or more; split it")
        yield line


def _jsonl(path: str) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
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
        text = start + file.read()
    try:
        items = _parse(text, path)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError):
            raise UserError(f"{path}:{cause.lineno}: broken JSON ({cause.msg})") from cause
        raise
    for number, item in enumerate(items, start=1):
        origin = f"{path} item {number}"
        if not isinstance(item, dict):
            raise UserError(f"{origin}: a JSON {type(item).__name__} where a row must be an object")
        yield item, origin


def _table(path: str, **dialect: Any) -> Iterator[Row]:
    languages = _pair_languages(path)
    header: list[str] = []
    with _open(path) as file:
        csv.field_size_limit(LONGEST)  # its own is 131,072 characters
        reader = csv.reader(_lines(file, path), **dialect)
        try:
            for cells in reader:
                origin = f"{path}:{reader.line_num}"
                if not cells:
                    continue
                if not header:
                    header, first = _header(cells, languages, origin)
                    if first:
                        continue
                if len(cells) != len(header):
                    raise UserError(f"{origin}: {len(cells)} columns where {len(header)} belong")
                _check_cells(cells, header, origin, dialect)
                yield {**languages, **dict(zip(header, cells, strict=True))}, origin
        except csv.Error as error:
            reason = RETURN if "new-line character" in str(error) else f"broken table ({error})"
            raise UserError(f"{path}:{reader.line_num}: {reason}") from error


def _header(cells: list[str], languages: Mapping[str, str], origin: str) -> tuple[list[str], bool]:
    """The names of the columns, and whether this first row holds them.

    A file XX-YY.tsv needs none; where its first row cannot be sentences it is not taken as a pair.
    """
    if languages and cells[0] != PAIR_FIELDS[0]:
        pair = list(PAIR_FIELDS[:2])
        codes = tuple(languages.values())
        first = tuple(cell.strip().casefold() for cell in cells)
        if first in HEADINGS or first == tuple(code.casefold() for code in codes):
            return pair, True
        named = "|".join(
            re.escape(name.casefold()) for c in codes for name in (c, language_name(c))
        )
        if all(re.fullmatch(HEADING.format(named), cell) for cell in first):
            raise UserError(
                f"{origin}: {', '.join(map(brief, cells))} look like the names of columns; call "
                "them text0 and text1, or remove the line"
            )
        return pair, False
    twice = next((name for name in cells if cells.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"{origin}: two columns are called {brief(twice)}, and one would be lost; rename one"
        )
    return cells, True


def _check_cells(
    cells: Sequence[str], header: Sequence[str], origin: str, dialect: Mapping[str, Any]
) -> None:
    """Refuses a second header within a table, and the quoting of CSV where quotes are text."""
    if len(cells) > 1 and [cells[0].lstrip("\ufeff"), *cells[1:]] == list(header):
        raise UserError(
            f"{origin}: the column names are repeated here, as if files had been concatenated; "
            "remove the line"
        )
    quoted = [cell for cell in cells if QUOTED.fullmatch(cell)]
    if quoted and dialect.get("quoting") == csv.QUOTE_NONE:
        raise UserError(
            f"{origin}: {brief(quoted[0])} is quoted as in a CSV file, and quotes in a .tsv are "
            "text; write the file as .csv, or without quoting"
        )


def _pair_languages(path: str) -> dict[str, str]:
    """{'lang0': 'de', 'lang1': 'en'} for de-en.tsv, the layout of Tatoeba's test sets."""
    name = Path(path).name.removesuffix(".gz")
    stem, _, suffix = name.rpartition(".")
    languages = split_direction(stem)
    if suffix.lower() != "tsv" or not all(map(LANGUAGE.fullmatch, languages)):
        return {}
    return dict(zip(PAIR_FIELDS[2:], languages, strict=True))


def _csv(path: str) -> Iterator[Row]:
    return _table(path, strict=True)  # else an open quote swallows the rest of the file


def _tsv(path: str) -> Iterator[Row]:
    # Quotes in tab-separated sentences are quotes, not quoting.
    return _table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(path: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            kept = file.schema_arrow.names
            twice = next((name for name in kept if kept.count(name) > 1), None)
            if twice is not None:
                raise UserError(
                    f"{path}: two columns are called {brief(twice)}, and one would be lost; rename "
                    "one"
                )
            number = 0
            for batch in file.iter_batches():
                for fields in _timeless(batch).to_pylist():
                    number += 1
                    yield fields, f"{path} row {number}"
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {first_line(error)}") from error


def _timeless(batch: Any) -> Any:
    """The batch with times as text: Python has no nanoseconds and no year 300,000."""
    import pyarrow as pa

    for place, part in enumerate(batch.schema):
        if pa.types.is_temporal(part.type):
            text = batch.column(place).cast(pa.string())
            batch = batch.set_column(place, part.name, text)
    return batch


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
