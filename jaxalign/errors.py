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


def first_line(error: BaseException) -> str:
    """Another library's error in short: its kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
