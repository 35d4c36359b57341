"""The one exception a user is meant to read.

Everything a user can get wrong (a row, a configuration key, a checkpoint, a layer number) raises
`UserError` with one sentence that names the file, line or key and the way out. The command line
prints that sentence and leaves with exit code 2; `--debug` adds the traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in what the user gave, as one sentence with the way out."""


def missing_extra(package: str, extra: str) -> UserError:
    """The sentence for an optional package that is not installed."""
    return UserError(f"{package} is missing; install it with: pip install 'jaxalign[{extra}]'")


def brief(value: object, most: int = 60) -> str:
    """A value as a sentence shows it: as Python writes it, cut to `most` characters."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print it
        return f"a whole number of {value.bit_length()} bits"
    try:
        # Of a long text or list the rest is not even formatted.
        text = repr(value[:most] if isinstance(value, str | bytes | list) else value)
    except (ValueError, RecursionError):  # such a number within, or too many lists within lists
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_line(error: BaseException) -> str:
    """Another library's error in short: its kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


@contextlib.contextmanager
def reading(place: str, what: str) -> Iterator[None]:
    """The net around a parser: whatever it raises within becomes one sentence.

    Parsers of other libraries raise a dozen kinds of exceptions on files that nobody meant to
    write; none of them is a mistake of this package, so none deserves a traceback.

    Args:
      place: the file, line or key that is read.
      what: what it should have been, as in 'Parquet'.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # Libraries in Rust panic with an exception that is none of Python's.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{place}: cannot be read as {what} ({first_line(error)})") from error
