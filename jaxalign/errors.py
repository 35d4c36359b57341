"""The one exception a user is meant to read.

Everything a user can get wrong (a row, a configuration key, a checkpoint, a layer number) raises
`UserError` with one sentence that names the file, line or key and the way out. The command line
prints that sentence and leaves with exit code 2; `--debug` adds the traceback.
"""


class UserError(ValueError):
    """A mistake in what the user gave, told in one sentence with the way out."""


def missing_extra(package: str, extra: str) -> UserError:
    """The sentence for an optional package that is not installed."""
    return UserError(f"{package} is missing; install it with: pip install 'jaxalign[{extra}]'")


def brief(value: object, most: int = 60) -> str:
    """A value as a sentence shows it: as Python writes it, cut to `most` characters."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print it
        return f"a whole number of {value.bit_length()} bits"
    # Of a long text or list the rest is not even formatted.
    text = repr(value[:most] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_line(error: BaseException) -> str:
    """Another library's error in short: its kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
