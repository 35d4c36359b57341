"""Every program of a training compiled before the first update.

Otherwise a phase's bucket length compiles when its first batch comes, perhaps hours into the run.
The lengths are known (`batch.buckets`), so a run can pay at the start, with several compilations at
once. What `lower().compile()` made is found again by the first real call: `tests/train` count it.

    seconds = warm_up(run, key)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from jaxalign.sharding import put_batch, replicated, rows_here
from jaxalign.train.design import placed
from jaxalign.train.setup import Run

AT_ONCE = 4  # a compilation uses several cores by itself, and gigabytes for a large model


def warm_up(run: Run, state: Any, key: jax.Array | None) -> float:
    """Compiles every phase's programs (`TrainStep`) and the optimiser; returns the seconds it took.

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
    for update in range(len(run.active)):  # then turns repeat
        turns = run.turns(update)
        sizes = tuple((name, len(numbers)) for name, numbers in turns.items())
        programs = [one for name, number in sizes for one in _of_phase(run, name, number)]
        programs.append((("apply", sizes), partial(_apply, run, sizes)))
        for what, lower in programs:
            if what not in seen:
                seen.add(what)
                yield lower(state, key)


def _of_phase(run: Run, name: str, number: int) -> Iterator[tuple[tuple, Callable[..., Lowered]]]:
    """What names each program of a phase with so many micro-batches, and what lowers it."""
    lengths = run.train[name].lengths
    if not run.alone(name):
        for length in lengths:
            yield (name, number, length), partial(_stacked, run, name, number, length)
        return
    yield ("zeros",), lambda state, key: run.step.zeros.lower(state.trained)
    for length in lengths:
        yield (name, length), partial(_add, run, name, length)
    yield (name, "mean", number), partial(_mean, run, name, number, lengths[0])


def _blank(run: Run, name: str, number: int, length: int) -> Any:
    stream = run.train[name]
    blank = stream.blank(length, number, rows_here(run.mesh, stream.size))
    return put_batch(run.mesh, blank, stacked=True)


def _stacked(run: Run, name: str, number: int, length: int, state: Any, key: Any) -> Lowered:
    batch = _blank(run, name, number, length)
    return run.step.gradient.lower(name, state, run.frozen, batch, key)


def _adding(run: Run, name: str, length: int, state: Any, key: Any) -> tuple:
    total = placed(state.trained, run.shardings.trained)
    return name, state, run.frozen, _blank(run, name, 1, length), key, total, np.int32(0)


def _add(run: Run, name: str, length: int, state: Any, key: Any) -> Lowered:
    return run.step.add.lower(*_adding(run, name, length, state, key))


def _mean(run: Run, name: str, number: int, length: int, state: Any, key: Any) -> Lowered:
    given = _adding(run, name, length, state, key)
    total, record = jax.eval_shape(partial(run.step.add, name), *given[1:])
    record = placed(record, jax.tree.map(lambda _: replicated(run.mesh), record))
    return run.step.mean.lower(placed(total, run.shardings.trained), [record] * number)


def _apply(run: Run, sizes: tuple[tuple[str, int], ...], state: Any, key: Any) -> Lowered:
    gradients = dict.fromkeys(dict(sizes), placed(state.trained, run.shardings.trained))
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=run.shardings.step)
    return run.step.apply.lower(state, gradients, dict.fromkeys(dict(sizes), number), sizes)
