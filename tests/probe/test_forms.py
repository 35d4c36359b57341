"""States in every form, against NumPy in float64."""

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.probe.forms import FORMS, formed, statistics
from jaxalign.probe.mexa import mexa
from jaxalign.probe.retrieval import retrieval
from tests.probe import plain


def massive(languages=4, number=50, width=40, seed=0):
    """Aligned states whose dimension 7 is a thousand times the rest and says little."""
    states = plain.realistic(languages, number, width, seed=seed) / 10
    states /= np.linalg.norm(states, axis=-1, keepdims=True)
    noise = np.random.default_rng(seed).normal(size=states.shape[:2])
    states[..., 7] = 1000 * (1 + 0.1 * noise)
    return states.astype(np.float32)


def whole(states):
    exact = np.asarray(states, np.float64).reshape(-1, states.shape[-1])
    return exact, exact.mean(axis=0)


def test_every_dimension_has_mean_0_and_deviation_1():
    states = massive()
    states[..., 3] = 123.456  # constant
    exact, mean = whole(states)
    found = statistics(states)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-7)
    deviation = exact.std(axis=0)
    deviation[3] = 0
    np.testing.assert_allclose(found.deviation, deviation, rtol=1e-4)
    view = formed(states, "standardised")
    got = np.stack([np.asarray(view[g]) for g in range(4)])
    scale = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1), 0)
    expected = ((exact - mean) * scale).reshape(states.shape)
    np.testing.assert_allclose(got, expected, atol=5e-3)
    assert np.abs(got[..., 3]).max() == 0


def test_centred_and_trimmed_states():
    states = massive()
    exact, mean = whole(states)
    centred, trimmed = (formed(states, form) for form in ("centred", "trimmed"))
    got = np.stack([np.asarray(centred[g]) for g in range(4)])
    np.testing.assert_allclose(got, (exact - mean).reshape(states.shape), atol=1e-4)
    states[..., 7] = 0  # the only massive one
    np.testing.assert_array_equal(np.stack([np.asarray(trimmed[g]) for g in range(4)]), states)


@pytest.mark.parametrize("directions", [None, 1, 3])
def test_without_the_main_directions(directions):
    states = massive()
    exact, mean = whole(states)
    moved = exact - mean
    top = np.linalg.svd(moved, full_matrices=False)[2][: directions or 1]  # D / 100 rounds to 0: 1
    expected = (moved - moved @ top.T @ top).reshape(states.shape)
    view = formed(states, "all_but_top", directions)
    got = np.stack([np.asarray(view[g]) for g in range(4)])
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < 1e-3


def test_one_dimension_hides_what_the_others_know():
    states = massive()
    raw = np.nanmean(retrieval(states, ("cosine",))["cosine"])
    for form in ("standardised", "trimmed", "all_but_top"):
        view = formed(states, form)
        found = retrieval(view)
        assert np.nanmean(found["cosine"]) > raw + 0.2
        assert np.nanmean(found["margin"]) > raw + 0.2
        assert np.nanmean(mexa(view, 0)) > 0.3
        # The same states as an array give the same numbers.
        held = np.stack([np.asarray(view[g]) for g in range(4)])
        np.testing.assert_array_equal(retrieval(held)["csls"], found["csls"])
    assert formed(states, "raw") is states


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("value", [0.0, 7.7])
def test_collapsed_states_find_nothing_in_any_form(form, value):
    view = formed(np.full((2, 6, 5), value, np.float32), form)
    assert np.nanmax(retrieval(view)["margin"]) == 0
    assert np.isfinite(np.asarray(view[0])).all()


def test_bad_forms_are_told():
    good = massive()
    for states, form, directions, words in (
        (good, "whitened", None, "standardised, centred, trimmed, all_but_top; not 'whitened'"),
        (good, "all_but_top", 40, "1..39, not 40"),
        (good, "all_but_top", 0, "1..39, not 0"),
        (good[:, :1], "standardised", None, "at least 2 sentences"),
    ):
        with pytest.raises(UserError, match=words.replace(".", r"\.")):
            formed(states, form, directions)
