"""Masks: the numbers of a written-out hash, even and independent, the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.adapters.dropout import drop, random_bits
from jaxalign.sharding import make_mesh

SHAPE = (32, 64, 1024)


def lowbias(bits):
    """In Python's own integers, one number."""
    bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32
    bits = (bits ^ bits >> 15) * 0x846CA68B % 2**32
    return bits ^ bits >> 16


def test_the_hash_of_each_place():
    key = jax.random.key(5)
    first, second = (int(number) for number in jax.random.bits(key, (2,), jnp.uint32))
    found = np.asarray(random_bits(key, (3, 5, 7)))
    assert found.dtype == np.uint32
    for place, number in enumerate(found.ravel().tolist()):
        assert number == lowbias((lowbias(place ^ first) + second) % 2**32)


def test_masks_are_even_and_independent():
    keys = jax.random.split(jax.random.key(0), 3)
    kept = np.stack([np.asarray(random_bits(key, SHAPE)) < 0.1 * 2**32 for key in keys])
    wrong = 0.3 / np.sqrt(kept[0].size)  # one standard deviation of a mean of these
    assert abs(kept.mean((1, 2, 3)) - 0.1).max() < 4 * wrong
    for axes in ((1, 2), (0, 2), (0, 1)):  # of rows, tokens, columns
        means = kept[0].mean(axes)
        expected = 0.3 / np.sqrt(kept[0].size / means.size)
        assert 0.8 < means.std() / expected < 1.25
        assert abs(means - 0.1).max() < 6 * expected
    mask = kept - 0.1
    pairs = [(mask[0], mask[1]), (mask[1], mask[2])]
    for axis in range(3):  # neighbours, and places a power of two apart
        for apart in (1, 2, 16):
            first = np.take(mask[0], range(SHAPE[axis] - apart), axis)
            pairs.append((first, np.take(mask[0], range(apart, SHAPE[axis]), axis)))
    for one, other in pairs:
        assert abs((one * other).mean()) < 5 * 0.09 / np.sqrt(one.size)


@pytest.mark.parametrize("spec", [P("data"), P(None, ("fsdp", "seq")), P("fsdp", None, "tensor")])
def test_every_mesh_has_the_same_masks(spec):
    key, shape = jax.random.key(1), (8, 16, 32)
    where = NamedSharding(make_mesh(2, 2, 2, 1), spec)
    found = jax.jit(lambda: random_bits(key, shape), out_shardings=where)()
    np.testing.assert_array_equal(found, random_bits(key, shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rate", [1e-12, 0.1, 0.5, 0.999])
def test_dropout_keeps_the_mean(dtype, rate):
    x = jax.random.uniform(jax.random.key(2), SHAPE, jnp.float32, 1.0, 2.0).astype(dtype)
    found = drop(x, rate, jax.random.key(3))
    assert found.dtype == dtype
    kept = np.asarray(found != 0)
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate / kept.size)
    x, found = np.float64(np.asarray(x)[kept]), np.float64(np.asarray(found)[kept])
    assert found.mean() / x.mean() == pytest.approx(1 / (1 - rate), rel=2e-4)
    assert drop(x, rate, None) is x  # without a key, as in validation
