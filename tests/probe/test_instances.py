"""DALI, NeuronXA and the correlation with task scores."""

import numpy as np
import pytest
from scipy import special

from jaxalign.errors import UserError
from jaxalign.probe.correlation import correlate
from jaxalign.probe.dali import dali
from jaxalign.probe.neurons import nasca, navca
from tests.probe import plain


def items(noise, options=3, number=40, seed=0):
    rng = np.random.default_rng(seed)
    premise = rng.normal(size=(number, 1, 24))
    meaning = premise + 0.6 * rng.normal(size=(number, options, 24))
    sides = [meaning + noise * rng.normal(size=meaning.shape) for _ in range(2)]
    return [side.astype(np.float32) for side in sides]


def by_hand(source, target, variant, rule):
    found = []
    for x, y in zip(source, target, strict=True):
        every = range(len(x))
        right = [plain.cosine(x[i], y[i]) for i in every]
        wrong = [[plain.cosine(x[i], y[j]) for j in every if j != i] for i in every]
        if rule == "row":
            good = all(r > max(row) for r, row in zip(right, wrong, strict=True))
        else:
            good = min(right) > max(map(max, wrong))
        if variant == "strong":
            within = [
                plain.cosine(z[i], z[j]) for z in (x, y) for i in every for j in every if i < j
            ]
            good = good and min(right) > max(within)
        found.append(good)
    return np.array(found)


@pytest.mark.parametrize("variant", ["plain", "strong"])
@pytest.mark.parametrize("rule", ["all", "row"])
@pytest.mark.parametrize("options", [2, 4])
def test_dali_equals_the_loops(variant, rule, options, monkeypatch):
    monkeypatch.setattr("jaxalign.probe.dali.ITEMS", 16)
    source, target = items(noise=0.6 if options == 4 else 1.0, options=options)
    found = dali(source, target, variant=variant, rule=rule)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, by_hand(source, target, variant, rule))
    assert 0.1 < found.mean() < 1


def test_dali_variants_are_ordered():
    source, target = items(noise=0.5)
    row, every = dali(source, target, rule="row"), dali(source, target)
    strong = dali(source, target, variant="strong")
    assert strong.sum() < every.sum() < row.sum()
    assert not (strong & ~every).any() and not (every & ~row).any()
    assert dali(source, source).all()
    assert not dali(np.ones_like(source), target).any()  # ties are not aligned


def test_dali_tells_bad_input():
    source, target = items(noise=0.1)
    broken = source.copy()
    broken[3, 1, 2] = np.inf
    for x, y, words, sentence in (
        (source, target[:5], {}, "same items"),
        (source[:, :1], target[:, :1], {}, "at least 2"),
        (source, target, {"variant": "weak"}, "plain or strong"),
        (source, target, {"rule": "column"}, "all or row"),
        (broken, target, {}, "not finite"),
    ):
        with pytest.raises(UserError, match=sentence):
            dali(x, y, **words)


def test_neurons_follow_mexas_rule():
    activations = plain.realistic(width=200, noise=1.5)
    activations -= activations.mean(axis=(1, 2), keepdims=True)
    for metric, change in ((nasca, lambda a: (a > 0).astype(float)), (navca, np.abs)):
        found, expected = metric(activations, pivot=1), plain.mexa(change(activations), 1)
        others = [0, 2, 3, 4]
        np.testing.assert_allclose(found[others], expected[others], atol=1e-5)
        assert np.isnan(found[1]) and 0.02 < found[others].max() < 1
    assert not np.array_equal(nasca(activations)[1:], navca(activations)[1:])
    np.testing.assert_array_equal(nasca(activations), nasca(activations * 9))  # signs alone count


def test_correlation_by_hand():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = 0.6 * x + rng.normal(size=12)
    y[3] = y[4]  # a tie: mean ranks

    def pearson(x, y):
        x, y = x - x.mean(), y - y.mean()
        return (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())

    def ranks(values):
        return np.array([np.mean([(values < v).sum() + 1, (values <= v).sum()]) for v in values])

    def two_sided(r):  # Student's t with 10 degrees of freedom, as an incomplete beta integral
        t = r * np.sqrt(10 / (1 - r * r))
        return special.betainc(5, 0.5, 10 / (10 + t * t))

    found = correlate(x, y)
    line, order = pearson(x, y), pearson(ranks(x), ranks(y))
    assert found.pearson == pytest.approx(line, abs=1e-9)
    assert found.pearson_p == pytest.approx(two_sided(line), abs=1e-9)
    assert found.spearman == pytest.approx(order, abs=1e-9)
    assert found.spearman_p == pytest.approx(two_sided(order), abs=1e-9)
    assert (found.number, found.constant) == (12, ())


def test_correlation_meets_by_language():
    alignment = {"de": 0.5, "cy": 0.1, "en": 0.9, "id": 0.4}
    scores = {"cy": 20.0, "id": 50.0, "en": 80.0, "xx": 0.0, "de": 60.0}
    found = correlate(alignment, scores)
    assert found.number == 4 and found.spearman == pytest.approx(1)
    flat = correlate([1, 1, 1], [1.0, 2, 3])
    assert flat.pearson is flat.spearman_p is None and flat.constant == ("alignment",)
    for x, y in (
        ([1, 2], [1, 2]),
        ([1, 2, 3], [1, 2]),
        ([1, 2, np.nan], [1, 2, 3]),
        (alignment, [1, 2, 3, 4]),
    ):
        with pytest.raises(UserError):
            correlate(x, y)
