"""What to change where a run does not fit."""

import dataclasses

import pytest

from jaxalign.errors import UserError
from jaxalign.plan.advice import advise, changed, reason, split, text
from jaxalign.plan.run import plan_run
from jaxalign.plan.topology import parse
from tests.plan.conftest import config


def plan_of(place, *words, only=("task",)):
    return plan_run(config(*words), parse(place), only, how="formula")


def test_a_run_that_does_not_fit_is_told_with_a_way_out():
    plan = plan_of("v5e:2x4", "batch.size=64", "model.remat=none")
    assert not plan.fits
    told = reason(plan)
    assert told.startswith("task (64 x 512) needs ")
    assert "GB more than its 16.9 GB" in told
    advices = advise(plan)
    assert advices[0].text == "model.remat=names" or advices[0].text == "model.remat=full"
    for advice in advices:
        other = plan_run(changed(plan.config, advice.words), plan.place, ("task",), how="formula")
        assert other.fits and other.peak == pytest.approx(advice.peak)
    # More than what is enough is not advised.
    assert not any("model.remat=full" in a.text and len(a.words) > 1 for a in advices)


def test_only_what_is_not_set_already_is_advised():
    plan = plan_of("v5e:2x2", "model.remat=full", "model.quantize=int8")
    for advice in advise(plan):
        assert "model.remat" not in advice.words and "model.quantize" not in advice.words


def test_the_compilers_peak_scales_the_formula():
    plan = plan_of("v5e:2x4", "batch.size=64", "model.remat=none")
    larger = dataclasses.replace(
        plan, programs=(dataclasses.replace(plan.programs[0], peak=2 * plan.peak),)
    )
    by_words = {advice.text: advice.peak for advice in advise(plan)}
    again = {advice.text: advice.peak for advice in advise(larger)}
    for words in set(by_words) & set(again):
        assert again[words] == pytest.approx(2 * by_words[words])


def test_what_fits_has_no_reason():
    assert reason(plan_of("v5e:4x4")) == ""


def test_words_become_settings():
    words = {"model.remat": "full", "batch.size": 16, "trainable": "full"}
    before = config()
    after = changed(before, words)
    assert (after.model.remat, after.batch.size, after.trainable) == ("full", 16, "full")
    assert (before.model.remat, before.batch.size) == ("names", 32)
    assert text({"model.remat": "full", "batch.size": 16}) == "model.remat=full batch.size=16"
    with pytest.raises(UserError, match="cannot be trained"):
        changed(before, {"trainable": "full", "model.quantize": "int8"})


SPLIT = {"batch.accumulate": 2, "batch.size": 16, "batch.pairs": 64}


@pytest.mark.parametrize(
    ("settings", "ways", "wanted"),
    [
        ((), 2, SPLIT),
        ((), 4, {"batch.accumulate": 4, "batch.size": 8, "batch.pairs": 32}),
        ((), 8, None),  # 16 pairs are less than a group: other negatives
        (("align.weight=0",), 8, {"batch.accumulate": 8, "batch.size": 4}),
        (("task.weight=0",), 4, {"batch.accumulate": 4, "batch.pairs": 32}),
        (("align.negatives=global",), 2, None),
        (("objectives=[{objective: cka, phase: align}]",), 2, None),
        (("objectives=[{objective: drift, phase: align}]",), 2, SPLIT),
        (("align.objective=cka",), 2, None),
        (("objectives=[{objective: language_matching, phase: task}]",), 2, None),
        # By turns of micro-batches an odd number of them serves other rows in each update.
        (("align.every=microbatch",), 2, None),
        (("align.every=microbatch", "batch.accumulate=3"), 2, None),
        (("align.every=microbatch", "batch.accumulate=2"), 2, SPLIT | {"batch.accumulate": 4}),
        (("align.every=step",), 2, SPLIT),
        (("batch.size=31", "align.weight=0"), 2, None),
    ],
)
def test_micro_batches_are_split_only_where_the_run_stays_the_same(settings, ways, wanted):
    assert split(config(*settings), ways) == wanted
