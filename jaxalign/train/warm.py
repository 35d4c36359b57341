"""Every program of a training compiled before the first update.

Otherwise a phase's bucket length compiles when its first batch comes, perhaps hours into the run.
The lengths are known (`batch.buckets`), so a run can pay at the start, with several compilations at
once. What `lower().compile()` made is found again by the first real call: `tests/train` count it.

    seconds = warm_up(run, key)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.stages import Lowered

from jaxalign.sharding import put_batch, rows_here
from jaxalign.train.design import placed
from jaxalign.train.setup import Run

AT_ONCE = 4  # a compilation uses several cores by itself, and gigabytes for a large model


def warm_up(run: Run, state: Any, key: jax.Array | None) -> float:
    """Compiles every (phase, micro-batches, length) and the optimiser; returns the seconds it took.

    Args:
      run: gives the programs and the shapes.
      state: as the first update will get it (nothing is computed or changed).
      key: of dropout, or None.
    """
    began = time.monotonic()
    lowered = list(_lowered(run, state, key))  # tracing holds Python's lock: one after the other
    # Compilers of several processes may wait for one another: there, all take the same order.
    with ThreadPoolExecutor(AT_ONCE if jax.process_count() == 1 else 1) as pool:
        list(pool.map(lambda one: one.compile(), lowered))
    return time.monotonic() - began


def _lowered(run: Run, state: Any, key: jax.Array | None) -> Iterator[Lowered]:
    seen: set[tuple] = set()
    for update in (0, 1):  # turns repeat after two updates
        turns = run.turns(update)
        sizes = tuple((name, len(numbers)) for name, numbers in turns.items())
        for name, numbers in turns.items():
            places = rows_here(run.mesh, run.train[name].size)
            for length in run.train[name].lengths:
                if (name, len(numbers), length) not in seen:
                    seen.add((name, len(numbers), length))
                    blank = run.train[name].blank(length, len(numbers), places)
                    batch = put_batch(run.mesh, blank, stacked=True)
                    yield run.step.gradient.lower(name, state, run.frozen, batch, key)
        if sizes not in seen:
            seen.add(sizes)
            gradients = dict.fromkeys(turns, placed(state.trained, run.shardings.trained))
            yield run.step.apply.lower(state, gradients, sizes)
