import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.probe.cka import products
from jaxalign.probe.collapse import collapse
from tests.probe import plain


def isoscore(points):
    """Rudman et al. 2022, step by step, eigenvalues and all."""
    width = points.shape[1]
    values = np.linalg.eigvalsh(np.cov(points.T))
    normed = np.sqrt(width) * values / np.linalg.norm(values)
    defect = np.linalg.norm(normed - 1) / np.sqrt(2 * (width - np.sqrt(width)))
    uniform = (width - defect**2 * (width - np.sqrt(width))) ** 2 / width**2
    return (width * uniform - 1) / (width - 1)


@pytest.mark.parametrize("number", [40, 300])
def test_equals_the_loops(number):
    states = plain.realistic(number=number)
    found = collapse(states)
    for g, x in enumerate(np.asarray(states, np.float64)):
        assert found.norm[g] == pytest.approx(np.mean([np.sqrt(v @ v) for v in x]), rel=1e-5)
        mean = x.mean(axis=0)
        spread = 1 - mean @ mean / np.mean([v @ v for v in x])
        assert found.spread[g] == pytest.approx(spread, abs=1e-5)
        table = plain.cosines(x, x)
        others = [table[i, j] for i in range(number) for j in range(number) if i != j]
        assert found.cosine[g] == pytest.approx(np.mean(others), abs=1e-5)
        assert found.contrast[g] == pytest.approx(np.std(others), abs=1e-5)
        energy = (x * x).mean(axis=0)
        assert found.largest[g] == pytest.approx(energy.max() / energy.sum(), rel=1e-5)
        assert found.place[g] == energy.argmax()
        assert found.isoscore[g] == pytest.approx(isoscore(x), abs=1e-5)
        values = np.linalg.eigvalsh(np.cov(x.T))
        expected = values.sum() ** 2 / (values**2).sum()
        assert found.dimension[g] == pytest.approx(expected, rel=1e-4)
    assert found.flags == ((),) * 5
    assert found.warnings(list("abcde")) == []


def test_isoscore_of_known_clouds():
    rng = np.random.default_rng(0)
    ball = rng.normal(size=(4000, 8))
    line = ball * np.array([1] + [0] * 7)
    found = collapse(np.stack([ball, line]).astype(np.float32))
    assert found.isoscore[0] > 0.97
    assert found.isoscore[1] == pytest.approx(0, abs=1e-6)
    assert found.dimension[1] == pytest.approx(1, abs=1e-5)
    assert found.flags == ((), ("few",))


def test_shares_of_the_variance():
    rng = np.random.default_rng(0)
    meaning, language = rng.normal(size=(1, 50, 16)), rng.normal(size=(4, 1, 16))
    rest = rng.normal(size=(4, 50, 16))
    only = np.zeros((4, 50, 16))
    for parts, name in ((meaning + only, "sentence"), (language + only, "language")):
        assert collapse(parts.astype(np.float32)).shares[name] == pytest.approx(1, abs=1e-5)
    states = (1000 + 2 * meaning + language + rest).astype(np.float32)
    found = collapse(states).shares
    exact = np.asarray(states, np.float64)
    middle = exact.mean(axis=(0, 1))
    whole = ((exact - middle) ** 2).sum()
    about = {
        "language": 50 * ((exact.mean(axis=1) - middle) ** 2).sum() / whole,
        "sentence": 4 * ((exact.mean(axis=0) - middle) ** 2).sum() / whole,
    }
    for name, expected in about.items():
        assert found[name] == pytest.approx(expected, abs=1e-5)
    assert sum(found.values()) == pytest.approx(1)


def test_degenerate_states_are_flagged():
    states = plain.realistic(languages=4)
    states[0] = 3.3
    states[1] = 0
    states[2] += 1e3  # one large direction: a narrow cone
    states[3, 5] = 0
    found = collapse(states)
    assert found.flags == (("constant",), ("constant", "zero"), ("narrow",), ("zero",))
    for values in (found.norm, found.spread, found.cosine, found.dimension, found.isoscore):
        assert np.isfinite(values).all()
    assert all(np.isfinite(value) for value in found.shares.values())
    told = found.warnings(["en", "de", "cy", "id"])
    assert len(told) == 5 and told[0].startswith("en: all sentences") and "cone" in told[3]
    same = collapse(np.full((2, 6, 3), 7.7, np.float32))
    assert same.shares == {"language": 0.0, "sentence": 0.0, "rest": 0.0}


def test_a_massive_activation_is_named_once():
    states = plain.realistic(languages=2)
    states[0, :, 17] += 40 * np.abs(states[0]).max()
    found = collapse(states)
    assert found.flags == (("massive",), ())
    assert found.largest[0] > 0.98 and found.place[0] == 17 and found.contrast[0] < 0.02
    exact = np.asarray(states[0], np.float64)
    table = plain.cosines(exact, exact)
    apart = np.std(table[~np.eye(len(table), dtype=bool)])
    assert found.contrast[0] == pytest.approx(apart, rel=0.02)  # 1e-4 around a mean of 0.9998
    (said,) = found.warnings(["cy", "en"])
    assert said.startswith("cy: one dimension (17) carries 99% of the energy") or "100%" in said


def test_products_are_shared():
    states = plain.realistic()
    shared = products(states)
    np.testing.assert_array_equal(
        collapse(states, shared=shared).isoscore, collapse(states).isoscore
    )
    with pytest.raises(UserError, match="other states"):
        collapse(states[:, :30], shared=shared)
    with pytest.raises(UserError, match="at least 2"):
        collapse(states[:, :1])
