"""When a checkpoint is due: every so many updates, and every so many minutes.

due = Due(every=50, minutes=10)
if due(step): ...save...
"""

from __future__ import annotations

import time

import jax
import numpy as np

from jaxalign.multihost import from_main


class Due:
    """Answers after each update; with several processes all get the same answer.

    Time is that of the first process. It is asked only now and then, because that is a message to
    all: each time half as many updates later as the time that is left should hold, by the pace so
    far. That is about a dozen messages between two checkpoints, however fast the updates are.
    """

    def __init__(self, every: int, minutes: float) -> None:
        self._every, self._seconds = every, 60 * minutes
        self._since = time.monotonic()
        self._start: int | None = None  # the step before the first of this stretch
        self._look = 0

    def __call__(self, step: int) -> bool:
        """Whether to save after this update."""
        if self._start is None:
            self._start = step - 1
        if (self._every > 0 and step % self._every == 0) or self._late(step):
            self._since, self._start, self._look = time.monotonic(), step, step + 1
            return True
        return False

    def _late(self, step: int) -> bool:
        if not self._seconds or step < self._look:
            return False
        spent = time.monotonic() - self._since
        if jax.process_count() == 1:
            return spent >= self._seconds
        pace = spent / (step - (self._start or 0))
        wait = min(max((self._seconds - spent) / pace / 2, 1), 2**20)
        late, wait = np.asarray(from_main(np.array([spent >= self._seconds, wait], np.int32)))
        self._look = step + int(wait)
        return bool(late)
