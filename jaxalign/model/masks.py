"""Random numbers for masks: each a hash of its place and a key.

`jax.random` computes some hundred integer operations a number (Threefry, 20 rounds), which is more
than a mask needs and more than a TPU's compiler can weave into a product: by its estimate a task
micro-batch of Llama 3 8B took 143 ms on v5e where this hash takes 138, 125 ms on v6e where it takes
96, and there it compiled for a quarter of an hour instead of four minutes (docs/tpu.md). XLA's own
generator (`impl='rbg'`) does not help on a mesh: every device would draw the numbers of all.

    keep = random_bits(key, x.shape) < round(0.9 * 2**32)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
