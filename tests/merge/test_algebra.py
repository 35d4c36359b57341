"""ΔW = Σ w s A B for adapters that differ in ranks, scales, targets and blocks."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalign.adapters.dora import Dora
from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.merge.algebra import combine, whole_updates
from jaxalign.merge.methods import METHODS, Recipe, Weighted
from jaxalign.model.decoder import Decoder
from tests.hf.conftest import LLAMA, TARGETS, assert_same_tree
from tests.merge.conftest import (
    KINDS,
    assert_same_updates,
    part,
    tree,
    update,
    updates,
    weighted_sum,
)

MIXED = ("plain", "stabilised", "upper")
RECIPES = [
    Recipe("delta"),
    Recipe("svd", rank=5),
    Recipe("magnitude", rank=6, density=0.4),
    Recipe("ties", rank=6, density=0.4),
    Recipe("dare", rank=6, density=0.5),
    Recipe("dare_ties", rank=6, density=0.5),
]


def refusal(parts, recipe) -> str:
    with pytest.raises(UserError) as error:
        combine(parts, LLAMA, recipe)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["delta", "task_arithmetic", "average"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_weight_one_is_itself(method, kind):
    alone = part(kind)
    merged = combine([alone], LLAMA, Recipe(method))
    assert merged.adapter == alone.adapter
    assert_same_tree(dict(alone.lora), merged.lora)
    assert merged.error == 0
    # What is absent does not change that.
    again = combine([part("equal", 0.0), alone], LLAMA, Recipe(method))
    assert_same_tree(dict(alone.lora), again.lora)


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.6, -0.4, 2.5), (0, 1.5, 1)], ids=str)
def test_delta_is_the_weighted_sum(weights):
    parts = [part(kind, weight) for kind, weight in zip(MIXED, weights, strict=True)]
    merged = combine(parts, LLAMA, Recipe("delta"))
    assert_same_updates(merged, weighted_sum(parts))
    assert merged.error == 0 and merged.lost == {}


def test_delta_is_a_plain_lora_of_scale_one():
    merged = combine([part(kind) for kind in MIXED], LLAMA, Recipe("delta")).adapter
    # v of block 3 has all three: 4 + 2 + 3 columns; the others are padded with zeros.
    assert merged == Lora(r=9, alpha=9.0, dropout=0.0, targets=TARGETS)
    assert merged.scale == 1 and not merged.parts
    two = combine([part("stabilised"), part("upper")], LLAMA, Recipe("delta")).adapter
    assert two == Lora(5, 5.0, 0.0, ("q", "v", "up", "down"))
    few = Weighted(
        tree(Lora(2, targets=("q",), layers=(2,)), 9), Lora(2, targets=("q",), layers=(2,))
    )
    more = dataclasses.replace(few, weight=0.5)
    assert combine([few, more], LLAMA, Recipe()).adapter == Lora(4, 4.0, 0.0, ("q",), (2,))


def test_ranks_and_alphas_of_single_modules():
    table = {("q", 1): (4, 8.0), ("q", 2): (2, 8.0), ("v", 1): (4, 1.0), ("v", 3): (1, 5.0)}
    adapter = Lora.of_table(table, LLAMA.layers)
    lora = tree(Lora(4, targets=("q", "v")), 7)
    for target in ("q", "v"):
        for block in (1, 2, 3):
            rank = table.get((target, block), (0, 0))[0]
            leaves = lora["blocks"]["attention"][target]
            leaves["a"][block - 1, ..., rank:] = 0
            leaves["b"][block - 1, rank:] = 0
    parts = [Weighted(lora, adapter, 0.5, "uneven"), part("upper", 2.0)]
    merged = combine(parts, LLAMA, Recipe("delta"))
    assert merged.adapter.r == 4  # q of block 1; v of block 3 has 1 + 3
    assert_same_updates(merged, weighted_sum(parts))


def test_logits_are_those_of_both_adapters_side_by_side():
    """The merged adapter beside the base against W + Σ w s A B formed in float64."""
    parts = [part(kind, weight) for kind, weight in zip(MIXED, (0.7, 1.0, -0.3), strict=True)]
    params = jax.tree.map(np.asarray, Decoder(LLAMA).init(jax.random.key(0)))
    merged = combine(parts, LLAMA, Recipe("delta"))
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab, (2, 12))

    def logits(decoder, weights, lora):
        hidden = decoder.forward(weights, lora, tokens).hidden
        return np.asarray(decoder.logits(weights, hidden))

    whole = jax.tree.map(np.array, params)
    for (target, block), delta in weighted_sum(parts).items():
        site = "attention" if target in "qkvo" else "mlp"
        kernel = whole["blocks"][site][target]["kernel"][block - 1]
        kernel += delta.reshape(kernel.shape).astype(np.float32)
    ours = logits(Decoder(LLAMA, merged.adapter), params, merged.lora)
    theirs = logits(Decoder(LLAMA), whole, None)
    bare = logits(Decoder(LLAMA), params, None)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - bare).max() > 1e-2


# --- nearly -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_svd_leaves_out_the_smallest_singular_values(rank):
    parts = [part("plain", 0.6), part("upper", -0.4)]
    merged = combine(parts, LLAMA, Recipe("svd", rank=rank))
    assert merged.adapter.r == rank and merged.adapter.scale == 1
    lost = whole = 0.0
    for cell, delta in weighted_sum(parts).items():
        u, s, vt = np.linalg.svd(delta)
        cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
        ours = update(merged.lora, merged.adapter, *cell)
        np.testing.assert_allclose(ours, cut, atol=1e-6 * s[0])
        target, block = cell
        expected = np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2))
        assert merged.errors(target)[block] == pytest.approx(expected, abs=1e-9)
        lost, whole = lost + np.sum(s[rank:] ** 2), whole + np.sum(s**2)
    assert merged.error == pytest.approx(np.sqrt(lost / whole), abs=1e-9)
    assert (merged.error < 1e-7) == (rank == 7)


def test_svd_without_a_rank_takes_the_largest():
    merged = combine([part("plain"), part("upper")], LLAMA, Recipe("svd"))
    assert merged.adapter.r == 4


def test_average_is_of_the_factors():
    parts = [part("plain", 0.7), part("equal", 0.3)]
    merged = combine(parts, LLAMA, Recipe("average"))
    for (target, block), ours in updates(merged.lora, merged.adapter).items():
        a, b = ([one.lora["blocks"]["attention" if target in "qkvo" else "mlp"][target][side]
                 [block - 1].astype(np.float64) for one in parts] for side in "ab")  # fmt: skip
        mean_a = 0.7 * a[0] + 0.3 * a[1]
        mean_b = 0.7 * 2.0 * b[0] + 0.3 * 1.0 * b[1]  # their scales
        expected = mean_a.reshape(-1, 4) @ mean_b.reshape(4, -1)
        np.testing.assert_allclose(ours, expected, atol=1e-6)
        # ... and so it is not the average of the updates.
        both = 0.7 * update(parts[0].lora, parts[0].adapter, target, block)
        both = both + 0.3 * update(parts[1].lora, parts[1].adapter, target, block)
        assert np.linalg.norm(ours - both) > 0.3 * np.linalg.norm(both)


@pytest.mark.parametrize("method", ["magnitude", "dare"])
def test_keeping_everything_is_the_sum(method):
    parts = [part("plain", 0.6), part("upper", -0.4)]
    merged = combine(parts, LLAMA, Recipe(method, rank=7, density=1.0))
    assert_same_updates(merged, weighted_sum(parts), rtol=1e-5)
    assert merged.error < 1e-6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_order_does_not_matter(recipe):
    parts = [part(kind, weight) for kind, weight in zip(MIXED, (0.6, -0.4, 1.1), strict=True)]
    one = combine(parts, LLAMA, recipe)
    other = combine(parts[::-1], LLAMA, recipe)
    assert one.adapter == other.adapter
    assert_same_updates(other, updates(one.lora, one.adapter), rtol=1e-5)
    assert one.error == pytest.approx(other.error, abs=1e-6)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_weight_zero_is_absence(recipe):
    one = combine([part("plain", 0.5), part("equal", 0.0)], LLAMA, recipe)
    other = combine([part("plain", 0.5)], LLAMA, dataclasses.replace(recipe, rank=one.adapter.r)
                    if recipe.rank and recipe.method == "svd" else recipe)  # fmt: skip
    assert_same_tree(other.lora, one.lora)


@pytest.mark.parametrize("recipe", RECIPES[2:], ids=lambda recipe: recipe.method)
def test_the_error_told_is_the_error_made(recipe):
    parts = [part("plain", 0.6), part("upper", 1.4)]
    merged = combine(parts, LLAMA, recipe)
    lost = whole = 0.0
    for cell, make in whole_updates(parts, LLAMA, dataclasses.replace(recipe, rank=None)).items():
        exact = make().astype(np.float64)
        difference = exact - update(merged.lora, merged.adapter, *cell)
        lost, whole = lost + np.sum(difference**2), whole + np.sum(exact**2)
    assert 0.1 < merged.error < 1
    assert merged.error == pytest.approx(np.sqrt(lost / whole), rel=1e-5)


def test_dice_follow_the_seed():
    parts = [part("plain"), part("upper")]
    one, same, other = (
        combine(parts, LLAMA, Recipe("dare", rank=6, density=0.5, seed=seed)) for seed in (1, 1, 2)
    )
    assert_same_tree(one.lora, same.lora)
    assert_changed(one, other)


def assert_changed(one, other):
    """Another update somewhere."""
    theirs = updates(other.lora, other.adapter)
    assert any(
        np.abs(ours - theirs[cell]).max() > 1e-3
        for cell, ours in updates(one.lora, one.adapter).items()
    )


# --- refused ------------------------------------------------------------------------------------

DORA = Weighted({}, Dora(), 0.5, "runs/dora")
BOTH = [part("plain", 0.5), part("upper", 0.5)]


@pytest.mark.parametrize(
    ("parts", "recipe", "message"),
    [
        (BOTH, Recipe("slerp"), "--method: 'slerp'"),
        (BOTH, Recipe("delta", rank=4), "--rank: delta has no use for it; it is read by svd, mag"),
        (BOTH, Recipe("svd", density=0.5), "--density: svd has no use for it; it is read by mag"),
        (BOTH, Recipe("ties"), "--density is missing"),
        (BOTH, Recipe("dare", density=0.0), "--density: 0.0 "),
        (BOTH, Recipe("dare", density=1.1), "--density: 1.1 "),
        (BOTH, Recipe("ties", density=float("nan")), "--density: nan "),
        (BOTH, Recipe("svd", rank=0), "--rank: 0 "),
        (BOTH, Recipe("svd", rank=8), "--rank: 8 is more than there is; the exact sum has rank 7 "
         "already (--method delta)"),
        (BOTH, Recipe("ties", 33, 0.5), "--rank: 33 is more than there is; no module of this base "
         "has more than 32"),
        (BOTH, Recipe("average"), "--method average needs equal ranks, but in q_proj of block 1 "
         "there is plain 4, upper nothing"),
        ([part("plain", 0.0)], Recipe(), "--weights: all are 0"),
        ([part("plain", float("nan"))], Recipe(), "--weights: nan for plain"),
        ([part("plain", float("inf"))], Recipe(), "--weights: inf for plain"),
        ([part("plain"), DORA], Recipe(), "runs/dora: a DoRA adapter rescales the columns of base"),
        ([DORA], Recipe(), "jaxalign merge runs/dora --into-base MODEL --out DIR"),
        ([dataclasses.replace(DORA, weight=1)], Recipe("svd"), "runs/dora: a DoRA adapter"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_followed(parts, recipe, message):
    assert message in refusal(parts, recipe)


def test_one_dora_adapter_is_itself():
    alone = dataclasses.replace(DORA, weight=1.0)
    merged = combine([alone, part("plain", 0.0)], LLAMA, Recipe("delta"))
    assert merged.adapter == alone.adapter


# --- layers swapped -----------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "transition"), [("1", 0), ("1", 1), ("1,3", 0), ("3", 2)])
def test_swapped_layers_come_from_the_second_adapter(blocks, transition):
    task, language = part("plain"), part("equal", 0.5)
    merged = combine(
        [task, language], LLAMA, Recipe("layer_swap", None, None, 1, blocks, transition)
    )
    ours, first, second = (updates(one.lora, one.adapter) for one in (merged, task, language))
    by_hand = {
        ("1", 0): lambda a, b: (b, a, a),
        ("1", 1): lambda a, b: (b, (a + b) / 2, a),
        ("1,3", 0): lambda a, b: (b, a, b),
        ("3", 2): lambda a, b: ((a + b) / 2, (a + b) / 2, b),
    }[blocks, transition]
    for target, block in first:
        wanted = by_hand(first[target, block], 0.5 * second[target, block])[block - 1]
        np.testing.assert_allclose(ours[target, block], wanted, atol=1e-6)
    # A block of one adapter alone has its rank, the others' are padded.
    assert merged.adapter.r == (8 if transition else 4) and merged.error == 0


def test_blocks_that_nobody_is_left_with_are_gone():
    upper = part("upper")  # blocks 2 and 3 of v and up
    merged = combine([upper, part("equal", 0.0)], LLAMA, Recipe("layer_swap", blocks="3"))
    assert set(updates(merged.lora, merged.adapter)) == {("v", 2), ("up", 2)}


@pytest.mark.parametrize(
    ("parts", "recipe", "message"),
    [
        ([part("plain")], {"blocks": "1"}, "the task's and the language's, not 1"),
        (BOTH, {}, "--blocks is missing"),
        (BOTH, {"blocks": "4"}, "--blocks: '4' names block 4, but the model has blocks 1 to 3"),
        (BOTH, {"blocks": "one"}, "--blocks: cannot read 'one'"),
        (BOTH, {"blocks": "1..3"}, "--blocks: all blocks come from the second adapter"),
        ([part("upper"), part("equal", 0.0)], {"blocks": "2,3"}, "no adapter changes a block"),
        (BOTH, {"method": "delta", "blocks": "1"}, "--blocks: delta has no use for it"),
    ],
)  # fmt: skip
def test_swaps_that_cannot_be_made(parts, recipe, message):
    assert message in refusal(parts, Recipe(**{"method": "layer_swap"} | recipe))


def test_every_method_says_what_it_is():
    assert all(method.says for method in METHODS.values())
