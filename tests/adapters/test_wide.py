"""Gradients of factors are summed in the factors' own float32, though products are bfloat16's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.low_rank import products, times

TOKENS = 257  # bfloat16 has 256 and 258


@pytest.mark.parametrize("axis", [0, 1])
def test_a_sum_over_tokens_is_not_rounded(axis):
    x = jnp.ones((TOKENS, 3), jnp.bfloat16)
    factor = jnp.ones((3, 5) if axis == 0 else (5, 3), jnp.float32)
    total = lambda x, factor: jnp.sum(times(x, factor, axis).astype(jnp.float32))  # noqa: E731
    by_x, by_factor = jax.grad(total, argnums=(0, 1))(x, factor)
    assert (by_x.dtype, by_factor.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(by_factor, np.full(factor.shape, TOKENS))
    np.testing.assert_array_equal(by_x, np.full(x.shape, 5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_product_is_that_of_a_cast_factor(axis, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (6, 4), dtype)
    factor = jax.random.normal(keys[1], (4, 5) if axis == 0 else (5, 4))
    weights = jax.random.normal(keys[2], (6, 5))

    def cast(x, factor, axis):
        narrow = factor.astype(x.dtype)
        return x @ (narrow if axis == 0 else narrow.T)

    def evaluated(product):
        total = lambda x, f: jnp.sum(product(x, f, axis).astype(jnp.float32) * weights)  # noqa: E731
        return product(x, factor, axis), *jax.grad(total, argnums=(0, 1))(x, factor)

    ours, theirs = evaluated(times), evaluated(cast)
    np.testing.assert_array_equal(ours[0], theirs[0])
    near = {"rtol": 0.02, "atol": 0.02} if dtype == "bfloat16" else {"rtol": 1e-6, "atol": 1e-6}
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **near)


@pytest.mark.parametrize("unequal", [False, True])
def test_the_scale_is_not_rounded(unequal):
    """bfloat16 has no 2/3: every update would be 0.2 % too large."""
    x, a = (jax.random.normal(jax.random.key(n), (512, 512), jnp.bfloat16) for n in (1, 2))
    own = {"q": {"a": a, "b": jnp.eye(512, dtype=jnp.bfloat16)}}
    if unequal:
        own["q"]["scale"] = jnp.float32(2 / 3)
    ((_, scaled),) = products(x, own, 2 / 3)
    ((_, plain),) = products(x, {"q": {name: own["q"][name] for name in "ab"}}, 1.0)
    ratio = np.sum(np.abs(scaled), dtype=np.float64) / np.sum(np.abs(plain), dtype=np.float64)
    assert ratio == pytest.approx(2 / 3, rel=2e-4)
