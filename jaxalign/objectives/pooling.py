"""From the tokens of a row to one vector: weights that sum to 1 over the tokens that count.

weights = pooling_weights(mask, 'mean')                           # [B, T]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp


def _rest(mask: jax.Array) -> jax.Array:
    """All but the first token, which many LLMs use as an attention sink of enormous norm (Sun et
    al. 2024, arXiv 2402.17762), though a single token still counts."""
    alone = jnp.sum(mask, axis=-1, keepdims=True) == 1
    return mask * ((jnp.cumsum(mask, axis=-1) > 1) | alone)


def _first(mask: jax.Array) -> jax.Array:
    """Degenerate where every row starts with the same BOS: its causal state sees nothing else."""
    return mask * (jnp.cumsum(mask, axis=-1) == 1)


def _last(mask: jax.Array) -> jax.Array:
    left = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]  # real tokens from here to the end
    return mask * (left == 1)


def _position(mask: jax.Array) -> jax.Array:
    """Later tokens weigh more."""
    return mask * jnp.cumsum(mask, axis=-1)


# Name -> weights [..., T] up to a factor, of mask [..., T] float32: 1 at real tokens.
Pooling = Literal["mean", "mean_rest", "first", "last", "position"]  # of an objective's option
POOLINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "mean": lambda mask: mask,
    "mean_rest": _rest,
    "first": _first,
    "last": _last,
    "position": _position,
}


def pooling_weights(mask: jax.Array, pooling: str) -> jax.Array:
    """Weights [..., T] float32 that sum to 1 over the tokens of each row that count.

    Args:
      mask: [..., T], 1 for real tokens.
      pooling: mean; mean_rest: all but the first token; first; last; position: later tokens weigh
        more.
    """
    mask = POOLINGS[pooling](mask.astype(jnp.float32))
    return mask / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
