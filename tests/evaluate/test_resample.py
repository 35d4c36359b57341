"""Items are drawn, not rows: intervals of groups keep their coverage where id lists differ."""

import numpy as np
import pytest

from jaxalign.evaluate.comparable import System
from jaxalign.evaluate.compare import compare
from jaxalign.evaluate.measure import Measure, Scored, share
from jaxalign.evaluate.resample import items, pools, resamples

IDS = [f"test-{n}" for n in range(120)]


def named(hits, ids):
    return Scored(
        (Measure("accuracy", np.stack([hits, np.ones(len(hits))], 1), share),),
        (None,) * len(hits),
        ids=tuple(ids),
    )


def gain_of(rng, languages, draws=200):
    """The gain over a baseline that is right or wrong item by item, alike in all languages."""
    hard = rng.normal(size=len(IDS))
    shift = {"base": rng.normal(size=len(IDS)), "better": rng.normal(size=len(IDS))}
    systems = []
    for name, own in shift.items():
        run = {}
        for language, ids in languages.items():
            own_items = [IDS.index(one) for one in ids]
            noise = 0.2 * rng.normal(size=len(ids))  # of the language
            run[language] = named(hard[own_items] + own[own_items] + noise > 0, ids)
        systems.append(System(name, [run]))
    return compare(systems, {}, draws=draws).measures["accuracy"].group_gains["better"]["all"]


LAYOUTS = {
    "the same": {"en": IDS, "de": IDS, "da": IDS},
    "one row less": {"en": IDS, "de": IDS[1:], "da": IDS[:-1]},
    "half": {"en": IDS, "de": IDS, "ja": IDS[::2]},
    "another order": {"en": IDS, "de": IDS[::-1], "da": [*IDS[60:], *IDS[:60]]},
}


def test_a_missing_row_does_not_narrow_the_interval():
    """Drawn apart, three languages that rise and fall together would look 1.7 times as certain."""
    widths = {}
    for layout, languages in LAYOUTS.items():
        rng = np.random.default_rng(5)
        found = [gain_of(rng, languages) for _ in range(12)]
        widths[layout] = np.mean([gain.high - gain.low for gain in found])
    assert widths["one row less"] == pytest.approx(widths["the same"], rel=0.06)
    assert widths["another order"] == pytest.approx(widths["the same"], rel=0.06)
    assert widths["half"] > 0.97 * widths["the same"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coverage_is_nominal(layout):
    """The true gain is 0: an interval of 95 % contains it in about 95 of 100 test sets."""
    rng = np.random.default_rng(11)
    found = [gain_of(rng, LAYOUTS[layout]) for _ in range(300)]
    covered = np.mean([gain.low <= 0 <= gain.high for gain in found])
    stars = np.mean([gain.p < 0.05 for gain in found])
    assert 0.915 <= covered <= 0.985, covered  # 0.95 and 3 standard errors of 300 tries
    assert stars <= 0.085, stars


def counts_of(languages, draws=50, seed=1):
    (pool,) = pools({name: items(name, ids, len(ids)) for name, ids in languages.items()})
    return next(iter(resamples(pool, draws, seed)))[1]


def test_an_item_is_drawn_equally_often_in_every_language():
    counts = counts_of({"en": IDS, "ja": IDS[::2], "de": IDS[::-1]})
    assert (counts["en"][:, ::2] == counts["ja"]).all()
    assert (counts["en"][:, ::-1] == counts["de"]).all()
    assert (counts["en"].sum(axis=1) == len(IDS)).all()
    assert counts["ja"].sum() / counts["en"].sum() == pytest.approx(0.5, abs=0.05)


def test_equal_ids_of_one_language_are_not_one_item():
    counts = counts_of({"en": ["x"] * 40})
    assert counts["en"].std() > 0.9


def test_a_language_that_a_draw_misses_keeps_its_rows():
    counts = counts_of({"en": IDS, "xx": IDS[:1]}, draws=400)["xx"]
    assert counts.min() == 1 and counts.max() > 1


def test_only_languages_that_share_items_are_one_pool():
    named = {"en": ("a", "b"), "de": ("c",), "fr": ("c", "d"), "it": ("d", "a"), "xx": ()}
    found = pools({name: items(name, ids, 2) for name, ids in named.items()})
    assert sorted(sorted(pool.rows) for pool in found) == [["de", "en", "fr", "it"], ["xx"]]
    assert [pool.items for pool in found if "xx" not in pool.rows] == [4]
