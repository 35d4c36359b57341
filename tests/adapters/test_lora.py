"""What the words of a configuration make of an adapter, and its first weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.adapters.ranks import parse_layers
from jaxalign.errors import UserError
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec.tensors import TARGETS
from tests.hf.conftest import LLAMA, random_params

WIDE = dataclasses.replace(LLAMA, dim=64, ffn=96)


def refusal(**words) -> str:
    with pytest.raises(UserError) as error:
        Lora.parse(LLAMA, **words)
    assert "\n" not in str(error.value)
    return str(error.value)


def shapes(adapter: Lora, spec=LLAMA) -> dict:
    """The adapter's tree, without its numbers."""
    return jax.eval_shape(lambda key: adapter.init(spec, key), jax.random.key(0))


def leaves(tree) -> dict[str, jax.Array]:
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# --- words --------------------------------------------------------------------------------------


def test_parse():
    adapter = Lora.parse(
        LLAMA, r=4, alpha=8, dropout=0.1, targets=["v", "q"], layers="2..3", scaling="standard"
    )
    assert adapter == Lora(4, 8.0, 0.1, ("q", "v"), (2, 3), rank_stabilised=False)
    assert isinstance(adapter.alpha, float)
    assert Lora.parse(LLAMA).targets == ("q", "k", "v", "o", "gate", "up", "down")


def test_pefts_names_are_understood():
    assert Lora.parse(LLAMA, targets=["down_proj", "q_proj"]).targets == ("q", "down")


def test_targets_that_match_nothing():
    assert refusal(targets=["q", "query", "c_attn"]) == (
        "lora.targets: query, c_attn matches no projection of this model; choose among "
        "q, k, v, o, gate, up, down"
    )
    assert "the empty list matches no projection" in refusal(targets=[])


@pytest.mark.parametrize("r", [0, -8])
def test_ranks_below_one(r):
    assert refusal(r=r) == f"lora.r: {r} is not a rank; use 1 or more (the paper's is 8)"


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", ()),
        ("3", (3,)),
        ("1..4", (1, 2, 3, 4)),
        ("3,5", (3, 5)),
        ("8, 1..2, 2", (1, 2, 8)),
        ("8..8", (8,)),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text, 8) == layers


def test_every_layer_named_is_every_layer():
    # One spelling of the same thing: no mask is made, and PEFT's layers_to_transform is null.
    assert parse_layers("1..8", 8) == ()
    assert Lora.parse(LLAMA, layers="1,2,3") == Lora.parse(LLAMA)


@pytest.mark.parametrize("text", ["middle", "1-4", "1..", "..4", "1,,2", "", "1.5", "1...4"])
def test_layers_that_cannot_be_read(text):
    assert refusal(layers=text) == (f"lora.layers: cannot read {text!r}; write all, 1..16 or 3,5,8")


@pytest.mark.parametrize(
    ("text", "block"),
    [("0", "0"), ("4", "4"), ("1..9", "4"), ("-1", "-1"), ("3..1", "none"), ("2..1,3", "none")],
)
def test_layers_past_the_model(text, block):
    assert refusal(layers=text) == (
        f"lora.layers: {text!r} names block {block}, but the model has blocks 1 to 3"
    )


def test_scale():
    assert Lora(r=8, alpha=16.0).scale == 2.0
    assert Lora(r=16, alpha=8.0, rank_stabilised=True).scale == 2.0
    assert Lora.parse(LLAMA, r=4, alpha=8, scaling="rank_stabilised").scale == 4.0


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [tuple(TARGETS), ("q", "v"), ("o",), ("down",)], ids="".join)
@pytest.mark.parametrize("spec", [LLAMA, WIDE], ids=["narrow", "wide"])
def test_count_is_what_is_there(spec, targets):
    adapter = Lora(r=4, targets=targets)
    lora = shapes(adapter, spec)
    assert adapter.count(spec) == sum(leaf.size for leaf in jax.tree.leaves(lora))
    assert {path.split("/")[2] for path in leaves(lora)} == set(targets)


def test_count_of_some_layers():
    whole, some = Lora(), Lora(layers=(1, 3))
    assert some.count(LLAMA) * 3 == whole.count(LLAMA) * 2
    trained = some.layer_mask(LLAMA)
    assert some.count(LLAMA) == sum(
        int(trained.sum()) * math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(shapes(some))
    )


def test_the_papers_adapter():
    # r = 8 on all seven projections of Llama 3 8B, per block: 8 (in + out) of each.
    spec = dataclasses.replace(
        LLAMA, dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336
    )
    attention = 2 * (4096 + 4096) + 2 * (4096 + 1024)
    mlp = 3 * (4096 + 14336)
    assert Lora(r=8).count(spec) == 32 * 8 * (attention + mlp) == 20_971_520


def test_mask():
    assert Lora().layer_mask(LLAMA) is None
    np.testing.assert_array_equal(Lora(layers=(1, 3)).layer_mask(LLAMA), [1.0, 0.0, 1.0])


def test_shapes():
    lora = shapes(Lora(r=5))
    assert {path: leaf.shape for path, leaf in leaves(lora).items()} == {
        "blocks/attention/q/a": (3, 32, 5),
        "blocks/attention/q/b": (3, 5, 4, 8),
        "blocks/attention/k/a": (3, 32, 5),
        "blocks/attention/k/b": (3, 5, 2, 8),
        "blocks/attention/v/a": (3, 32, 5),
        "blocks/attention/v/b": (3, 5, 2, 8),
        "blocks/attention/o/a": (3, 4, 8, 5),
        "blocks/attention/o/b": (3, 5, 32),
        "blocks/mlp/gate/a": (3, 32, 5),
        "blocks/mlp/gate/b": (3, 5, 48),
        "blocks/mlp/up/a": (3, 32, 5),
        "blocks/mlp/up/b": (3, 5, 48),
        "blocks/mlp/down/a": (3, 48, 5),
        "blocks/mlp/down/b": (3, 5, 32),
    }
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lora)} == {"float32"}


def test_first_weights():
    lora = leaves(Lora(r=64).init(LLAMA, jax.random.key(0)))
    seen = []
    for path, leaf in lora.items():
        if path.endswith("/b"):
            assert not leaf.any()
            continue
        bound = 1 / math.sqrt(math.prod(leaf.shape[1:-1]))  # fan-in: o's is N·H, not H
        assert float(jnp.abs(leaf).max()) <= bound
        assert float(jnp.abs(leaf).max()) > 0.99 * bound
        # A uniform distribution has variance bound^2 / 3.
        np.testing.assert_allclose(float(jnp.var(leaf)), bound**2 / 3, rtol=0.05)
        assert abs(float(jnp.mean(leaf))) < 0.05 * bound
        seen.append(np.asarray(leaf).ravel()[:100])
        seen.append(np.asarray(leaf[1]).ravel()[:100])
    assert len(np.unique(np.round(np.concatenate(seen), 7))) > 0.99 * 100 * len(seen)


def test_a_target_starts_alike_whatever_else_is_trained():
    both = Lora(targets=("q", "v")).init(LLAMA, jax.random.key(3))
    one = Lora(targets=("v",)).init(LLAMA, jax.random.key(3))
    np.testing.assert_array_equal(
        both["blocks"]["attention"]["v"]["a"], one["blocks"]["attention"]["v"]["a"]
    )
    other = Lora(targets=("v",)).init(LLAMA, jax.random.key(4))
    assert not np.array_equal(
        other["blocks"]["attention"]["v"]["a"], one["blocks"]["attention"]["v"]["a"]
    )


def test_step_zero_is_the_base():
    adapter = Lora()
    params = jax.tree.map(jnp.asarray, random_params(LLAMA))
    tokens = jnp.arange(12).reshape(2, 6)
    run = jax.jit(lambda lora: Decoder(LLAMA, adapter).forward(params, lora, tokens).hidden)
    base, lora = run(None), adapter.init(LLAMA, jax.random.key(1))
    np.testing.assert_array_equal(run(lora), base)
    moved = jax.tree.map(lambda leaf: leaf + 0.01, lora)
    assert float(jnp.abs(run(moved) - base).max()) > 1e-3


def test_merged_weights_answer_like_base_and_adapter():
    spec = dataclasses.replace(WIDE, qkv_bias=True)
    adapter = Lora(r=3, alpha=5.0, targets=("q", "o", "down"))
    params = Decoder(spec).init(jax.random.key(0))
    lora = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.3,
        adapter.init(spec, jax.random.key(1)),
    )
    tokens = jnp.arange(12).reshape(2, 6)
    beside = Decoder(spec, adapter).forward(params, lora, tokens).hidden
    merged = Decoder(spec).forward(adapter.merge(params, lora), None, tokens).hidden
    bare = Decoder(spec).forward(params, None, tokens).hidden
    np.testing.assert_allclose(merged, beside, atol=2e-5)
    assert np.abs(merged - bare).max() > 0.1
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(adapter.merge(half, lora))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
