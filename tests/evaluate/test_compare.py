"""Means, spreads and p values against numbers worked out by hand or by enumeration."""

import itertools
import json
import math
import time

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.evaluate.comparable import System
from jaxalign.evaluate.compare import compare
from jaxalign.evaluate.measure import Measure, Scored, f1, share
from jaxalign.evaluate.tally import sign_test


def hits(*rows: int, name: str = "exact_match", **counts: int) -> Scored:
    """A language whose rows are right (1) or wrong (0)."""
    parts = np.array([[hit, 1] for hit in rows], float)
    return Scored((Measure(name, parts, share),), (None,) * len(rows), counts)


def some(right: int, rows: int) -> Scored:
    """The first `right` of so many rows are right."""
    return hits(*([1] * right + [0] * (rows - right)))


BASE = System("base", [{"en": some(3, 4), "cy": some(1, 4), "sw": some(2, 8)}])
BETTER = System("better", [{"en": some(3, 4), "cy": some(2, 4), "sw": some(1, 8)}])


def test_groups_are_macro_means_in_the_given_order():
    found = compare([BASE], {"transfer": ["sw", "cy"]}, draws=10)
    assert found.groups == {"transfer": ["sw", "cy"], "other": ["en"], "all": ["en", "cy", "sw"]}
    groups = found.measures["exact_match"].groups["base"]
    # 3 of 12 rows would be 25 as well; with 4 and 8 rows the mean of all is not the share of all.
    assert groups["transfer"].mean == pytest.approx((25 + 25) / 2)
    assert groups["all"].mean == pytest.approx((75 + 25 + 25) / 3)  # not 6 of 16 rows: 37.5
    assert groups["all"].rows == 16
    assert groups["all"].std is None
    assert found.measures["exact_match"].group_gains == {}


def test_no_groups_means_all_only():
    assert list(compare([BASE], {}, draws=1).groups) == ["all"]


def test_languages_a_group_names_but_nobody_measured_are_told():
    found = compare([BASE], {"aligned": ["cy", "xx"], "unseen": ["yy"]}, draws=1)
    assert found.absent == {"aligned": ["xx"], "unseen": ["yy"]}
    assert found.groups["aligned"] == ["cy"]
    assert "unseen" not in found.groups


def test_spread_over_seeds_by_hand():
    runs = [{"en": some(2, 4), "cy": some(0, 4)}, {"en": some(4, 4), "cy": some(1, 4)}]
    found = compare([System("a", runs)], {}, draws=1).measures["exact_match"]
    english = found.languages["a"]["en"]
    assert english.seeds == [50, 100]
    assert english.mean == 75
    assert english.std == pytest.approx(50 / math.sqrt(2))  # n - 1
    # Per seed first: means 25 and 62.5.
    assert found.groups["a"]["all"].seeds == [25, 62.5]
    assert found.groups["a"]["all"].std == pytest.approx(37.5 / math.sqrt(2))


def test_corpus_scores_are_no_means_of_rows():
    parts = np.array([[1, 1, 1], [1, 4, 5]], float)  # row F1: 100 and 22.2
    scored = Scored((Measure("slot_f1", parts, f1),), (None, None))
    found = compare([System("a", [{"en": scored}])], {}, draws=1)
    assert found.measures["slot_f1"].languages["a"]["en"].mean == pytest.approx(100 * 4 / 11)


def test_gains_wins_and_losses():
    found = compare([BASE, BETTER], {"transfer": ["cy", "sw"]}, draws=50).measures["exact_match"]
    gains = found.language_gains["better"]
    assert [gains[name].gain for name in ("en", "cy", "sw")] == pytest.approx([0, 25, -12.5])
    all_gain = found.group_gains["better"]["all"]
    assert all_gain.gain == pytest.approx(12.5 / 3)
    tally = all_gain.languages
    assert (tally.wins, tally.losses, tally.ties, tally.p) == (1, 1, 1, 1)
    assert (all_gain.rows.wins, all_gain.rows.losses, all_gain.rows.ties) == (1, 1, 14)
    assert (gains["cy"].rows.wins, gains["cy"].rows.losses) == (1, 0)
    assert gains["cy"].languages is None
    assert found.group_gains["better"]["transfer"].rows.ties == 10
    assert "base" not in found.group_gains


def test_rows_are_won_by_the_share_of_seeds_that_got_them_right():
    base = System("base", [{"en": hits(1, 0, 0)}, {"en": hits(1, 1, 0)}])
    other = System("other", [{"en": hits(0, 1, 1)}, {"en": hits(1, 1, 1)}])
    rows = compare([base, other], {}, draws=5).measures["exact_match"]
    found = rows.language_gains["other"]["en"].rows
    assert (found.wins, found.losses, found.ties) == (2, 1, 0)


def test_rows_are_not_won_where_they_are_not_right_or_wrong():
    slots = Scored((Measure("slot_f1", np.ones((3, 3)), f1),), (None,) * 3)
    tries = Scored((Measure("slot_f1", np.array([[1.0, 2.0]] * 3), share),), (None,) * 3)
    for scored in (slots, tries):
        found = compare([System(name, [{"en": scored}]) for name in "ab"], {}, draws=5)
        assert found.measures["slot_f1"].language_gains["b"]["en"].rows is None
        assert found.measures["slot_f1"].group_gains["b"]["all"].rows is None


def test_a_system_against_itself_is_never_significant():
    rng = np.random.default_rng(0)
    same = {"en": hits(*rng.integers(0, 2, 200)), "cy": hits(*rng.integers(0, 2, 100))}
    found = compare([System("a", [same]), System("b", [same])], {}, draws=200)
    gain = found.measures["exact_match"].group_gains["b"]["all"]
    assert (gain.gain, gain.low, gain.high, gain.p) == (0, 0, 0, 1)


def test_p_and_interval_are_those_of_all_resamples():
    base, other = (0, 0, 1, 0, 1), (1, 1, 0, 1, 1)
    differences = 100 * (np.array(other) - np.array(base))
    every = differences[np.array(list(itertools.product(range(5), repeat=5)))].mean(axis=1)
    assert len(every) == 3125
    systems = [System("a", [{"en": hits(*base)}]), System("b", [{"en": hits(*other)}])]
    gain = compare(systems, {}, draws=40_000).measures["exact_match"].language_gains["b"]["en"]
    expected = 2 * min(np.mean(every <= 1e-9), np.mean(every >= -1e-9))
    assert 0.1 < expected < 0.9
    assert gain.p == pytest.approx(expected, abs=0.01)  # 4 standard errors
    low, high = np.percentile(every, [2.5, 97.5])
    assert (gain.low, gain.high) == (pytest.approx(low), pytest.approx(high))


def test_a_clear_difference_has_the_smallest_p_that_the_draws_allow():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.3
    better = base | (rng.random(400) < 0.3)
    systems = [System("a", [{"en": hits(*base)}]), System("b", [{"en": hits(*better)}])]
    gain = compare(systems, {}, draws=999).measures["exact_match"].language_gains["b"]["en"]
    assert gain.p == pytest.approx(2 / 1000)
    assert 0 < gain.low < gain.gain < gain.high
    swapped = compare(systems[::-1], {}, draws=999).measures["exact_match"]
    assert swapped.language_gains["a"]["en"].p == gain.p
    assert swapped.language_gains["a"]["en"].gain == pytest.approx(-gain.gain)


def test_systems_are_paired():
    """Independent resamples would not see a gain this small in rows this noisy."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 1000)
    other = base.copy()
    other[np.flatnonzero(base == 0)[:12]] = 1
    found = compare([System("a", [{"en": hits(*base)}]), System("b", [{"en": hits(*other)}])], {})
    gain = found.measures["exact_match"].language_gains["b"]["en"]
    assert gain.p < 0.01
    assert gain.high - gain.low == pytest.approx(4 * math.sqrt(0.012 / 1000) * 100, rel=0.15)


def test_seeds_share_the_resampled_rows():
    """With a seed that mirrors another the mean over seeds is constant in every resample."""
    rng = np.random.default_rng(0)
    half = rng.integers(0, 2, 60)
    base = System("a", [{"en": hits(*([0] * 60))}])
    other = System("b", [{"en": hits(*half)}, {"en": hits(*(1 - half))}])
    gain = compare([base, other], {}, draws=100).measures["exact_match"].language_gains["b"]["en"]
    assert (gain.low, gain.high) == (pytest.approx(50), pytest.approx(50))


def test_groups_resample_each_language_on_its_own():
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 2, 300) for name in ("de", "nl", "da", "sv")}
    base = System("a", [{name: hits(*([0] * 300)) for name in rows}])
    other = System("b", [{name: hits(*row) for name, row in rows.items()}])
    found = compare([base, other], {}).measures["exact_match"]
    one, mean = found.language_gains["b"]["de"], found.group_gains["b"]["all"]
    # Were the languages resampled alike, copies of one test set would not narrow the interval.
    assert (mean.high - mean.low) == pytest.approx((one.high - one.low) / 2, rel=0.15)


def test_the_seed_decides_and_other_languages_do_not():
    rng = np.random.default_rng(0)

    def system(name):
        return System(name, [{lang: hits(*rng.integers(0, 2, 90)) for lang in ("en", "cy")}])

    a, b = system("a"), system("b")
    first, again, other = (compare([a, b], {}, draws=64, seed=seed) for seed in (1, 1, 2))
    assert first.as_json() == again.as_json()
    assert first.as_json() != other.as_json()
    welsh = [System(s.name, [{"cy": s.runs[0]["cy"]}]) for s in (a, b)]
    alone = compare(welsh, {}, draws=64).measures["exact_match"].language_gains["b"]["cy"]
    assert alone == first.measures["exact_match"].language_gains["b"]["cy"]


def test_blocks_do_not_change_the_result(monkeypatch):
    whole = compare([BASE, BETTER], {}, draws=37)
    monkeypatch.setattr("jaxalign.evaluate.resample.BLOCK", 30)
    assert compare([BASE, BETTER], {}, draws=37).as_json() == whole.as_json()


def test_sign_test_by_hand():
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert sign_test(1, 9) == sign_test(9, 1)
    exact = 2 * sum(math.comb(3000, k) for k in range(1401)) / 2**3000
    assert sign_test(1600, 1400) == pytest.approx(exact, rel=1e-9)


def test_counts_are_summed_over_languages_and_averaged_over_seeds():
    runs = [
        {"en": hits(1, ill_formed=2), "cy": hits(1, ill_formed=1, empty=1)},
        {"en": hits(1), "cy": hits(1, ill_formed=2)},
    ]
    assert compare([System("a", runs)], {}, draws=1).counts["a"] == {
        "ill_formed": 2.5,
        "empty": 0.5,
    }


def test_signatures_are_kept_once():
    measures = BASE.runs[0]["en"].measures
    details = ({"bleu_signature": "v:2.6", "types": {}}, {"bleu_signature": "v:2.6"}, {"note": "x"})
    runs = [{"en": Scored(measures, (), details=each)} for each in details]
    found = compare([System("a", runs)], {}, draws=1)
    assert found.signatures == ["bleu signature: v:2.6", "note: x"]


def test_json_is_json():
    found = compare([BASE, BETTER], {"transfer": ["cy"]}, draws=5).as_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["systems"] == ["base", "better"]


def test_52_languages_take_seconds():
    rng = np.random.default_rng(0)
    systems = [
        System(name, [{f"l{n}": hits(*rng.integers(0, 2, 1000)) for n in range(52)}])
        for name in "ab"
    ]
    start = time.perf_counter()
    compare(systems, {})
    assert time.perf_counter() - start < 20  # about 1 s on one idle core


@pytest.mark.parametrize(
    "systems, words",
    [
        ([], ["no system"]),
        ([BASE, BASE], ["'base'"]),
        ([BASE, System("b", [])], ["b:", "evaluate"]),
        ([BASE, System("b", [{"en": some(1, 4)}])], ["b ", "cy, sw"]),
        ([System("b", [{"en": some(1, 4)}]), BASE], ["b ", "cy, sw"]),
        (
            [System("b", [{"en": some(1, 4)}, {"cy": some(1, 4)}])],
            ["b, run 1", "cy"],
        ),
        (
            [System("a", [{"en": some(1, 4)}]), System("b", [{"en": some(1, 5)}])],
            ["b:", "en", "5 rows", "4"],
        ),
        (
            [System("a", [{"en": some(1, 4)}]), System("b", [{"en": hits(1, 0, 0, 0, name="f1")}])],
            ["b:", "exact_match, f1"],
        ),
        ([System("a", [{"en": Scored((Measure("x", np.zeros((0, 2)), share),), ())}])], ["en"]),
    ],
)
def test_what_cannot_be_compared_is_told(systems, words):
    with pytest.raises(UserError) as caught:
        compare(systems, {}, draws=5)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("groups, draws", [({"all": ["en"]}, 5), ({"other": ["en"]}, 5), ({}, 0)])
def test_settings_that_cannot_be(groups, draws):
    with pytest.raises(UserError):
        compare([BASE], groups, draws=draws)


def named(scored: Scored, *ids: str) -> Scored:
    return Scored(scored.measures, scored.read, ids=ids)


def test_translations_are_resampled_together():
    """Two copies of one language tell no more than one: their mean is as uncertain as either."""
    right, wrong = hits(*[1, 0, 1, 0, 1, 1, 0, 0]), hits(*[0, 0, 1, 0, 0, 1, 0, 0])
    ids = tuple("abcdefgh")

    def interval(join: str) -> float:
        names = {"en": ids, "cy": ids if join == "same" else tuple(i + "2" for i in ids)}
        systems = [
            System(name, [{lang: named(part, *names[lang]) for lang in names}])
            for name, part in (("base", wrong), ("better", right))
        ]
        found = compare(systems, {}, draws=4000).measures["exact_match"]
        alone = found.language_gains["better"]["en"]
        both = found.group_gains["better"]["all"]
        return (both.high - both.low) / (alone.high - alone.low)

    assert interval("same") == pytest.approx(1)
    assert interval("apart") < 0.85


def test_rows_in_another_order_are_refused():
    systems = [
        System("a", [{"en": named(some(1, 2), "x", "y")}]),
        System("b", [{"en": named(some(1, 2), "y", "x")}]),
    ]
    with pytest.raises(UserError, match="b: the rows of en are not those of a"):
        compare(systems, {})
