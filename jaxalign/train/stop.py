"""A stop on request: SIGTERM, as a preempted machine sends it, or Ctrl-C.

with stop_signal() as asked:
    for step in ...:
        if asked(step): ...                      # save and leave; asked.how says why
        asked.leave(step)                        # within long work: raises StopRequested
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax

HEARD = {signal.SIGTERM: "signal", signal.SIGINT: "interrupt"}
AGAIN = b"\njaxalign: saves and stops; Ctrl-C once more stops at once\n"


class StopRequested(Exception):
    """Raised between the parts of long work when the run was asked to stop."""


class Request:
    """Whether somebody asked this run to stop; with several processes all get the same answer."""

    def __init__(self) -> None:
        self.how = "signal"  # signal | interrupt
        self._heard = False
        self._stop = False
        self._polls = 0

    def __call__(self, step: int) -> bool:
        """Whether to leave after this update; all processes ask equally often."""
        if self._stop or jax.process_count() == 1:
            return self._stop or self._heard
        # One process hears it first, and all must leave at the same place: JAX agrees on a number
        # of questions that none has reached yet.
        from jax.experimental import multihost_utils

        self._polls += 1
        self._stop = bool(multihost_utils.reached_preemption_sync_point(self._polls))
        return self._stop

    def leave(self, step: int) -> None:
        """Asks between the parts of long work.

        Raises:
          StopRequested: the run should stop.
        """
        if self(step):
            raise StopRequested

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        if number == signal.SIGINT:
            if self.how == "interrupt":
                raise KeyboardInterrupt
            os.write(2, AGAIN)
        self.how, self._heard = HEARD[signal.Signals(number)], True
        if number == signal.SIGINT and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the signal that JAX passes on to the others


@contextmanager
def stop_signal() -> Iterator[Request]:
    """Turns a signal into an answer: asked after every update and within a validation."""
    request, before = Request(), {}
    # JAX itself hears SIGTERM where there are several processes.
    wanted = [signal.SIGINT] if jax.process_count() > 1 else list(HEARD)
    # What the shell ignores for a job in the background (Ctrl-C is not meant for it) stays ignored.
    wanted = [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]
    try:
        for number in wanted:
            before[number] = signal.signal(number, request.hear)
    except ValueError:  # not the main thread: the caller handles signals
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
