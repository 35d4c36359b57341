"""A trace of a few updates for XProf or TensorBoard: `jaxalign train CONFIG --profile 10:3`.

profile = Profile('runs/demo', first=10, number=3, settle=pace.settle)
with profile.update(step):                   # step counts from 1, as in the log
    state, metrics = run.step(...)
profile.close()                              # also where the run ended within the window
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


class Profile:
    """The trace of one run; every process writes its own file into `folder/profile`.

    Args:
      folder: of the run, on this machine.
      first: update with which the trace begins; 0: there is none.
      number: updates in it.
      settle: waits for the updates in flight, so that the trace holds whole updates.
    """

    def __init__(
        self, folder: str | Path, first: int, number: int, settle: Callable[[], None]
    ) -> None:
        self.folder = Path(folder, "profile")
        self._first, self._end, self._settle = first, first + number, settle
        self._open = False

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Around the dispatch of update `step`; begins and ends the trace where it is due."""
        if self._open and step >= self._end:
            self.close()
        # A run that resumes within the window traces what is left of it.
        if not self._open and self._first and self._first <= step < self._end:
            self._settle()
            jax.profiler.start_trace(self.folder)
            self._open = True
        with jax.profiler.StepTraceAnnotation("update", step_num=step):
            yield

    def close(self) -> None:
        """Ends the trace, if one is open, after what is in flight."""
        if not self._open:
            return
        self._open = False
        try:
            self._settle()
        finally:
            jax.profiler.stop_trace()
