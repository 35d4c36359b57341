"""Ctrl-C is never lost.

Python raises KeyboardInterrupt wherever it happens to be, and where that is a callback of the
garbage collector (JAX has one) it prints a traceback and forgets it: the command goes on.

    with heard_interrupts():
        ...                                      # KeyboardInterrupt comes a moment later instead
"""

from __future__ import annotations

import _thread
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LATER = 0.2  # seconds, until the callback has returned


@contextmanager
def heard_interrupts() -> Iterator[None]:
    """Interrupts the main thread once more where a callback swallowed it."""
    before = sys.unraisablehook

    def tell(what: Any) -> None:
        if what.exc_type is KeyboardInterrupt:
            _thread.start_new_thread(_again, ())
        else:
            before(what)

    sys.unraisablehook = tell
    try:
        yield
    finally:
        if sys.unraisablehook is tell:
            sys.unraisablehook = before


def _again() -> None:
    time.sleep(LATER)
    _thread.interrupt_main()
