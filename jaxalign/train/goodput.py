"""Where the wall time of a run goes: seconds of six parts that add up to all of it.

Google's `ml-goodput-measurement` does this for jobs on Google Cloud: it wants a project and Cloud
Logging, and reads the logs back from there. Here a clock on the host is enough, and runs anywhere.

    clock = Goodput()
    for item in clock.inputs(items, in_flight):      # waiting for an item: input; the body: step
        with clock.during('save'): ...
    clock.values()                                   # {'goodput/step': 0.93, ...}
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

PARTS = ("step", "compile", "input", "evaluate", "save", "other")
# Tracing, lowering and compiling (or reading from the disk's cache) all report under this name. In
# a JAX that calls them otherwise their time counts to the part in which they happened.
COMPILE_EVENTS = "/jax/core/compile/"

Item = TypeVar("Item")


class Goodput:
    """A clock that belongs to one part at a time; it starts with `other`.

    The seconds are those of this process from here on: a resumed run counts anew, and what earlier
    starts spent stands in the last `goodput` line that each of them logged. What happens on the
    device while the host waits for it is `step`; what is compiled in any part is `compile`.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "other", time.monotonic()
        self._compiled = 0.0  # of the current stretch
        self._spans: list[tuple[float, float]] = []  # compilations of this stretch, apart
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def close(self) -> None:
        """Stops listening to the compiler."""
        jax.monitoring.unregister_event_duration_listener(self._heard)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part up to now."""
        self._turn_to(self._part)
        return dict(self._seconds)

    def values(self) -> dict[str, float]:
        """What to log: the parts' shares, `goodput/step` ... (their sum is 1), and all seconds."""
        seconds = self.seconds
        whole = max(sum(seconds.values()), 1e-9)
        shares = {f"goodput/{part}": spent / whole for part, spent in seconds.items()}
        return shares | {"goodput/seconds": whole}

    def sentence(self) -> str:
        """One line for the reader, the largest parts first."""
        seconds = sorted(self.seconds.items(), key=lambda item: -item[1])
        whole = max(sum(spent for _, spent in seconds), 1e-9)
        parts = (f"{part} {spent / whole:.1%}" for part, spent in seconds if spent)
        return f"{whole:,.0f} s: {', '.join(parts)}"

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Time inside is this part's; afterwards the clock is the part's before."""
        before = self._part
        self._turn_to(part)
        try:
            yield
        finally:
            self._turn_to(before)

    def inputs(self, items: Iterable[Item], in_flight: Sequence[Any] = ()) -> Iterator[Item]:
        """The items; waiting for one is `input`, what is done with it `step`.

        Args:
          items: made while the caller waits.
          in_flight: arrays that the device is still to finish, the newest last. A wait after which
            the newest is not ready cost nothing, as the device never ran dry: it counts as `step`.
        """
        iterator = iter(items)
        try:
            while True:
                self._turn_to("input")
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                busy = bool(in_flight) and not in_flight[-1].is_ready()
                self._turn_to("step", since_then="step" if busy else "input")
                yield item
        finally:
            self._turn_to("other")

    def _turn_to(self, part: str, since_then: str | None = None) -> None:
        """Books the stretch that ends now (as `since_then`, if given) and begins another."""
        now = time.monotonic()
        spent = now - self._since
        compiled = min(self._compiled, spent)
        self._seconds["compile"] += compiled
        self._seconds[since_then or self._part] += spent - compiled
        self._part, self._since, self._compiled = part, now, 0.0
        self._spans.clear()

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        # A background thread (a checkpoint's, say) that compiles does not hold up the run.
        if not event.startswith(COMPILE_EVENTS) or threading.get_ident() != self._thread:
            return
        end = time.monotonic()
        start = end - duration_secs
        # Tracing one function traces and compiles others: the outer span replaces the inner ones.
        while self._spans and self._spans[-1][0] >= start:
            inner = self._spans.pop()
            self._compiled -= inner[1] - inner[0]
        self._spans.append((start, end))
        self._compiled += duration_secs
