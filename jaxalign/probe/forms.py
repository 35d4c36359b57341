"""States as they are compared: raw, in a form of training, or without their main directions.

A few dimensions of an LLM's states carry values hundreds of times larger than the rest (massive
activations: Sun et al. 2024, arXiv 2402.17762), often the same ones in every sentence. The cosine
of raw states then compares hardly anything else. The remedies of `objectives.standards` and one
more, all from the states alone:

    formed(states, "standardised")[2]        # [N, D]: every dimension minus its mean over all
                                             # sentences and languages, by its standard deviation
    formed(states, "all_but_top")[2]         # without the mean and the D / 100 main directions

Statistics are of one layer, over all sentences of all languages, which are read one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.objectives import standards
from jaxalign.objectives.standards import Moments, Standards, standardise
from jaxalign.probe.vectors import States, floats, shape_of

FORMS = ("raw", *standards.FORMS, "all_but_top")
SPARE, ROUNDS = 8, 6  # more directions than asked for, and rounds of the iteration that finds them


@dataclass(frozen=True)
class Formed:
    """States in another form; a language is transformed when its turn comes."""

    shape: tuple[int, int, int]  # [G, N, D]
    states: States
    change: Any  # [N, D] float32 -> [N, D] float32
    dtype: Any = jnp.float32
    ndim: int = 3

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, language: int) -> jax.Array:
        return self.change(floats(self.states, language))


def formed(states: States, form: str, directions: int | None = None) -> States:
    """The states in this form; raw ones as they are given.

    Args:
      states: [G, N, D] of one layer.
      form: `raw`; `standardised`: every dimension has mean 0 and deviation 1 over all sentences of
        all languages, a constant one is 0; `centred`: mean 0; `trimmed`: without the massive
        dimensions; `all_but_top`: minus the mean, and minus the projection on the main directions
        of what is left (Mu & Viswanath 2018, arXiv 1702.01417).
      directions: how many of `all_but_top`; None: D / 100 as the authors advise, at least 1.

    Raises:
      UserError: bad states, another form, or as many directions as dimensions.
    """
    if form not in FORMS:
        raise UserError(f"states are compared as {', '.join(FORMS)}; not {form!r}")
    shape = shape_of(states)
    if form == "raw":
        return states
    found = statistics(states)
    if form in standards.FORMS:
        chosen = jax.tree.map(jnp.asarray, found.standards(form))
        return Formed(shape, states, partial(_scaled, chosen))
    mean = jnp.asarray(found.mean, jnp.float32)
    number = max(1, round(shape[2] / 100)) if directions is None else directions
    if not 1 <= number < shape[2]:
        raise UserError(f"directions must be 1..{shape[2] - 1}, not {number}")
    return Formed(shape, states, partial(_without, mean, _main(states, mean, number)))


def statistics(states: States) -> Moments:
    """Mean and deviation of every dimension, languages read one after another.

    Args:
      states: [G, N, D] of one layer.

    Raises:
      UserError: bad states.
    """
    languages, number, width = shape_of(states)
    found = Moments(width)
    for language in range(languages):
        found.add(number, *map(np.asarray, _moments(floats(states, language))))
    return found


@jax.jit
def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = jnp.mean(x, axis=0)
    moved = x - mean
    mean = mean + jnp.mean(moved, axis=0)  # what rounding left, where numbers are large
    return mean, jnp.sum((x - mean) ** 2, axis=0)


@jax.jit
def _scaled(chosen: Standards, x: jax.Array) -> jax.Array:
    return standardise(x, chosen)


@jax.jit
def _without(mean: jax.Array, basis: jax.Array, x: jax.Array) -> jax.Array:
    moved = x - mean
    return moved - _multiply(_multiply(moved, basis), basis.T)


_multiply = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _main(states: States, mean: jax.Array, number: int) -> jax.Array:
    """[D, number], orthonormal: the principal directions of all sentences around the mean.

    Subspace iteration with a few spare directions and a Rayleigh-Ritz step at the end (Halko,
    Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4): the states are only multiplied with.
    """
    languages, _, width = shape_of(states)
    size = min(width, number + SPARE)
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (width, size)))[0]
    for _ in range(ROUNDS):
        moved = sum(_turned(floats(states, g), mean, basis) for g in range(languages))
        basis, last = jnp.linalg.qr(moved)[0], basis
    inner = _multiply(last.T, moved)  # [size, size]: the covariance in the last directions
    values, turns = jnp.linalg.eigh((inner + inner.T) / 2)
    return _multiply(last, turns[:, jnp.argsort(-values)[:number]])


@jax.jit
def _turned(x: jax.Array, mean: jax.Array, basis: jax.Array) -> jax.Array:
    """[D, size]: (x - mean)' (x - mean) basis."""
    moved = x - mean
    return _multiply(moved.T, _multiply(moved, basis))
