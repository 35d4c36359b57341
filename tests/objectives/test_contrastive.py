"""The alignment loss against a transcription in plain loops, and what it must not see."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives import States, Tap, View
from jaxalign.objectives.contrastive import _digest, contrastive, similarities
from jaxalign.objectives.pooling import pooling_weights

LAYER, PAIRS, DIM, TAU = 3, 6, 5, 0.2


def vectors(seed: int, pairs: int = PAIRS) -> np.ndarray:
    """[2, B, D]: sources and targets of any length."""
    return np.random.default_rng(seed).standard_normal((2, pairs, DIM)).astype(np.float32)


class Masks(NamedTuple):
    """What the objective reads of a batch."""

    source_mask: np.ndarray
    target_mask: np.ndarray
    target: np.ndarray
    source: np.ndarray


def masks(real, empty: str = "both", texts=None, sources=None) -> Masks:
    """A batch whose pair i has tokens on both sides where real[i]; texts differ, or are these."""
    real = np.asarray(real)
    one = np.stack([real, np.zeros_like(real)], axis=1)  # [B, 2]: one token and one padding
    full = np.ones_like(one)
    sides = [np.arange(len(real)) if one is None else np.asarray(one) for one in (texts, sources)]
    return Masks(
        one if empty in ("both", "source") else full,
        one if empty in ("both", "target") else full,
        *(np.stack([side, np.zeros_like(side)], axis=1) for side in sides),
    )


def evaluate(both, batch=None, **options):
    """The Loss and the gradient [2, B, D] of its sum."""
    batch = batch or masks([1] * both.shape[1])
    options = {"layer": LAYER, "temperature": TAU} | options
    loss, gradient = compiled(both, batch, tuple(options.items()))
    return loss, np.asarray(gradient)


@partial(jax.jit, static_argnums=2)  # compiled once per shape and options
def compiled(both, batch, options):
    def total(both):
        views = (View(None, {Tap(LAYER): side}, {}) for side in both)
        states = States(dict(zip(("source", "target"), views, strict=True)))
        loss = contrastive(states, batch, **dict(options))
        return loss.sum, loss

    (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(both)
    return loss, gradient


# --- the transcription --------------------------------------------------------------------------


def cosine(a, b) -> float:
    norm = lambda x: max(math.sqrt(sum(v * v for v in x)), 1e-8)  # noqa: E731
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))


def one_way(anchors, candidates, real, groups) -> float:
    """Equation 1 of the paper, over the real pairs of every group."""
    total = 0.0
    for group in groups:
        for i in group:
            if real[i]:
                right = math.exp(cosine(anchors[i], candidates[i]) / TAU)
                everyone = sum(
                    math.exp(cosine(anchors[i], candidates[j]) / TAU) for j in group if real[j]
                )
                total -= math.log(right / everyone)
    return total


def reference(both, real, size: int, symmetric: bool) -> float:
    source, target = both
    groups = [range(i, i + size) for i in range(0, len(source), size)]
    forth = one_way(source, target, real, groups)
    return (forth + one_way(target, source, real, groups)) / 2 if symmetric else forth


def slope(function, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences in float64."""
    at = at.astype(np.float64)
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        moved = at.copy()
        moved[index] += step
        up = function(moved)
        moved[index] -= 2 * step
        found[index] = (up - function(moved)) / (2 * step)
    return found


@pytest.mark.parametrize("direction", ["one_way", "symmetric"])
@pytest.mark.parametrize(
    ("negatives", "group", "size"),
    [("group", 6, 6), ("group", 3, 3), ("group", 2, 2), ("global", 2, 6), ("group", 32, 6)],
)
@pytest.mark.parametrize("real", [(1, 1, 1, 1, 1, 1), (1, 0, 1, 1, 1, 0)], ids=["full", "padded"])
def test_value_and_gradient(direction, negatives, group, size, real):
    both = vectors(0)
    loss, gradient = evaluate(
        both, masks(real), direction=direction, negatives=negatives, group=group
    )
    expected = lambda both: reference(both, real, size, direction == "symmetric")  # noqa: E731
    np.testing.assert_allclose(loss.sum, expected(both), rtol=1e-5)
    np.testing.assert_allclose(gradient, slope(expected, both), rtol=1e-4, atol=1e-5)
    assert loss.count == sum(real)
    assert np.abs(gradient).max() > 0.1


def test_groups_are_batches_of_their_own():
    both = vectors(1)
    together, gradient = evaluate(both, group=3)
    parts = [evaluate(both[:, place], negatives="global") for place in (slice(3), slice(3, 6))]
    np.testing.assert_allclose(together.sum, sum(loss.sum for loss, _ in parts), rtol=1e-6)
    np.testing.assert_allclose(
        gradient, np.concatenate([part for _, part in parts], axis=1), atol=1e-6
    )
    whole, _ = evaluate(both, negatives="global", group=3)
    assert whole.sum > together.sum  # more candidates to be told from


@pytest.mark.parametrize("side", ["source", "target"])
def test_detach(side):
    both = vectors(2)
    free_loss, free = evaluate(both)
    loss, gradient = evaluate(both, detach=side)
    still = ("source", "target").index(side)
    assert loss.sum == free_loss.sum
    assert not gradient[still].any()
    np.testing.assert_allclose(gradient[1 - still], free[1 - still], atol=1e-6)


@pytest.mark.parametrize("empty", ["source", "target", "both"])
@pytest.mark.parametrize("direction", ["one_way", "symmetric"])
def test_padded_pairs_are_neither_anchors_nor_candidates(direction, empty):
    both, real = vectors(3), np.array([1, 1, 0, 1, 0, 1])
    batch = masks(real, empty)
    loss, gradient = evaluate(both, batch, direction=direction)
    without, alone = evaluate(both[:, real == 1], direction=direction)
    np.testing.assert_allclose(loss.sum, without.sum, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, real == 1], alone, atol=1e-6)
    assert not gradient[:, real == 0].any()
    for name, value in without.logs.items():
        np.testing.assert_allclose(loss.logs[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert loss.count == without.count == 4


@pytest.mark.parametrize("direction", ["one_way", "symmetric"])
def test_masked_duplicates_are_no_candidates(direction):
    """Pairs 0 and 2 have one target, 3 and 4 one source; 5 is padding with the text of 1."""
    both = vectors(13)
    batch = masks([1, 1, 1, 1, 1, 0], texts=[0, 1, 0, 3, 4, 1], sources=[0, 1, 2, 3, 3, 1])
    same = {(0, 2), (2, 0), (3, 4), (4, 3)}
    total = 0.0
    for anchors, candidates in (both, both[::-1])[: 1 + (direction == "symmetric")]:
        for i in range(5):
            near = [math.exp(cosine(anchors[i], candidates[j]) / TAU) for j in range(5)]
            total -= math.log(near[i] / sum(near[j] for j in range(5) if (i, j) not in same))
    total /= 1 + (direction == "symmetric")
    loss, gradient = evaluate(both, batch, direction=direction, duplicates="mask")
    np.testing.assert_allclose(loss.sum, total, rtol=1e-5)
    kept, other = evaluate(both, batch, direction=direction)
    assert kept.sum > loss.sum and np.abs(other - gradient).max() > 1e-3
    assert loss.logs["duplicates"] == kept.logs["duplicates"] == 2
    alone, _ = evaluate(both[:, :1], duplicates="mask")
    # The one logit stands in the sum over candidates and alone; a compiler may round it apart.
    assert abs(alone.sum) <= np.finfo(np.float32).eps * abs(cosine(*both[:, 0])) / TAU
    assert alone.logs["duplicates"] == 0


@pytest.mark.parametrize("padding", ["numbers", "zeros"])
def test_a_group_of_padding(padding):
    both, real = vectors(4), np.array([1, 1, 1, 0, 0, 0])
    both[:, 3:] *= padding == "numbers"
    loss, gradient = evaluate(both, masks(real), group=3, direction="symmetric")
    without, alone = evaluate(both[:, :3], group=3, direction="symmetric")
    np.testing.assert_allclose(loss.sum, without.sum, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :3], alone, atol=1e-6)
    assert not gradient[:, 3:].any()


def test_nothing_but_padding():
    loss, gradient = evaluate(np.zeros((2, PAIRS, DIM), np.float32), masks([0] * PAIRS))
    assert (loss.sum, loss.count) == (0, 0)
    assert not gradient.any()
    assert all(value == 0 for value in loss.logs.values())


def test_one_pair_has_nothing_to_be_told_from():
    loss, gradient = evaluate(vectors(5, pairs=1))
    assert (loss.sum, loss.count) == (0, 1)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert loss.logs["retrieval"] == 1


def test_a_zero_vector_has_a_finite_gradient():
    both = vectors(6)
    both[0, 2] = 0
    loss, gradient = evaluate(both, direction="symmetric")
    assert np.isfinite(loss.sum)
    assert np.isfinite(gradient).all()
    assert all(np.isfinite(value) for value in loss.logs.values())


def test_length_does_not_matter_only_direction():
    both = vectors(7)
    loss, gradient = evaluate(both)
    scaled, _ = evaluate(both * np.array([0.01, 100.0], np.float32)[:, None, None])
    np.testing.assert_allclose(scaled.sum, loss.sum, rtol=1e-5)
    radial = np.sum(gradient * both, axis=-1)
    np.testing.assert_allclose(radial, 0, atol=1e-5)


def test_sharp_temperatures_do_not_overflow():
    both = vectors(8)
    loss, gradient = evaluate(both, temperature=1e-3)
    assert np.isfinite(loss.sum)
    assert np.isfinite(gradient).all()


def test_logs():
    # Sources 0 and 1 point at their own target, 2 at target 0.
    source = np.array([[2, 0, 0], [0, 3, 0], [4, 0, 0]], np.float32)
    target = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    loss, _ = evaluate(np.stack([source, target]))
    assert loss.logs["retrieval"] == 2
    np.testing.assert_allclose(loss.logs["cosine"], 2.0, atol=1e-6)
    np.testing.assert_allclose(loss.logs["norm"], 9.0, rtol=1e-6)
    centre = np.array([3, 2, 1]) / 6
    np.testing.assert_allclose(loss.logs["spread"], 3 * (1 - centre @ centre), rtol=1e-6)


def test_collapsed_states_find_nothing():
    loss, _ = evaluate(np.ones((2, PAIRS, DIM), np.float32))
    np.testing.assert_allclose(loss.sum / loss.count, math.log(PAIRS), rtol=1e-6)
    assert loss.logs["retrieval"] == 0
    np.testing.assert_allclose(loss.logs["spread"], 0, atol=1e-5)


def test_a_copy_of_the_target_is_no_rival():
    """Pairs 0 and 1 share a target: both find it. Pair 2's equals pair 3's, another sentence."""
    target = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], np.float32)
    both = np.stack([target, target])
    loss, _ = evaluate(both, masks([1] * 4, texts=[7, 7, 8, 9]))
    assert loss.logs["retrieval"] == 2


def test_a_copy_is_known_wherever_it_stands():
    """Answers of task rows stand behind prompts of any length."""
    tokens = np.array([[9, 9, 4, 5, 0], [9, 4, 5, 0, 0], [9, 9, 9, 5, 4], [3, 9, 4, 0, 5]])
    mask = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 0, 1]])
    first, second, other, apart = np.asarray(_digest(jnp.asarray(tokens), jnp.asarray(mask)))
    assert first == second == apart != other


def test_similarities():
    a, b = vectors(9)
    expected = [[cosine(x, y) for y in b] for x in a]
    np.testing.assert_allclose(similarities(a, b), expected, atol=1e-6)


# --- pooling ------------------------------------------------------------------------------------

MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("pooling", "weights"),
    [
        ("mean", [[1 / 3, 1 / 3, 1 / 3, 0], [1, 0, 0, 0], [0.25] * 4, [0] * 4]),
        ("mean_rest", [[0, 0.5, 0.5, 0], [1, 0, 0, 0], [0] + [1 / 3] * 3, [0] * 4]),
        ("first", [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0] * 4]),
        ("last", [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0] * 4]),
    ],
)
def test_pooling(pooling, weights):
    found = pooling_weights(jnp.asarray(MASK), pooling)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, weights, rtol=1e-6)
    np.testing.assert_array_equal(pooling_weights(jnp.asarray(MASK, bool), pooling), found)


@pytest.mark.parametrize(("pooling", "place"), [("first", 2), ("last", 3), ("mean_rest", 3)])
def test_pooling_where_the_padding_is_on_the_left(pooling, place):
    weights = pooling_weights(jnp.array([[0, 0, 1, 1]]), pooling)
    np.testing.assert_array_equal(weights, np.eye(4)[[place]])
