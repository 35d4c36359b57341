"""How fast each phase runs, read off the updates as they end: the device never waits for it.

The loop keeps two updates in flight and waits for the one before them. Where it really had to wait
it knows when that update ended; the time between two such ends is the second one's, and where this
update held one phase only, that phase's. An update of both phases cannot be separated this way
(the device runs its programs one after the other, without the host); for it there is `apart`.

    pace = Pace(ahead=2)
    state, metrics = step(state, ...)
    pace.dispatched(metrics['grad_norm'], {'task': Work(8192, 1e12)})
    pace.take()                                  # [Timing('task', seconds=0.8, work=Work(...))]
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxalign.train.flops import Work
from jaxalign.train.step import TrainStep


@dataclass(frozen=True)
class Timing:
    """What one phase of one update took."""

    phase: str
    seconds: float
    work: Work


class Pace:
    """The updates in flight, and the times of the phases that could be measured."""

    def __init__(self, ahead: int) -> None:
        self.in_flight: deque[Any] = deque()  # arrays; `is_ready` is unknown to type checkers
        self._ahead = ahead
        self._works: deque[Mapping[str, Work]] = deque()
        self._ended: float | None = None  # the update before the oldest in flight, if seen
        self._timings: list[Timing] = []

    def dispatched(self, result: jax.Array, work: Mapping[str, Work]) -> None:
        """Takes a number that the update computes; waits until at most `ahead` are in flight."""
        self.in_flight.append(result)
        self._works.append(work)
        if len(self.in_flight) > self._ahead:
            self._wait()

    def settle(self) -> None:
        """Waits for everything in flight; the time until the next update belongs to none."""
        while self.in_flight:
            self._wait()
        self._ended = None

    def take(self) -> list[Timing]:
        """The timings since the last call."""
        taken, self._timings = self._timings, []
        return taken

    def apart(self, step: TrainStep, work: Mapping[str, Work]) -> Callable[..., Any]:
        """The same update, with the device waited for after each phase, which times them all.

        Its programs and results are those of any other update; only the dispatch of one program
        waits for the end of another. A phase for which a program had to be compiled is not timed.
        """
        self.settle()

        def phase(name: str, *rest: Any) -> Any:
            known, began = step.programs(), time.monotonic()
            out = jax.block_until_ready(step.phase(name, *rest))
            took = time.monotonic() - began
            if step.programs() == known:
                self._timings.append(Timing(name, took, work[name]))
            return out

        return partial(step, phase=phase)

    def _wait(self) -> None:
        oldest, work = self.in_flight.popleft(), self._works.popleft()
        # Already over: when, nobody saw. Neither its time nor the next one's is known.
        unseen = oldest.is_ready()
        oldest.block_until_ready()
        now = None if unseen else time.monotonic()
        if now is not None and self._ended is not None and len(work) == 1:
            self._timings += [Timing(n, now - self._ended, one) for n, one in work.items()]
        self._ended = now
