"""Pruning, joining and cutting single matrices, against NumPy's own singular values."""

import numpy as np
import pytest

from jaxalign.merge.matrices import add, drop, elect, trim, truncate, truncate_product


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_error_is_that_of_the_discarded_singular_values(shape, rank):
    whole = random(*shape)
    values = np.linalg.svd(whole, compute_uv=False)
    low = truncate(whole, rank)
    assert low.a.shape == (shape[0], rank) and low.b.shape == (rank, shape[1])
    assert low.lost == pytest.approx(np.sum(values[rank:] ** 2), rel=1e-9, abs=1e-9)
    assert low.whole == pytest.approx(np.sum(values**2), rel=1e-12)
    assert np.linalg.norm(whole - low.a @ low.b) ** 2 == pytest.approx(low.lost, abs=1e-9)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_factors_are_cut_like_their_product(shape, rank):
    a, b = random(shape[0], 7), random(7, shape[1], seed=1)
    values = np.linalg.svd(a @ b, compute_uv=False)
    low = truncate_product(a, b, rank)
    assert low.lost == pytest.approx(np.sum(values[rank:] ** 2), rel=1e-9, abs=1e-9)
    assert low.whole == pytest.approx(np.sum(values**2), rel=1e-12)
    assert np.linalg.norm(a @ b - low.a @ low.b) ** 2 == pytest.approx(low.lost, abs=1e-9)
    np.testing.assert_allclose(low.a @ low.b, (w := truncate(a @ b, rank)).a @ w.b, atol=1e-9)


def test_more_rows_than_a_strip_and_float32(monkeypatch):
    from jaxalign.merge import matrices

    monkeypatch.setattr(matrices, "_STRIP", 7)
    whole = random(40, 24).astype(np.float32)
    values = np.linalg.svd(whole.astype(np.float64), compute_uv=False)
    assert truncate(whole, 3).lost == pytest.approx(np.sum(values[3:] ** 2), rel=1e-9)


def test_nothing_to_cut():
    low = truncate(np.zeros((6, 4), np.float32), 2)
    assert not np.any(low.a @ low.b) and low.lost == low.whole == 0
    thin = random(6, 2) @ random(2, 4, seed=1)
    assert truncate(thin, 2).lost == pytest.approx(0, abs=1e-20)
    assert truncate(thin, 9).a.shape == (6, 4)  # no more than there is


def test_trim_keeps_the_largest():
    update = np.array([[0.1, -5.0, 0.3], [2.0, -0.2, 0.4]])
    np.testing.assert_array_equal(trim(update, 0.5), [[0, -5.0, 0], [2.0, 0, 0.4]])
    np.testing.assert_array_equal(trim(update, 0.34), [[0, -5.0, 0], [2.0, 0, 0]])  # 2.04 entries
    np.testing.assert_array_equal(trim(update, 1.0), update)
    assert not trim(update, 0.1).any()


def test_drop_keeps_the_expected_value():
    update = random(300, 200).astype(np.float32)
    kept = drop(update, 0.25, np.random.default_rng(1))
    assert kept.dtype == np.float32
    assert np.mean(kept != 0) == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(kept[kept != 0], 4 * update[kept != 0], rtol=1e-6)
    np.testing.assert_array_equal(drop(update, 1.0, np.random.default_rng(1)), update)
    again = drop(update, 0.25, np.random.default_rng(1))
    np.testing.assert_array_equal(kept, again)
    assert (drop(update, 0.25, np.random.default_rng(2)) != kept).any()


def test_elect_by_hand():
    # A vote by magnitude, then the mean of those who agree; a tie elects nobody.
    first = np.array([[3.0, 1.0, -2.0, 0.0, 1.0]])
    second = np.array([[1.0, -4.0, -4.0, 2.0, -1.0]])
    np.testing.assert_array_equal(elect([first, second]), [[2.0, -4.0, -3.0, 2.0, 0.0]])
    np.testing.assert_array_equal(add([first, second]), [[4.0, -3.0, -6.0, 2.0, 0.0]])


def test_absent_and_opposite_voters():
    first, second = random(5, 4), random(5, 4, seed=1)
    np.testing.assert_array_equal(elect([first, 0 * second]), first)
    np.testing.assert_array_equal(elect([first, -second]), elect([-second, first]))
    np.testing.assert_array_equal(elect([-first, -second]), -elect([first, second]))
