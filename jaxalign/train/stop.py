"""A stop on request, as a preempted machine asks for it.

with stop_signal() as asked:
    for step in ...:
        if asked(step): ...                      # save and leave
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM (a preempted machine) into a last checkpoint: asked after every step."""
    if jax.process_count() > 1:
        # One process hears it first, and all must leave at the same step: JAX agrees on one.
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    seen: list[float] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: seen.append(time.monotonic()))
    except ValueError:  # not the main thread: the caller handles signals
        yield lambda step: False
        return
    try:
        yield lambda step: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)
