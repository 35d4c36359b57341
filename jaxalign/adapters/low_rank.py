"""Products with low-rank factors, for all adapted projections of one input at once.

for name, part in products(x, {'q': {'a': a, 'b': b}}, scale=2.0): ...     # s · x A B
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def products(
    x: jax.Array,  # [..., in...]
    own: Mapping[str, Mapping[str, jax.Array]],  # a [in..., R], b [R, out...]; scale where unequal
    scale: float,
) -> Iterator[tuple[str, jax.Array]]:
    """`s · x A B` of each projection, [tokens, out].

    The A factors run as one product over the concatenated ranks: at rank 8 a product alone would
    leave a matrix unit almost idle.
    """
    joined = [leaf["a"].reshape(-1, leaf["a"].shape[-1]) for leaf in own.values()]
    # Tokens are one axis: the factors' gradients, sums over tokens, then need no transposes.
    rows = x.reshape(-1, joined[0].shape[0])  # [B·T, in]
    # A goes in turned, so that its gradient is a product [ΣR, B·T] x [B·T, in]: on a CPU up to
    # eight times as fast as its transpose, to which XLA would return without the barrier.
    turned = jax.lax.optimization_barrier(jnp.concatenate(joined, axis=-1).T)  # [ΣR, in]
    # In float32: bfloat16 would round the scale itself, and each update by up to 0.2 %.
    low = (times(rows, turned, 1).astype(jnp.float32) * _scales(own, scale)).astype(x.dtype)
    start = 0
    for name, leaf in own.items():
        rank = leaf["b"].shape[0]
        wide = leaf["b"].reshape(rank, -1)  # [R, out]
        yield name, times(jax.lax.slice_in_dim(low, start, start + rank, axis=-1), wide, 0)
        start += rank


def times(x: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    """x [M, in] times a trained factor whose `axis` is `in`, in x's dtype: [M, out].

    A cast of the factor would be transposed into a cast of its gradient, which each device would
    round before the sum over devices: its sum over tokens stays as wide as the factor instead.
    """
    if factor.dtype == x.dtype:
        return jax.lax.dot_general(x, factor, (((1,), (axis,)), ((), ())))
    return _narrowed(x, factor, axis)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrowed(x: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(x, factor.astype(x.dtype), (((1,), (axis,)), ((), ())))


def _narrowed_forward(x: jax.Array, factor: jax.Array, axis: int) -> Any:
    return _narrowed(x, factor, axis), (x, factor)


def _narrowed_backward(axis: int, kept: Any, slope: jax.Array) -> Any:
    x, factor = kept
    by_x = jax.lax.dot_general(slope, factor.astype(x.dtype), (((1,), (1 - axis,)), ((), ())))
    left, right = (x, slope) if axis == 0 else (slope, x)
    over_tokens = (((0,), (0,)), ((), ()))
    wide = factor.dtype
    by_factor = jax.lax.dot_general(left, right, over_tokens, preferred_element_type=wide)
    return by_x, by_factor


_narrowed.defvjp(_narrowed_forward, _narrowed_backward)


def _scales(own: Mapping[str, Mapping[str, jax.Array]], scale: float) -> Any:
    """One number for all, or [ΣR] float32 where scales differ."""
    if any("scale" not in leaf for leaf in own.values()):
        return scale
    each = [jnp.full(leaf["b"].shape[0], leaf["scale"], jnp.float32) for leaf in own.values()]
    return jnp.concatenate(each)
