"""Whose turn it is, and how fast to learn.

A micro-batch serves one phase, such as `task` or `align`; the turns follow the global count of
micro-batches, in the order of `phases.PHASES`, and never reset (as in the paper's code):

    every='microbatch', 4 per update      T A T A | T A T A | ...      (the paper's code)
    every='step',       4 per update      T T T T | A A A A | ...      (the paper's text)
    every='joint',      4 per update      each micro-batch is both

    turns('microbatch', 3, 4, ('task', 'align'))  # {'task': range(6, 8), 'align': range(6, 8)}
    rate = learning_rate('inverse_sqrt', 5e-4, steps=1000, warmup=30)
    rate(0), rate(30)                             # 0.0, 5e-4
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import optax


def phase_of(micro: int, every: str, accumulate: int, active: Sequence[str]) -> str:
    """The phase of global micro-batch `micro`, where several alternate."""
    turn = micro if every == "microbatch" else micro // accumulate
    return active[turn % len(active)]


def turns(every: str, update: int, accumulate: int, active: Sequence[str]) -> dict[str, range]:
    """Which micro-batches of each phase's own stream make up an update.

    Args:
      every: microbatch, step or joint.
      update: 0-based optimiser update.
      accumulate: micro-batches per update (`joint`: of each phase).
      active: the phases that are on, in the order of their turns; one alone takes every
        micro-batch.

    Returns:
      Phase -> indices into its stream; phases without a turn are absent. They repeat after as many
      updates as there are phases.
    """
    first = update * accumulate
    if every == "joint":
        return {phase: range(first, first + accumulate) for phase in active}
    found: dict[str, range] = {}
    for place, phase in enumerate(active):
        before = _served(place, first, every, accumulate, len(active))
        after = _served(place, first + accumulate, every, accumulate, len(active))
        if after > before:
            found[phase] = range(before, after)
    return found


def _served(place: int, micro: int, every: str, accumulate: int, phases: int) -> int:
    """Micro-batches of the phase in this place of the turns among the first `micro` global ones."""
    if every == "microbatch":
        return (micro + phases - 1 - place) // phases
    rounds, rest = divmod(micro // accumulate, phases)
    return (rounds + (rest > place)) * accumulate


def warmup_steps(steps: int, warmup: int, ratio: float) -> int:
    """`warmup` updates, or where that is 0 the ratio of all of them, rounded up."""
    return warmup or math.ceil(steps * ratio)


def learning_rate(name: str, peak: float, steps: int, warmup: int) -> optax.Schedule:
    """Update (0-based) -> learning rate, as in transformers' `get_scheduler`.

    Args:
      name: inverse_sqrt: peak·sqrt(w/s) past the warm-up (the paper's; timescale 10,000 without
        one); cosine and linear fall to 0 at `steps`; constant.
      peak: the rate at the end of the warm-up.
      steps: updates of the whole run.
      warmup: updates of linear warm-up; the first update then has rate 0.
    """
    return _SCHEDULES[name](peak, steps, warmup)


def _warm(peak: float, warmup: int, after: optax.Schedule) -> optax.Schedule:
    def rate(step: jnp.ndarray) -> jnp.ndarray:
        rising = peak * step / max(warmup, 1)
        return jnp.where(step < warmup, rising, after(step - warmup))

    return rate


def _inverse_sqrt(peak: float, steps: int, warmup: int) -> optax.Schedule:
    scale = warmup or 10_000
    return _warm(peak, warmup, lambda late: peak / jnp.sqrt((late + scale) / scale))


def _cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return _warm(peak, warmup, optax.cosine_decay_schedule(peak, max(steps - warmup, 1)))


def _linear(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return _warm(peak, warmup, optax.linear_schedule(peak, 0.0, max(steps - warmup, 1)))


def _constant(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return _warm(peak, warmup, optax.constant_schedule(peak))


_SCHEDULES = {
    "inverse_sqrt": _inverse_sqrt,
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
}
