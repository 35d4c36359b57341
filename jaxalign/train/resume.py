"""Where a run goes on: the state to begin with, and whether the settings are those of the run.

state, progress, start = resume(run, store)      # start: updates done already
meta = meta_of(run, step, progress)              # what is saved with a checkpoint's arrays
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jaxalign.errors import UserError
from jaxalign.settings import Config, flatten
from jaxalign.train import standards
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.setup import Run
from jaxalign.train.state import TrainState


@dataclass
class Progress:
    """What decides about the best checkpoint and about stopping; saved with each checkpoint."""

    best: float | None = None
    waited: int = 0  # evaluations since the best
    metrics: dict[str, float] = field(default_factory=dict)  # of the best

    def see(self, value: float, goal: str, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far (strictly)."""
        better = self.best is None or (value < self.best if goal == "min" else value > self.best)
        if better:
            self.best, self.waited, self.metrics = value, 0, metrics
        else:
            self.waited += 1
        return better


def resume(run: Run, store: Checkpoints) -> tuple[TrainState, Progress, int]:
    """The state to go on from: the newest checkpoint of this output, or the beginning."""
    if store.latest is None:
        standards.settle(run, None)
        return run.state, Progress(), 0
    if run.config.checkpoint.resume == "never":
        raise UserError(
            f"{run.config.output} holds a run at step {store.latest}; choose another output, "
            "or checkpoint.resume=auto to go on with it"
        )
    meta = store.meta()
    check_same(run, meta)
    state, meta = store.restore(run.abstract_state)
    standards.settle(run, meta)
    step = int(meta["step"])
    # What was best may have been saved after this checkpoint; the run will come to it again.
    progress = Progress(**meta["progress"]) if store.forget_best_after(step) else Progress()
    return state, progress, step


# A resumed run must not differ in these; other changes are the user's to make.
FIXED = (
    "trainable",
    "lora.",
    "seed",
    "batch.",
    "align.every",
    "align.states",
    "align.layer",
    "align.pooling",
    "model.dtype",
    "model.quantize",
)


def check_same(run: Run, meta: dict) -> None:
    """Compares this run with what was saved.

    Raises:
      UserError: another base, or a setting that a run must keep.
    """
    output = run.config.output
    if meta["base"] != run.base:
        raise UserError(
            f"{output} was trained on another base model (it was {meta['model']}, now "
            f"{run.config.model.path}); use that base, or another output"
        )
    # A setting that an older version did not save yet was at its default.
    trees = dataclasses.asdict(Config()), meta["config"], dataclasses.asdict(run.config)
    defaults, then, now = (dict(flatten(tree)) for tree in trees)
    for key in then | now:
        was, wanted = (side.get(key, defaults.get(key, "nothing")) for side in (then, now))
        if key.startswith(FIXED) and was != wanted:
            raise UserError(
                f"{output} was trained with {key}={was}, now it is {wanted}; "
                "set it back, or choose another output"
            )


def meta_of(run: Run, step: int, progress: Progress) -> dict[str, Any]:
    """What is saved with a checkpoint's arrays, as JSON."""
    return {
        "step": step,
        "base": run.base,
        "model": run.config.model.path,
        "progress": dataclasses.asdict(progress),
        "standards": standards.to_meta(run.frozen.standards),
        "config": dataclasses.asdict(run.config),
    }
