r"""The one way to the terminal: of several processes the first one prints.

A row of data may hold ESC sequences that recolour, rename or clear a terminal, or that make some
terminals type. What is printed of data, answers, file names and other libraries' errors goes
through `visible`; a reader that closes the pipe (`| head`) ends the printing, not the command.

    say("3 rows")                    # a line on standard output
    console().print(table)           # a rich console: markup and highlighting are off
    complain("no such file")         # 'jaxalign: no such file' on standard error
    visible("a\x1b[2Jb")             # 'a\x1b[2Jb': nine characters that say what is there
    with steady_output():
        command()
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

WIDE = 400  # columns of a pipe or file, which has no edge to wrap at
MINUTE = 60.0  # seconds between two lines of progress
# C0 and C1 controls but tab and newline, the bidirectional overrides and isolates (which show text
# in another order than it has), line separators, halves of surrogate pairs.
STEERING = (
    *(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    0x2028,
    0x2029,
    *range(0xD800, 0xE000),
)
ESCAPES = {code: ascii(chr(code))[1:-1] for code in STEERING}


def visible(text: object) -> str:
    """The text with every character that steers a terminal written out, as in Python's `repr`."""
    return str(text).translate(ESCAPES)


def say(text: object) -> None:
    """Prints a line, at once."""
    if _speaks():
        print(visible(text), flush=True)


def complain(text: object) -> None:
    """Prints what went wrong, whichever process it is."""
    print(f"jaxalign: {visible(text)}", file=sys.stderr, flush=True)


def console(**given: Any) -> Console:
    """A rich console for tables and colours; `given` goes to rich."""
    from rich.console import Console

    plain = {"highlight": False, "markup": False, "quiet": not _speaks()}
    made = Console(**(plain | given))
    return made if made.is_terminal else Console(**({"width": WIDE} | plain | given))


def bars(*notes: str, mode: str = "auto") -> Progress:
    """Progress bars of rich on a terminal; elsewhere, as in the log of a job, a line a minute.

    Args:
      notes: more columns, such as '{task.fields[rate]}'.
      mode: auto | none (`log.progress`).
    """
    from rich import progress

    screen = console()
    drawn = mode == "none" or screen.is_terminal
    return (progress.Progress if drawn else _lines(progress.Progress, notes))(
        "{task.description}",
        progress.BarColumn(20),
        progress.MofNCompleteColumn(),
        *notes,
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=screen,
        disable=mode == "none" or screen.quiet or not screen.is_terminal,
    )


def _lines(bars: type[Progress], notes: Sequence[str]) -> type[Progress]:
    """Bars that are told; rich, which takes a while to import, is imported by who draws."""

    class Lines(bars):  # type: ignore[misc, valid-type]
        told = time.monotonic()

        def update(self, task_id: Any, **fields: Any) -> None:
            super().update(task_id, **fields)
            self.tell(task_id)

        def advance(self, task_id: Any, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self.tell(task_id)

        def tell(self, task_id: Any) -> None:
            if time.monotonic() - self.told < MINUTE:
                return
            self.told = time.monotonic()
            task = next(one for one in self.tasks if one.id == task_id)
            left = task.time_remaining
            words = [f"{task.description}: {task.completed:,.0f} of {task.total:,.0f}"]
            words += [f"{timedelta(seconds=int(left))} left"] if left else []
            words += [note.format(task=task) for note in notes]
            say(", ".join(filter(None, words)))

    return Lines


def _speaks() -> bool:
    """Whether this process is the one that prints; there is one only until JAX is imported."""
    if "jax" not in sys.modules:
        return True
    from jaxalign.multihost import is_main

    return is_main()


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Within, a closed pipe or a narrow encoding of standard output raises nothing."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Steady(sys.stdout), _Steady(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # closed meanwhile
            sys.stdout.flush()
        sys.stdout, sys.stderr = kept


class _Steady:
    """A text stream that drops what cannot be delivered."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._drop(len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop(0)

    def _drop(self, written: int) -> int:
        # What comes after, and what Python flushes at its end, goes nowhere.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
