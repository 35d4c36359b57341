"""Attention behind one signature: who sees whom, and how it is computed.

A query sees the keys of its own segment up to its own place. Rows that are only padded on the
right need no segments: no real token ever looks right, so causality alone is exact.

    mask = causal(T, segments)                     # [B or 1, T, T] bool
    y = attend(q, k, v, mask, backend='auto')      # [B, T, N, H]
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxalign.sharding import Array


def causal(length: int, segments: Array | None = None) -> jax.Array:
    """Which key each query sees, [B or 1, T, T] bool.

    Args:
      length: T.
      segments: [B, T] int, 0 for padding; None where rows hold one text and right padding.
    """
    place = jnp.arange(length)
    before = (place[:, None] >= place[None, :])[None]  # [1, T, T]
    if segments is None:
        return before
    return before & (segments[:, :, None] == segments[:, None, :])


def attend(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    mask: jax.Array,  # [B or 1, T, S] bool
    backend: str = "auto",
) -> jax.Array:  # [B, T, N, H]
    """Softmax attention with grouped heads, scaled by 1/sqrt(H); softmax in float32."""
    return BACKENDS[backend](q, k, v, mask)


# The backward pass computes the [T, S] scores again instead of keeping them for every layer.
@partial(jax.checkpoint, prevent_cse=False)
def _reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    # Heads are moved in front here, where arrays are [.., H] wide; the [T, S] scores never move.
    q = q.reshape(batch, length, groups, -1, width) * width**-0.5
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, width)  # [B, K, G·T, H]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, S, H]
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, -1, length, k.shape[2])  # [B, K, G, T, S]
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, groups, -1, k.shape[2])  # [B, K, G·T, S]
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v)
    out = out.reshape(batch, groups, -1, length, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, width)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


BACKENDS = {"auto": _reference, "reference": _reference, "xla": _xla}
