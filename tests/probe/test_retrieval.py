import ml_dtypes
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.probe.mexa import mexa, over_layers
from jaxalign.probe.retrieval import SCORES, retrieval, top_means
from jaxalign.probe.vectors import shuffled_pairs
from tests.probe import plain

NEIGHBOURS = {"cosine": 1, "csls": 10, "margin": 4}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("grouped", ["alone", "grouped"])
def test_equals_the_loops(seed, grouped):
    states = plain.realistic(seed=seed)
    groups = np.arange(states.shape[1]) * 7 + 1
    groups[7] = groups[3]
    groups = groups if grouped == "grouped" else None
    found = retrieval(states, groups=groups)
    assert list(found) == ["cosine", "csls", "margin"]
    for score, shares in found.items():
        expected = plain.retrieval(states, score, NEIGHBOURS[score], groups)
        np.testing.assert_allclose(shares, expected, atol=1e-5)
    values = np.concatenate([shares[np.isfinite(shares)] for shares in found.values()])
    assert values.min() > 0.1 and values.max() < 1.0  # neither trivial nor hopeless
    assert len({tuple(shares[0, 1:]) for shares in found.values()}) == 3  # the scores differ


def test_groups_count_duplicates_as_found():
    states = plain.realistic(noise=0.0, languages=2)
    groups = np.arange(states.shape[1])
    groups[7] = groups[3]
    alone, together = retrieval(states), retrieval(states, groups=groups)
    gained = together["cosine"][0, 1] - alone["cosine"][0, 1]
    np.testing.assert_allclose(gained, 2 / states.shape[1], atol=1e-6)


def test_either_side_may_have_several_translations():
    """Of pairs: a text that comes again has one state, and whatever stands beside it is right."""
    groups = np.array([[0, 0, 1, 2, 3], [0, 1, 1, 2, 2]])  # a-x, a-y, b-y, c-z, d-z
    meaning = np.random.default_rng(0).normal(size=(3, 16))[[0, 0, 0, 1, 1]]
    rows = np.random.default_rng(1).normal(size=(2, 5, 16))
    states = np.stack([meaning + 0.1 * rows[g, row] for g, row in enumerate(groups)])
    states = states.astype(np.float32)
    for sides, told in ((states, groups), (states[::-1], groups[::-1])):
        found = retrieval(sides, groups=told)["cosine"]
        pairs = set(zip(*told.tolist(), strict=True))
        near = plain.cosines(*sides)
        there = zip(told[0], told[1][near.argmax(1)], strict=True)
        back = zip(told[0][near.argmax(0)], told[1], strict=True)
        hits = [[pair in pairs for pair in way] for way in (there, back)]
        np.testing.assert_allclose([found[0, 1], found[1, 0]], np.mean(hits, axis=1), atol=1e-6)
    assert retrieval(states, groups=groups[:1])["cosine"][0, 1] < found[1, 0]  # one side alone


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_stored_types_and_lists(kind, tmp_path):
    states = plain.realistic().astype(kind)
    wide = retrieval(states.astype(np.float32))
    for given in (states, list(states)):
        for score, shares in retrieval(given).items():
            np.testing.assert_array_equal(shares, wide[score])
    if kind == np.float16:
        np.save(tmp_path / "layer.npy", states)
        mapped = np.load(tmp_path / "layer.npy", mmap_mode="r")
        np.testing.assert_array_equal(retrieval(mapped)["csls"], wide["csls"])


@pytest.mark.parametrize("width", [None, 2])
@pytest.mark.parametrize("value", ["ones", "zeros", "any"])
def test_ties_are_not_hits(value, width):
    any_of = np.random.default_rng(0).normal(size=(2, 1, 33))
    one = {"ones": np.ones((2, 1, 33)), "zeros": np.zeros((2, 1, 33)), "any": any_of}[value]
    states = np.repeat(one, 8, axis=1).astype(np.float32)
    groups = [0, 0, 1, 2, 3, 4, 5, 6]  # the first two say the same, and still tie with the rest
    for given in (None, groups):
        for score, shares in retrieval(states, SCORES, groups=given, width=width).items():
            assert shares[0, 1] == shares[1, 0] == 0, score
    np.testing.assert_array_equal(mexa(states)[1:], 0)


def test_two_equal_states_find_neither():
    states = plain.realistic(noise=0.0, languages=2)  # sentences 3 and 7 have one state
    for score, shares in retrieval(states, SCORES).items():
        assert shares[0, 1] <= 1 - 2 / states.shape[1] + 1e-9, score


def test_opposite_neighbours_do_not_break_the_margin():
    # r(x) + r(y) = 0: the margin's denominator vanishes.
    states = np.array([[[1.0, 0], [0, 1]], [[0, 1.0], [0, -1]]], np.float32)
    found = retrieval(states, ("margin", "csls"), margin_neighbours=2, csls_neighbours=2)
    assert all(np.isfinite(shares[0, 1]) for shares in found.values())


def test_fewer_sentences_than_neighbours():
    states = plain.realistic(number=12)[:, :6]
    found = retrieval(states)
    np.testing.assert_allclose(found["csls"], plain.retrieval(states, "csls", 6), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("values", ["distinct", "tied"])
def test_top_means(axis, values):
    table = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    if values == "tied":
        table = np.round(table, 1)
    found = top_means(table, [10, 4], axis)
    ordered = -np.sort(-table, axis=axis)
    for size, means in found.items():
        expected = ordered.take(range(size), axis=axis).mean(axis=axis, keepdims=True)
        np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)


def test_shuffled_pairs_are_found_by_accident():
    rng = np.random.default_rng(0)
    number = 400
    independent = rng.normal(size=(4, number, 64)).astype(np.float32)
    aligned = plain.realistic(languages=4, number=number, noise=0.2)
    for states, least in ((independent, 0.2), (aligned, 0.0)):
        for shares in retrieval(shuffled_pairs(states)).values():
            # 12 directions of 400 tries at 1 / 400 each: 12 hits are expected.
            mean = np.nanmean(shares) * number
            assert least <= mean < 2.5
    assert np.nanmean(retrieval(aligned)["cosine"]) > 0.9


def test_shuffled_pairs_hold_no_pair():
    number = 9
    places = np.tile(np.arange(number, dtype=np.float32)[None, :, None], (7, 1, 2))
    order = np.stack(shuffled_pairs(places, seed=3))[..., 0]
    for a in range(7):
        assert sorted(order[a]) == list(range(number))
        for b in range(a):
            assert not (order[a] == order[b]).any()


def test_full_width_changes_nothing():
    states = plain.realistic()
    exact = retrieval(states, SCORES)
    for score, shares in retrieval(states, SCORES, width=48).items():
        np.testing.assert_array_equal(shares, exact[score])


def test_fewer_directions_are_near():
    states = plain.realistic(number=300, width=96)
    exact, near = retrieval(states), retrieval(states, width=64)
    for score in exact:
        assert np.nanmax(np.abs(exact[score] - near[score])) < 0.02
    assert np.nanmax(np.abs(exact["cosine"] - retrieval(states, width=4)["cosine"])) > 0.02


def test_mexa_is_the_published_rule():
    states = plain.realistic(noise=0.8)
    expected = plain.mexa(states, pivot=2)
    found = mexa(states, pivot=2)
    assert np.isnan(found[2])
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(found[others], expected[others], atol=1e-5)
    assert 0.05 < found[others].min() < found[others].max() < 1
    table = retrieval(states, ("mexa",))["mexa"]
    np.testing.assert_array_equal(table[2], found)
    np.testing.assert_array_equal(table, table.T)
    groups = np.zeros(states.shape[1], int)
    grouped = retrieval(states, ("mexa", "cosine"), groups=groups)
    np.testing.assert_array_equal(grouped["mexa"], table)
    assert np.nanmin(grouped["cosine"]) == 1


def test_mexa_over_layers():
    scores = np.array([[0.1, 0.5], [0.3, 0.2]])
    np.testing.assert_allclose(over_layers(scores, "mean"), [0.2, 0.35])
    np.testing.assert_allclose(over_layers(scores, "max"), [0.3, 0.5])
    for wrong in ((scores, "median"), (scores[0], "mean"), (scores[:0], "max")):
        with pytest.raises(UserError):
            over_layers(*wrong)


GOOD = plain.realistic(languages=3, number=12, width=8)


@pytest.mark.parametrize(
    ("states", "options", "sentence"),
    [
        (GOOD[:, :1], {}, "at least 2 sentences"),
        (GOOD[:, :, :0], {}, "width 0"),
        (GOOD[:1], {}, "2 languages"),
        (GOOD[:0], {}, "no language"),
        (GOOD[0], {}, "languages, sentences, width"),
        ([GOOD[0], GOOD[1, :5]], {}, "one shape"),
        (GOOD.astype(int), {}, "floating point"),
        (GOOD.astype(ml_dtypes.bfloat16).view("V2"), {}, "bfloat16"),
        ("states.npy", {}, "floating point|must be"),
        (np.where(GOOD[1, 4, 3] == GOOD, np.nan, GOOD), {}, "language 1, sentence 4"),
        (GOOD, {"scores": ("cosin",)}, "cosine, csls"),
        (GOOD, {"scores": ()}, "cosine, csls"),
        (GOOD, {"groups": [1, 2]}, "12 numbers"),
        (GOOD, {"csls_neighbours": 0}, "at least 1"),
        (GOOD, {"width": 0}, "width"),
    ],
)
def test_bad_input_is_told(states, options, sentence):
    with pytest.raises(UserError, match=sentence):
        retrieval(states, **options)


def test_bad_pivot_and_shuffle():
    for pivot in (3, -1):
        with pytest.raises(UserError, match="pivot"):
            mexa(GOOD, pivot)
    with pytest.raises(UserError, match="mispaired"):
        shuffled_pairs(np.ones((5, 4, 2), np.float32))
