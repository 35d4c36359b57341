"""Dropout on an adapter's input, with masks that cost nothing compared with a product.

Each random number is a hash of its place and a key.

`jax.random` computes some hundred integer operations a number (Threefry, 20 rounds), which is more
than a mask needs and more than a TPU's compiler can weave into a product: by its estimate a task
micro-batch of Llama 3 8B took 143 ms on v5e where this hash takes 138, 125 ms on v6e where it takes
96, and there it compiled for a quarter of an hour instead of four minutes (docs/tpu.md). XLA's own
generator (`impl='rbg'`) does not help on a mesh: every device would draw the numbers of all.

    dropped = drop(x, 0.1, key)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with zeros at this rate and the rest scaled up; `x` itself where there is no key."""
    if rate == 0 or key is None:
        return x
    kept = min(round((1 - rate) * 2**32), 2**32 - 1)
    keep = random_bits(key, x.shape) < jnp.uint32(kept)
    # In float32: bfloat16 would round 1 / 0.9 itself, and every sum would be 0.2 % too small.
    scaled = x.astype(jnp.float32) * (2**32 / kept)
    return jnp.where(keep, scaled, 0).astype(x.dtype)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of this shape; the same on every mesh and platform.

    Good for masks, not for secrets: two rounds of `lowbias32` (Wellons 2018, hash-prospector) over
    the place, each with 32 bits of the key. Beyond 2**32 numbers they repeat.

    Args:
      key: of `jax.random`; numbers of different keys are independent.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place += along * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return _lowbias(_lowbias(place ^ first) + second)


def _lowbias(bits: jax.Array) -> jax.Array:
    bits = (bits ^ bits >> 16) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ bits >> 15) * jnp.uint32(0x846CA68B)
    return bits ^ bits >> 16
