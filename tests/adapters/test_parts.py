"""Adapters whose projections differ: what they are, and that nothing grows beyond its rank."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.adapters import Lora, parse
from jaxalign.adapters.ranks import Part
from jaxalign.errors import UserError
from jaxalign.model.decoder import Decoder
from tests.adapters.variants import LAYERS, MIXED, UNEVEN, VARIANTS, random_tree
from tests.hf.conftest import LLAMA

TOKENS = jnp.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def params():
    # Weights large enough that an adapter's update is neither all nor nothing beside them.
    return jax.tree.map(lambda w: w * 5, Decoder(LLAMA).init(jax.random.key(0)))


@partial(jax.jit, static_argnums=0)
def hidden(adapter, params, lora):
    return Decoder(LLAMA, adapter).forward(params, lora, TOKENS).hidden


# --- what they are ------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [MIXED, UNEVEN], ids=["mixed", "uneven"])
def test_a_table_comes_back(table):
    adapter = Lora.of_table(table, LAYERS)
    assert adapter.table(LAYERS) == table
    assert adapter.r == max(rank for rank, _ in table.values())
    assert Lora.of_table(adapter.table(LAYERS), LAYERS) == adapter
    assert hash(adapter) == hash(Lora.of_table(dict(reversed(table.items())), LAYERS))


def test_ranks_and_scales():
    adapter = VARIANTS["patterns"]
    assert (adapter.r, adapter.alpha) == (6, 8.0)
    assert [adapter.rank_of("o", block) for block in (1, 2, 3)] == [1, 2, 3]
    assert [adapter.scale_of("down", block) for block in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert adapter.rank_of("k", 1) == 0 and adapter.scale_of("k", 1) == 0.0
    stabilised = VARIANTS["patterns_rslora"]
    assert stabilised.scale_of("o", 2) == pytest.approx(8 / 2**0.5)
    uneven = VARIANTS["uneven"]
    assert [uneven.rank_of("q", block) for block in (1, 2, 3)] == [4, 4, 0]
    assert uneven.scale_of("gate", 1) == 0.0 and uneven.scale_of("gate", 2) == 8 / 3
    assert Part("q", 3, 0, 0.0) in uneven.parts
    np.testing.assert_array_equal(uneven.scales("gate", 3), np.float32([0, 8 / 3, 0]))


def test_a_subset_of_layers():
    adapter = VARIANTS["layers"]
    assert adapter.layers == (1, 3) and not adapter.parts
    assert [adapter.rank_of("q", block) for block in (1, 2, 3)] == [4, 0, 4]


def test_equal_parts_are_no_parts():
    assert VARIANTS["lora"] == Lora(4, 8.0, 0.1)
    assert (
        VARIANTS["lora"].even and VARIANTS["same_scale"].even and VARIANTS["uneven"].even is False
    )
    assert not VARIANTS["patterns"].even


def test_words():
    adapter = parse(LLAMA, "dora", r=4, alpha=8, ranks={"down_proj": 6, "q": 2}, alphas={"q": 4})
    assert adapter.dora and adapter.r == 6
    assert [adapter.rank_of(t, 2) for t in ("q", "k", "down")] == [2, 4, 6]
    assert [adapter.scale_of(t, 2) for t in ("q", "k", "down")] == [2.0, 2.0, 8 / 6]
    assert Lora.parse(LLAMA, ranks={}) == Lora.parse(LLAMA)


def test_words_that_say_nothing():
    with pytest.raises(UserError, match=r"lora\.ranks: down is not trained; choose among lora\.ta"):
        Lora.parse(LLAMA, targets=["q", "v"], ranks={"down": 4})
    with pytest.raises(UserError, match=r"lora\.ranks\.q: 0 is not a rank"):
        Lora.parse(LLAMA, ranks={"q": 0})


@pytest.mark.parametrize("name", ["lora", "patterns", "uneven", "dora_layers", "dora_uneven"])
def test_fresh_factors_keep_to_their_ranks(name, params):
    adapter = dataclasses.replace(VARIANTS[name], layers=())
    lora = jax.device_get(adapter.init(LLAMA, jax.random.key(0), params))
    even = jax.device_get(Lora(adapter.r).init(LLAMA, jax.random.key(0)))
    counted = 0
    for part, sites in lora["blocks"].items():
        for target, factors in sites.items():
            for block in range(LAYERS):
                a, rank = factors["a"][block], adapter.rank_of(target, block + 1)
                assert not a[..., rank:].any() and not np.signbit(a[..., rank:]).any()
                wide = even["blocks"][part][target]["a"][block]
                np.testing.assert_array_equal(a[..., :rank], wide[..., :rank])
                own = a[..., :rank].size + factors["b"][block][:rank].size
                counted += own + (factors["m"][block].size if adapter.dora and rank else 0)
    assert adapter.count(LLAMA) == counted
    bare = hidden(None, params, None)
    # DoRA's m / |W| is 1 up to an ulp in each projection; how it is summed is up to the compiler.
    ulps = len(lora["blocks"]["attention"] | lora["blocks"]["mlp"]) * LAYERS if adapter.dora else 5
    atol = ulps * np.finfo(np.float32).eps * np.abs(bare).max()
    np.testing.assert_allclose(hidden(adapter, params, lora), bare, atol=atol, rtol=0)


# --- what they do -------------------------------------------------------------------------------


def test_an_even_adapter_runs_as_factors_alone(params):
    """The same tree, hence the same program, as before projections could differ."""
    for name in ("lora", "rslora", "layers", "same_scale"):
        adapter = VARIANTS[name]
        lora = random_tree(adapter, LLAMA)
        assert adapter.per_block(params, lora) is lora["blocks"]
        assert adapter.settle(params, lora) is lora

    def program(adapter):
        lora = random_tree(VARIANTS["lora"], LLAMA)
        return str(jax.make_jaxpr(lambda lora: hidden(adapter, params, lora))(lora))

    one, two = program(Lora(4, 8.0)), program(Lora.of_table(VARIANTS["lora"].table(3), 3))
    assert one == two
    # A number for all: the only thing that may differ when alpha does.
    assert len(program(Lora(4, 4.0)).splitlines()) == len(one.splitlines())


@pytest.mark.parametrize("name", VARIANTS)
def test_merged_weights_answer_like_base_and_adapter(name, params):
    adapter = VARIANTS[name]
    lora = random_tree(adapter, LLAMA, size=0.05)
    beside = hidden(adapter, params, lora)
    merged = hidden(None, adapter.merge(params, lora), None)
    bare = hidden(None, params, None)
    scale = float(np.abs(beside).max())
    np.testing.assert_allclose(merged, beside, atol=2e-5 * scale, rtol=0)
    assert np.abs(beside - bare).max() > 0.05
    settled = hidden(adapter, params, adapter.settle(params, lora))
    np.testing.assert_allclose(settled, beside, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_without_adapter_are_the_bases(name, params):
    """A block's output depends on its own projections only where they are adapted."""
    adapter = VARIANTS[name]
    lora = random_tree(adapter, LLAMA)
    merged, params = jax.device_get((adapter.merge(params, lora), params))
    for part in ("attention", "mlp"):
        for target, site in params["blocks"][part].items():
            for block in range(LAYERS):
                same = np.array_equal(
                    merged["blocks"][part][target]["kernel"][block], site["kernel"][block]
                )
                assert same == (adapter.rank_of(target, block + 1) == 0), (target, block)


@pytest.mark.parametrize("name", ["patterns", "dora_uneven"])
def test_nothing_grows_beyond_its_rank(name, params):
    adapter = VARIANTS[name]
    lora = jax.tree.map(jnp.asarray, random_tree(adapter, LLAMA))

    def loss(lora):
        return jnp.mean(jnp.sin(hidden(adapter, params, lora)))

    optimiser = optax.adamw(0.1, weight_decay=0.1)

    @jax.jit
    def step(lora):
        gradient = jax.grad(loss)(lora)
        updates, _ = optimiser.update(gradient, optimiser.init(lora), lora)
        return gradient, optax.apply_updates(lora, updates)

    seen = 0
    for tree in jax.device_get(step(lora)):
        for sites in tree["blocks"].values():
            for target, factors in sites.items():
                for block in range(LAYERS):
                    rank = adapter.rank_of(target, block + 1)
                    assert not factors["a"][block][..., rank:].any()
                    assert not factors["b"][block][rank:].any()
                    assert bool(factors["b"][block][:rank].any()) == (rank > 0)
                    if adapter.dora:
                        assert bool(factors["m"][block].any()) == (rank > 0)
                    seen += rank < adapter.r
    assert seen > 4
