"""What chooses the best checkpoint is known to be measured, and which way is better, beforehand."""

import pytest

from jaxalign import base as bases
from jaxalign.errors import UserError
from jaxalign.train import setup
from jaxalign.train.aim import Aim, aim_of
from tests.train.test_loop import use_devices

MEASURED = {"eval/loss", "eval/task_loss", "eval/retrieval", "eval/task/language_model/accuracy",
            "eval/align/distil/agreement",
            "eval/align/contrastive/spread"}  # fmt: skip
SCORES = {"eval/slot_f1", "eval/slot_f1/de"}


@pytest.mark.parametrize(
    ("metric", "goal"),
    [
        ("eval/loss", "min"),
        ("eval/task_loss", "min"),
        ("eval/retrieval", "max"),
        ("eval/task/language_model/accuracy", "max"),
        ("eval/align/distil/agreement", "max"),
        ("eval/slot_f1", "max"),
        ("eval/slot_f1/de", "max"),
    ],
)
def test_each_metric_knows_its_direction(configure, metric, goal):
    asked = f"train.metric={metric}"
    aim = aim_of(configure(asked), MEASURED, SCORES)
    assert aim == aim_of(configure(asked, f"train.goal={goal}"), MEASURED, SCORES)
    assert aim == Aim(metric, goal)
    other = {"min": "max", "max": "min"}[goal]
    with pytest.raises(UserError, match=f"{other} would keep the worst {metric}; set"):
        aim_of(configure(asked, f"train.goal={other}"), MEASURED, SCORES)


def test_a_direction_that_nobody_knows(configure):
    asked = "train.metric=eval/align/contrastive/spread"
    with pytest.raises(UserError, match=r"is not known; set train\.goal=min or train.goal=max"):
        aim_of(configure(asked), MEASURED, SCORES)
    assert aim_of(configure(asked, "train.goal=max"), MEASURED, SCORES).goal == "max"
    # A judge of one's own may measure anything, and says how by the setting.
    own = configure("train.metric=eval/own", "train.goal=max")
    assert aim_of(own, MEASURED, None) == Aim("eval/own", "max")


def test_the_metric_of_an_objective_of_ones_own_takes_either_goal(configure):
    """An adversary is good where its accuracy is small; a name does not tell."""
    term = "objectives=[{objective: 'mine:adversary', phase: align}]"
    metric = "eval/align/adversary/accuracy"
    for goal in ("min", "max"):
        config = configure(term, f"train.metric={metric}", f"train.goal={goal}")
        assert aim_of(config, {*MEASURED, metric}, SCORES) == Aim(metric, goal)
    config = configure(term, f"train.metric={metric.replace('align', 'task')}", "train.goal=min")
    with pytest.raises(UserError, match="min would keep the worst"):
        aim_of(config, {*MEASURED, config.train.metric}, SCORES)


def test_what_is_not_measured(configure):
    with pytest.raises(UserError, match=r"'eval/f1' is not measured; choose among eval/align/"):
        aim_of(configure("train.metric=eval/f1"), MEASURED, SCORES)
    with pytest.raises(UserError, match=r"eval/retrieval needs validation rows"):
        aim_of(configure("train.metric=eval/retrieval"), (), ())
    with pytest.raises(UserError, match=r"eval/loss needs validation rows"):
        aim_of(configure(), (), SCORES)
    assert aim_of(configure(), (), ()) is None


def test_names_are_checked_before_weights_are_loaded(configure, monkeypatch):
    use_devices(monkeypatch, 1)

    def load(*_):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(bases, "load_params", load)
    with pytest.raises(UserError, match="'eval/task/language_model/accurcy' is not measured"):
        setup.prepare(configure("train.metric=eval/task/language_model/accurcy"))
    with pytest.raises(AssertionError, match="weights are loaded"):
        setup.prepare(configure("train.metric=eval/task/language_model/accuracy"))
