"""MEXA: how many sentences and their English translations are each other's nearest neighbour.

scores = np.stack([mexa(states, pivot=0) for states in layers])      # [L, G]
over_layers(scores, "mean"), over_layers(scores, "max")              # [G]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.probe.retrieval import cosines, prefers
from jaxalign.probe.vectors import States, shape_of, unit_vectors


def mexa(states: States, pivot: int = 0) -> np.ndarray:
    """Share of sentences aligned with the pivot language, [G] float64; NaN for the pivot itself.

        mu = 1/n sum_i 1( c_ii > max_{j != i} { c_ij, c_ji } )

    with c the cosines between a language and the pivot (Kargaran et al. 2025, arXiv 2410.05873):
    strictly the largest in its row and in its column. The paper takes 100
    sentences and pools states by position-weighted mean (or takes the last token): that is the
    caller's affair. For every pair of languages at once: `retrieval(states, ("mexa",))`.

    Args:
      states: [G, N, D] of one layer.
      pivot: number of the pivot language (English).

    Raises:
      UserError: bad states, or no such language.
    """
    languages, number, _ = shape_of(states)
    if not 0 <= pivot < languages:
        raise UserError(f"pivot must be a language's number, 0..{languages - 1}, not {pivot}")
    vectors = unit_vectors(states)
    shares = np.full(languages, np.nan)
    for language in range(languages):
        if language != pivot:
            shares[language] = int(_mutual(vectors[language], vectors[pivot])) / number
    return shares


def over_layers(scores: np.ndarray, pooling: str) -> np.ndarray:
    """One number per language [G] from the scores of all layers [L, G].

    Args:
      scores: [L, G].
      pooling: mean (the paper's default) or max, over layers.

    Raises:
      UserError: another pooling, or no layer.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or not len(scores):
        raise UserError(f"scores must be [layers, languages], not shape {scores.shape}")
    if pooling not in ("mean", "max"):
        raise UserError(f"MEXA pools layers by mean or max, not {pooling!r}")
    return scores.mean(axis=0) if pooling == "mean" else scores.max(axis=0)


@jax.jit
def _mutual(x: jax.Array, y: jax.Array) -> jax.Array:
    cosine = cosines(x, y)
    own = jnp.eye(x.shape[0], dtype=bool)
    return jnp.sum(prefers(cosine, own, 1) & prefers(cosine, own, 0))
