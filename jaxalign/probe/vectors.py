"""States of parallel sentences as the metrics take them: checked, of length 1, mispaired.

States are one layer's pooled vectors, [G, N, D]: G languages, N parallel sentences (row n of every
language says the same), D numbers each. An array, a memory map or a list of G arrays [N, D] will
do, in any floating-point type; a language is read when its turn comes and held as float32.

    states = np.load("layer16.npy", mmap_mode="r")       # [36, 988, 4096]
    vectors = unit_vectors(states)                       # 36 arrays [988, 4096], |row| = 1
    mispaired = shuffled_pairs(states, seed=0)           # no row is a translation any more
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError

States = Any  # [G, N, D], or a sequence of G arrays [N, D]


def shape_of(states: States, sentences: int = 2) -> tuple[int, int, int]:
    """(G, N, D) of states that can be measured.

    Args:
      states: [G, N, D] floating point, or a sequence of G arrays [N, D].
      sentences: how many sentences there must be at least.

    Raises:
      UserError: not three axes, languages of unequal shapes, fewer sentences, width 0, or numbers
        that are not floating point.
    """
    if hasattr(states, "shape"):
        parts = [states.shape[1:]] * states.shape[0] if states.ndim else []
        types = {states.dtype}
    elif isinstance(states, Sequence):
        parts = [tuple(np.shape(one)) for one in states]
        types = {getattr(one, "dtype", None) for one in states}
    else:
        raise UserError(f"states must be an array [languages, sentences, width], not {states!r}")
    shapes = set(parts)
    if not shapes:
        raise UserError("states hold no language")
    if len(shapes) > 1:
        raise UserError(
            f"parallel states have one shape in every language, not {sorted(shapes)}: keep the "
            f"sentences that all languages have"
        )
    if len(parts[0]) != 2:
        raise UserError(
            f"states must be [languages, sentences, width]; a language has shape {parts[0]}"
        )
    number, width = shapes.pop()
    if width == 0:
        raise UserError("states have width 0")
    if number < sentences:
        raise UserError(f"this metric needs at least {sentences} sentences, not {number}")
    if not all(kind is not None and jnp.issubdtype(kind, jnp.floating) for kind in types):
        names = ", ".join(sorted(map(str, types)))
        raise UserError(
            f"states must be floating point, not {names}"
            + ("; view the file as ml_dtypes.bfloat16" if "V2" in names else "")
        )
    return len(states), number, width


def floats(states: States, language: int) -> jax.Array:
    """[N, D] float32: one language on the accelerator.

    Raises:
      UserError: a number is not finite.
    """
    one = jnp.asarray(states[language]).astype(jnp.float32)
    if not bool(jnp.isfinite(one).all()):
        row = int(np.argmin(np.asarray(jnp.isfinite(one).all(axis=-1))))
        raise UserError(
            f"the state of language {language}, sentence {row} is not finite: extract in float32"
        )
    return one


def unit_vectors(states: States) -> list[jax.Array]:
    """G arrays [N, D] float32 of length 1; a zero vector stays zero.

    Raises:
      UserError: as `shape_of` and `floats`.
    """
    languages, _, _ = shape_of(states)
    return [unit(floats(states, language)) for language in range(languages)]


@jax.jit
def unit(x: jax.Array) -> jax.Array:
    """Vectors [..., D] float32 of length 1; zero stays zero."""
    # Divided by the largest number first: squares of large states overflow in float32.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def shuffled_pairs(states: States, seed: int = 0) -> list[Any]:
    """The states with every language in another order: row n never holds a translation.

    The control of any paired metric. Language g is the shuffled list moved on by g places, so
    every pair of languages is deranged. Retrieval on it finds "the translation" by accident: for
    states without alignment in 1 of N cases, for aligned states less often (the true translation,
    still among the candidates, takes the place). More than that is a mistake in the pairing.

    Args:
      states: [G, N, D].
      seed: of the shuffle.

    Raises:
      UserError: as `shape_of`; fewer sentences than languages.
    """
    languages, number, _ = shape_of(states)
    if languages > number:
        raise UserError(f"{languages} languages cannot be mispaired with {number} sentences")
    order = np.random.default_rng(seed).permutation(number)
    return [np.asarray(states[g])[np.roll(order, -g)] for g in range(languages)]
