"""What the backward pass keeps under each policy, and that none changes a gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.model.decoder import REMAT, Decoder
from tests.adapters.variants import random_tree
from tests.hf.conftest import LLAMA

ADAPTER = Lora(r=4, alpha=8.0)
ROWS, LENGTH = 3, 16
TOKENS = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % LLAMA.vocab
D, F = LLAMA.dim, LLAMA.ffn
PROJECTED = (LLAMA.heads + 2 * LLAMA.kv_heads) * LLAMA.head_dim
MIXED = LLAMA.heads * LLAMA.head_dim


@pytest.fixture(scope="module")
def weights():
    return Decoder(LLAMA).init(jax.random.key(0)), random_tree(ADAPTER, LLAMA)


def loss(remat, params):
    decoder = Decoder(LLAMA, ADAPTER, remat)
    return lambda lora: jnp.sin(decoder.forward(params, lora, TOKENS).hidden).mean()


def kept(remat, weights) -> int:
    """Numbers kept for each token of each block, beside what is there anyway."""
    params, lora = weights
    _, back = jax.vjp(loss(remat, params), lora)
    return numbers_in(back)


def numbers_in(back) -> int:
    stacks = [leaf.shape for leaf in jax.tree.leaves(back)]
    tokens = (LLAMA.layers, ROWS, LENGTH)
    return sum(int(np.prod(shape[3:])) for shape in stacks if shape[:3] == tokens)


def test_what_is_kept(weights):
    found = {remat: kept(remat, weights) for remat in REMAT}
    assert found["full"] == D  # what entered the block
    # queries, keys, values, the mix of attention, the residual after it; gate and up
    assert found["names"] == D + PROJECTED + MIXED + D + 2 * F
    assert found["offload"] == found["names"]  # in another memory
    assert found["full"] < found["dots"] < found["names"]


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_gradients_are_the_same(weights, remat):
    params, lora = weights
    expected = jax.jit(jax.grad(loss("none", params)))(lora)
    found = jax.jit(jax.grad(loss(remat, params)))(lora)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()))


@pytest.mark.parametrize(("remat", "runs"), [("names", 1), ("offload", 1), ("full", 2)])
def test_cudnn_runs_forward_once(monkeypatch, weights, remat, runs):
    """What the kernel gives is kept: it does not run again for the backward pass."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92400)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False, raising=False)
    params, lora = weights
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    decoder = Decoder(LLAMA, ADAPTER, remat, "cudnn")
    total = lambda lora: decoder.forward(params, lora, TOKENS).hidden.sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(total))(lora))
    assert program.count("dot_product_attention_bwd") > 0
    assert len(re.findall(r"= dot_product_attention_fwd\w*", program)) == runs
    # And kept once, not under a name of ours as well.
    back = jax.eval_shape(lambda lora: jax.vjp(total, lora)[1], lora)
    assert numbers_in(back) == (D if remat == "full" else D + PROJECTED + MIXED + D + 2 * F)
