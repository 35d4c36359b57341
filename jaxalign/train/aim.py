"""The number that chooses the best checkpoint: whether it is measured, and which way is better.

aim = aim_of(config, measured, scores)           # before anything expensive
aim.value(values), aim.goal
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxalign.data.loader import Stream, each
from jaxalign.errors import UserError
from jaxalign.objectives import Loss
from jaxalign.settings import Config
from jaxalign.train.phases import PHASES, facts_of
from jaxalign.train.phases.facts import term_name

# The last part of a name -> its direction; losses are small, the scores of answers large.
DIRECTIONS = {"loss": "min", "retrieval": "max", "accuracy": "max", "agreement": "max"}


@dataclass(frozen=True)
class Aim:
    """A metric and its direction."""

    metric: str
    goal: str  # min | max

    def value(self, values: dict[str, float]) -> float:
        """The metric's value.

        Raises:
          UserError: it was not measured.
        """
        if self.metric not in values:
            raise _unknown(self.metric, values)
        return values[self.metric]


def aim_of(config: Config, measured: Collection[str], scores: Collection[str] | None) -> Aim | None:
    """What is watched, or None where nothing is measured.

    Args:
      measured: the names that validation gives.
      scores: those of a judge of answers, all the better the larger; None: not known beforehand.

    Raises:
      UserError: the metric is not measured; its direction is unknown, or is not the one given.
    """
    metric, goal = config.train.metric, config.train.goal
    if not measured and scores is not None and not scores:
        if metric != "eval/loss":
            raise UserError(
                f"train.metric: {metric} needs validation rows; name task.valid or align.valid"
            )
        return None
    if not measured and metric == "eval/loss":
        raise UserError(
            "train.metric: eval/loss needs validation rows; name task.valid, or choose a score of "
            "the sample, as in train.metric=eval/slot_f1"
        )
    if metric not in measured and scores is not None and metric not in scores:
        raise _unknown(metric, {*measured, *scores})
    found = "max" if scores and metric in scores else DIRECTIONS.get(_last(metric))
    if goal == "auto":
        if found is None:
            raise UserError(
                f"train.goal: whether {metric} should be small or large is not known; set "
                "train.goal=min or train.goal=max"
            )
        return Aim(metric, found)
    if found not in (None, goal) and not _own(config, metric):
        raise UserError(
            f"train.goal: {goal} would keep the worst {metric}; set train.goal=auto, or {found}"
        )
    return Aim(metric, goal)


def measured_by(
    config: Config, valid: dict[str, Stream], trace: Callable[[str, Any], dict[str, Loss]]
) -> set[str]:
    """The names that validation gives for these streams; those of terms where one is asked for.

    Args:
      config: says what is asked for.
      valid: phase -> its validation rows.
      trace: (phase, batch) -> each term's Loss as shapes; nothing is computed.
    """
    names = {f"eval/{phase}_loss" for phase in valid}
    names |= {"eval/loss"} if valid else set()
    names |= {score for phase in valid for score in facts_of(config, phase).scores}
    if config.train.metric in names:
        return names
    for phase, stream in valid.items():
        stacked = stream.blank(stream.lengths[0], 1)
        for term, loss in trace(phase, each(lambda array: array[0], stacked)).items():
            names |= {f"eval/{phase}/{term}/{what}" for what in loss.logs}
    return names


def _own(config: Config, metric: str) -> bool:
    """Whether an objective of one's own logs it: what is good there, its author knows."""
    return any(
        ":" in part.objective and metric.startswith(f"eval/{facts.name}/{term_name(part)}/")
        for facts in map(partial(facts_of, config), PHASES)
        for _, part in facts.objectives(config)
    )


def _last(metric: str) -> str:
    return metric.rpartition("/")[2].rpartition("_")[2]


def _unknown(metric: str, names: Collection[str]) -> UserError:
    return UserError(
        f"train.metric: {metric!r} is not measured; choose among {', '.join(sorted(names))}"
    )
