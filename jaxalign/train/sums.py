"""Sums of a state's arrays: what a checkpoint was saved with, compared when it is read again.

Every element's bits go through a bijection that depends on the element's place, and the results are
added modulo 2^32, in two lanes with different bijections. One changed element always changes both
sums; several go unnoticed once in 2^64. A sum does not depend on order, so any mesh and any number
of processes give the same value, and nothing leaves the devices but the sums.

    array_sums({'a': array})      # {'a': 'float32[3,4]:8f1c29e0a45b7d31'}
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.sharding import path_name

# Odd factors, so that a multiplication is a bijection of 32 bits; those of the lanes differ. Shifts
# and factors mix bits as the finaliser of MurmurHash3 does (Appleby 2011).
PLACES = (0x9E3779B1, 0x85EBCA77)
FACTORS = ((0x7FEB352D, 0x846CA68B), (0xC2B2AE3D, 0x27D4EB2F))


def array_sums(tree: Any) -> dict[str, str]:
    """Dtype, shape and sum of each leaf of a tree, by its path; every process calls it.

    Args:
      tree: arrays, on a mesh or not, or NumPy's.
    """
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    sums = jax.device_get([_sum(leaf) for _, leaf in leaves])  # all are under way at once
    return {
        name: f"{kind_of(leaf)}:{int(found[0]):08x}{int(found[1]):08x}"
        for (name, leaf), found in zip(leaves, sums, strict=True)
    }


def host_sum(array: np.ndarray) -> str:
    """Dtype, shape and sum of one array in this host's memory."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return array_sums(array)[""]


def kind_of(leaf: Any) -> str:
    """`float32[3,4]` of an array or a `jax.ShapeDtypeStruct`."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


@jax.jit
def _sum(leaf: jax.Array) -> jax.Array:
    """[2] uint32."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
    places, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        places = places + along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.stack([jnp.sum(_mixed(words, places, n), dtype=jnp.uint32) for n in (0, 1)])


def _mixed(words: jax.Array, places: jax.Array, lane: int) -> jax.Array:
    """A bijection of the words for each place."""
    first, second = (jnp.uint32(factor) for factor in FACTORS[lane])
    x = words ^ (places * jnp.uint32(PLACES[lane]) + first)
    x = (x ^ (x >> 16)) * first
    x = (x ^ (x >> 15)) * second
    return x ^ (x >> 16)
