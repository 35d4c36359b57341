"""DoRA: the length of every column of a weight is trained beside a LoRA that turns it.

`W' = m · (W + s A B) / ‖W + s A B‖`, lengths taken over the inputs of each output (Liu et al.
2024, eq. 5); the length below the line counts as a constant when gradients are taken (section
4.3), as in PEFT.

    m = lengths(kernel, inputs=1)                       # [L, out]: where m begins
    gain = gains(kernel, {'a': a, 'b': b, 'm': m}, scales, inputs=1)     # [L, out]: m / ‖...‖

Each pass forms W + s A B of every adapted projection once to measure it, one block at a time: a
second reading of the weights, 2 R · in · out operations and [in, out] float32 of passing memory,
whatever the number of tokens. With dropout the weights also meet the dropped input besides the
whole one, which doubles the base's products. What is trained or written grows by [L, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.model.quantised import Quantised, widen


def length(weight: jax.Array, inputs: int) -> jax.Array:
    """[out...]: the length of each column of a weight [in..., out...] with `inputs` input axes."""
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=tuple(range(inputs))))


def summed(kernel: jax.Array | Quantised, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
    """W + s A B in float32: kernel [in..., out...], a [in..., R], b [R, out...]."""
    rank = a.shape[-1]
    # Where a matrix unit rounds float32 factors to bfloat16 by default, ask it not to.
    update = jnp.matmul(a.reshape(-1, rank), b.reshape(rank, -1), precision="highest")
    return widen(kernel, jnp.float32) + scale * update.reshape(kernel.shape)


def turned(kernel: jax.Array, factors: Mapping[str, jax.Array], scale: Any, inputs: int) -> Any:
    """W' of one projection, float32; W itself where the scale is 0 (no adapter there)."""
    whole = summed(kernel, factors["a"], factors["b"], scale)
    gain = factors["m"] / _no_zero(length(whole, inputs))
    return jnp.where(scale == 0, whole, gain * whole)


def lengths(kernel: jax.Array | Quantised, inputs: int) -> jax.Array:
    """[L, out...] float32: the columns' lengths of a stack of weights, block by block."""
    return jax.lax.map(lambda weight: length(widen(weight, jnp.float32), inputs), kernel)


def norms(
    kernel: jax.Array | Quantised, factors: Mapping[str, jax.Array], scales: Any, inputs: int
) -> jax.Array:
    """[L', out...] float32: ‖W + s A B‖ of the first L' blocks, as many as the factors have."""
    a, b = (jax.lax.stop_gradient(factors[name]) for name in ("a", "b"))

    def one(block: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        index, a, b, scale = block
        # By index, so that some blocks of a long stack are measured without a copy of it.
        take = partial(jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False)
        weight = jax.tree.map(take, kernel)
        return length(summed(weight, a, b, scale), inputs)

    return jax.lax.map(one, (jnp.arange(a.shape[0]), a, b, jnp.asarray(scales)))


def gains(
    kernel: jax.Array | Quantised, factors: Mapping[str, jax.Array], scales: Any, inputs: int
) -> jax.Array:
    """[L', out...] float32: m / ‖W + s A B‖, and 1 where the scale is 0.

    `factors` may bring the lengths as `norm`: a generation measures once, not for every token.
    """
    norm = factors["norm"] if "norm" in factors else norms(kernel, factors, scales, inputs)
    adapted = jnp.asarray(scales != 0).reshape(-1, *(1,) * (norm.ndim - 1))
    return jnp.where(adapted, factors["m"] / _no_zero(norm), 1.0)


def _no_zero(norm: jax.Array) -> jax.Array:
    # A column of zeros has no direction: it stays zero, where PEFT's quotient would be NaN.
    return jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
