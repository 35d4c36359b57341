import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.probe import cka
from jaxalign.probe.cka import linear_cka, products
from jaxalign.probe.neighbours import overlap
from tests.probe import plain


def grams(states):
    centred = np.asarray(states, np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    return [x @ x.T for x in centred]


def hsic1(k, el):
    """The unbiased HSIC, sum by sum over distinct indices' matrices."""
    n = len(k)
    k, el = k - np.diag(np.diagonal(k)), el - np.diag(np.diagonal(el))
    one = np.ones(n)
    total = np.trace(k @ el)
    total += (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
    total -= 2 / (n - 2) * (one @ k @ el @ one)
    return total / (n * (n - 3))


@pytest.mark.parametrize(
    "shape", [(40, 64), (300, 12)], ids=["through Gram matrices", "through cross products"]
)
def test_plain_cka_equals_the_formula(shape):
    states = plain.realistic(number=shape[0], width=shape[1])
    centre = np.eye(shape[0]) - 1 / shape[0]
    found = linear_cka(states)
    for a, x in enumerate(np.asarray(states, np.float64)):
        for b, y in enumerate(np.asarray(states, np.float64)):
            k, el = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
            expected = np.trace(k @ el) / np.sqrt(np.trace(k @ k) * np.trace(el @ el))
            assert found[a, b] == pytest.approx(expected, abs=1e-5)
    assert found[0, 4] < found[0, 1] < 0.99


@pytest.mark.parametrize("shape", [(40, 64), (300, 12)])
def test_debiased_cka_equals_the_formula(shape):
    states = plain.realistic(number=shape[0], width=shape[1])
    found = linear_cka(states, estimator="debiased")
    every = [x @ x.T for x in np.asarray(states, np.float64)]  # not centred: it must not matter
    for a, k in enumerate(every):
        for b, el in enumerate(every):
            expected = hsic1(k, el) / np.sqrt(hsic1(k, k) * hsic1(el, el))
            assert found[a, b] == pytest.approx(expected, abs=1e-5)


def test_debiased_sees_no_likeness_in_noise():
    noise = np.random.default_rng(0).normal(size=(2, 50, 400)).astype(np.float32)
    assert linear_cka(noise)[0, 1] > 0.8  # the bias
    assert abs(linear_cka(noise, estimator="debiased")[0, 1]) < 0.1


@pytest.mark.parametrize("estimator", ["plain", "debiased"])
def test_turned_scaled_moved_languages_are_the_same(estimator):
    x = plain.realistic(languages=2)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(48, 48)))[0]
    copies = np.stack([x[0], x[0], x[0] @ turn, 1e4 * x[0] + 5e3, x[1]]).astype(np.float32)
    found = linear_cka(copies, estimator=estimator)
    np.testing.assert_allclose(found[:4, :4], 1, atol=1e-5)
    np.testing.assert_allclose(found[4, :4], found[4, 0], atol=1e-5)
    assert found[4, 0] < 0.99
    np.testing.assert_allclose(np.diagonal(found), 1, atol=1e-6)


def test_strips_equal_the_whole(monkeypatch):
    states = plain.realistic(number=70)
    whole = products(states)
    cka._strip.clear_cache()  # the strip is a constant of the compiled program
    monkeypatch.setattr(cka, "STRIP", 32)
    parts = products(states)
    cka._strip.clear_cache()
    np.testing.assert_allclose(parts.inner, whole.inner, rtol=1e-5)
    assert len(cka.products(states).squares) == 5
    expected = [[(a * b).sum() for a in grams(states)] for b in grams(states)]
    scale = np.array([np.trace(k) for k in grams(states)])
    np.testing.assert_allclose(whole.inner, expected / np.outer(scale, scale), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["plain", "debiased"])
def test_a_constant_language_has_no_likeness(estimator):
    states = plain.realistic(languages=3)
    states[1] = 123.456
    states[2] = 0
    found = linear_cka(states, estimator=estimator)
    np.testing.assert_array_equal(found[1:], 0)
    assert found[0, 0] == pytest.approx(1)


def test_bad_input_is_told():
    good = plain.realistic(languages=2, number=12)
    for states, words, sentence in (
        (good[:, :1], {}, "at least 2"),
        (good[:, :3], {"estimator": "debiased"}, "at least 4"),
        (good, {"estimator": "unbiased"}, "plain or debiased"),
    ):
        with pytest.raises(UserError, match=sentence):
            linear_cka(states, **words)
    for neighbours in (0, 12):
        with pytest.raises(UserError, match="neighbours"):
            overlap(good, neighbours)


@pytest.mark.parametrize("neighbours", [1, 10])
def test_overlap_equals_the_loops(neighbours):
    states = plain.realistic()
    near = []
    for x in states:
        table = plain.cosines(x, x)
        rows = []
        for i, row in enumerate(table):
            order = [j for j in np.argsort(-row, kind="stable") if j != i]
            # What ties with the next sentence is not known to belong to the k.
            rows.append({j for j in order[:neighbours] if row[j] > row[order[neighbours]] + 1e-9})
        near.append(rows)
    assert sum(len(row) < neighbours for rows in near for row in rows) >= 2  # duplicates tie
    found = overlap(states, neighbours)
    for a in range(5):
        for b in range(5):
            shared = [len(p & q) for p, q in zip(near[a], near[b], strict=True)]
            assert found[a, b] == pytest.approx(np.mean(shared) / neighbours, abs=1e-5)
    assert found[0, 4] < found[0, 1] < 1


def test_collapsed_languages_share_no_neighbours():
    states = plain.realistic(languages=3, number=20)
    states[1:] = 1.5
    found = overlap(states, 5)
    assert found[0, 0] > 0.9
    np.testing.assert_array_equal(found[1:], 0)
    np.testing.assert_array_equal(found[:, 1:], 0)


def test_overlap_of_strangers_is_chance(monkeypatch):
    noise = np.random.default_rng(0).normal(size=(3, 200, 32)).astype(np.float32)
    found = overlap(noise)
    assert found[0, 1] == pytest.approx(10 / 199, abs=0.02)
    from jaxalign.probe import neighbours

    neighbours._strip.clear_cache()
    monkeypatch.setattr(neighbours, "STRIP", 64)
    np.testing.assert_array_equal(overlap(noise), found)
    neighbours._strip.clear_cache()
