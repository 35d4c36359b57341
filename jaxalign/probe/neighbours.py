"""Neighbourhood overlap: do two languages agree on which sentences are alike?

Unlike retrieval it compares sentences within a language only, so a constant difference between
languages does not matter.

    shared = overlap(states, neighbours=10)      # [G, G], 1 on the diagonal, about 10 / N by chance
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.probe.retrieval import cosines
from jaxalign.probe.vectors import States, shape_of, unit_vectors

STRIP = 1024  # rows of a language's cosines that exist at a time
NOBODY = -1  # in the place of a neighbour that ties with a sentence outside of the k


def overlap(states: States, neighbours: int = 10) -> np.ndarray:
    """Mean share of a sentence's k nearest sentences that two languages agree on, [G, G] float64.

        1/N sum_i | near_x(i) & near_y(i) | / k

    with near_x(i) the k sentences of language x with the highest cosine to sentence i, itself
    excluded (the mutual k-nearest-neighbour metric of Huh et al. 2024, arXiv 2405.07987). A tie is
    not a neighbour: where the sentence after the k-th is as near as the k-th, which of them belongs
    to the k is not known, and none of the equals counts. A language that has collapsed into one
    vector has no neighbours at all, and shares none, not even with itself.

    Args:
      states: [G, N, D] of one layer.
      neighbours: k, fewer than the sentences.

    Raises:
      UserError: bad states, or k out of range.
    """
    languages, number, _ = shape_of(states)
    if not 1 <= neighbours < number:
        raise UserError(f"neighbours must be 1..{number - 1} for {number} sentences")
    near = jnp.stack([_nearest(x, neighbours) for x in unit_vectors(states)])  # [G, N, k]
    shared = np.stack([np.asarray(_common(near[g], near)) for g in range(languages)])
    return shared / (number * neighbours)


def _nearest(x: jax.Array, neighbours: int) -> jax.Array:
    parts = [_strip(x, start, neighbours) for start in range(0, len(x), STRIP)]
    return jnp.concatenate(parts)  # [N, k]


@partial(jax.jit, static_argnames=("start", "neighbours"))
def _strip(x: jax.Array, start: int, neighbours: int) -> jax.Array:
    cosine = cosines(x[start : start + STRIP], x)
    own = start + jnp.arange(len(cosine))[:, None] == jnp.arange(len(x))
    best, places = jax.lax.top_k(jnp.where(own, -jnp.inf, cosine), neighbours + 1)
    return jnp.where(best > best[:, -1:], places, NOBODY)[:, :neighbours]


@jax.jit
def _common(one: jax.Array, others: jax.Array) -> jax.Array:
    """How many neighbours each of `others` [G, N, k] shares with `one` [N, k]: [G] int32."""
    pairs = one[None, :, :, None] == others[:, :, None, :]  # [G, N, k, k]
    pairs &= (one != NOBODY)[None, :, :, None]
    return jnp.sum(pairs, axis=(1, 2, 3))
