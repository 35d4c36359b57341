"""What looks at a run while it runs: where its time goes, how fast its phases are, a trace.

with Watch(config, 'runs/demo') as watch:
    for batches, work in watch.inputs(items):
        with watch.update(run.step, step, work) as update:
            state, metrics = update(state, ...)
        watch.dispatched(metrics['grad_norm'], work)
        with watch.pause('save'): ...
    watch.goodput()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from jaxalign.settings import Config
from jaxalign.train.flops import Work
from jaxalign.train.goodput import Goodput, Item
from jaxalign.train.pace import Pace, Timing
from jaxalign.train.profile import Profile
from jaxalign.train.step import TrainStep

IN_FLIGHT = 2  # updates dispatched ahead of the device


class Watch:
    """The observers of one run; the clock starts here."""

    def __init__(self, config: Config, folder: str | Path) -> None:
        self._time_every = config.log.time_every
        self._clock = Goodput()
        self._pace = Pace(IN_FLIGHT)
        first, number = config.log.profile or (0, 0)
        self._profile = Profile(folder, first, number, self._pace.settle)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clock.close()
        self._profile.close()

    def inputs(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the wait for each is booked as input, what is done with it as step."""
        return self._clock.inputs(items, self._pace.in_flight)

    @contextmanager
    def update(
        self, step: TrainStep, number: int, work: Mapping[str, Work]
    ) -> Iterator[Callable[..., Any]]:
        """The step to dispatch as update `number`: now and then one that times its phases apart."""
        both = len(work) > 1 and self._time_every and number % self._time_every == 0
        with self._profile.update(number):
            yield self._pace.apart(step, work) if both else step

    def dispatched(self, result: jax.Array, work: Mapping[str, Work]) -> None:
        """Takes a number of the update; waits until only a few are in flight."""
        self._pace.dispatched(result, work)

    def timings(self) -> list[Timing]:
        """Times of single phases since the last call."""
        return self._pace.take()

    @contextmanager
    def pause(self, part: str) -> Iterator[None]:
        """Around what is not an update: `evaluate`, `save` or `compile`."""
        self._pace.settle()  # the device's work until here belongs to the updates
        with self._clock.during(part):
            yield

    def goodput(self) -> dict[str, float]:
        """Shares of the parts up to now, for the log."""
        return self._clock.values()

    def sentence(self) -> str:
        """The same, for the reader."""
        return self._clock.sentence()
