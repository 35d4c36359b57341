"""Rotary positions (Su et al. 2021), halves rotated as in transformers.

Angles are products of a position and a frequency, in float32; long contexts stretch frequencies.

    cos, sin = rotary(spec, positions)          # each [B, T, H] float32
    q = rotate(q, cos, sin)                     # [B, T, N, H]
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxalign.model.spec import ModelSpec
from jaxalign.sharding import Array


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, T, heads, H] turned by the angles of cos and sin, each [B or 1, T, H]."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, T, 1, H]
    return (x * cos + turned * sin).astype(x.dtype)


def rotary(spec: ModelSpec, positions: Array, window: int = 0) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [B or 1, T, H] float32: in bf16 position 257 equals position 256.

    Args:
      positions: [B or 1, T] int.
      window: of the layer; layers with a window may rotate by a theta of their own.
    """
    inverse = _inverse_frequencies(spec, window)
    angles = positions[..., None].astype(jnp.float32) * inverse  # [B, T, H/2]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def _inverse_frequencies(spec: ModelSpec, window: int) -> jax.Array:
    theta, scaling = spec.rope(window)
    steps = jnp.arange(0, spec.head_dim, 2, dtype=jnp.float32) / spec.head_dim
    inverse = 1.0 / (theta**steps)  # [H/2]
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    # Llama 3.1: long wavelengths are stretched by the factor, short ones kept, in between blended.
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_position / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * inverse / scaling.factor + blend * inverse
