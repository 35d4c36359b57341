"""Where a run goes on: the state to begin with, and whether it is the same run.

start = resume(run, store)                       # start.state, start.step: updates done already
meta = meta_of(run, start, step, progress, 'evaluated')     # saved with a checkpoint's arrays
"""

from __future__ import annotations

import dataclasses
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.multihost import text_from_main
from jaxalign.settings import Config
from jaxalign.train import standards
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.same import began_from, differences, digests, same_start
from jaxalign.train.schedule import learning_rate, warmup_steps
from jaxalign.train.setup import Run
from jaxalign.train.state import TrainState

# What a sentence calls a digest that differs; else it is of rows.
COMPARED = {
    "options": "numbers in the file of {of}",
    "code": "lines in the code of {of}",
    "sample": "rows of {of}",
    "packed": "packed sequences of {of}.train (which follow from mesh.seq, batch.* and prompt.*)",
}

JUDGES = ("valid", "sample")  # rows that may be others until something was judged by them


@dataclass
class Progress:
    """What decides about the best checkpoint and about stopping; saved with each checkpoint."""

    best: float | None = None
    waited: int = 0  # evaluations since the best
    metrics: dict[str, float] = field(default_factory=dict)  # of the best
    best_step: int | None = None  # whose weights are kept

    def see(self, value: float, goal: str, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far (strictly).

        What is not finite never is, nor what comes with a loss that is not: a model without finite
        numbers has an accuracy of 0, which could be the best.
        """
        losses = [number for name, number in metrics.items() if name.endswith("loss")]
        finite = np.isfinite([value, *losses]).all()
        better = self.best is None or (value < self.best if goal == "min" else value > self.best)
        if better and finite:
            self.best, self.waited, self.metrics = value, 0, metrics
        else:
            self.waited += 1
        return bool(better and finite)


@dataclass(frozen=True)
class Start:
    """Where a run goes on, and what it is known by."""

    state: TrainState
    progress: Progress
    step: int  # updates done
    evaluated: bool  # whether what is due after this step was judged
    identity: str  # of the run, the same from its first update to its last
    data: dict[str, str]  # digests of its rows, its options' files and its own code
    began_from: str  # digest of the adapter that it began from
    notes: tuple[str, ...] = ()  # for the reader
    changed: dict[str, Any] = field(default_factory=dict)  # for the log


def resume(run: Run, store: Checkpoints) -> Start:
    """The state to go on from: the furthest intact checkpoint of this output, or the beginning.

    Raises:
      UserError: the output holds another run, or one of which nothing is intact.
    """
    data, before = digests(run), began_from(run.config)
    found = store.furthest(run.abstract_state, lambda meta: check_same(run, meta, data))
    standards.settle(run, found.meta if found else None)
    if found is None:
        identity = text_from_main(uuid.uuid4().hex)
        return Start(run.state, Progress(), 0, True, identity, data, before)
    step, meta = found.place.step, found.meta
    identity = str(meta.get("run", ""))  # older versions gave none
    progress, lost = _progress(store, meta, step)
    longer = _longer(run.config, meta.get("total"), run.total, step)
    return Start(
        found.state,
        progress,
        step,
        bool(meta.get("evaluated", True)),
        identity,
        data,
        before,
        (*found.notes, *lost, *longer),
        {"total": [meta["total"], run.total]} if meta.get("total", run.total) != run.total else {},
    )


def _progress(store: Checkpoints, meta: dict, step: int) -> tuple[Progress, tuple[str, ...]]:
    progress = Progress(**meta["progress"])
    # What was best may have been saved after this checkpoint; the run will come to it again.
    later = store.best is not None and store.best > step
    remains = store.forget_best_after(step)
    if progress.best is None:
        return progress, ()
    if progress.best_step is None:  # of an older version
        progress.best_step = store.best
    if remains and store.best == progress.best_step:
        return progress, ()
    lost = "" if later else (
        f"the best checkpoint (step {progress.best_step}) no longer exists; from here on the best "
        "is chosen anew"
    )  # fmt: skip
    return Progress(), (lost,) if lost else ()


def _longer(config: Config, before: int | None, now: int, step: int) -> tuple[str, ...]:
    """What to say where updates already done had other learning rates than with this length."""
    if before is None or before == now:
        return ()
    optim, done = config.optim, np.arange(step)
    old, new = (
        learning_rate(
            optim.schedule,
            optim.learning_rate,
            total,
            warmup_steps(total, optim.warmup_steps, optim.warmup_ratio),
        )
        for total in (before, now)
    )
    if np.array_equal(old(done), new(done)):
        return ()
    return (
        f"the run now has {now:,} updates instead of {before:,}. After update {step:,}, the "
        f"learning rate ({optim.schedule}) follows the new length: {float(new(step)):.2e} next, "
        f"where it would have been {float(old(step)):.2e}",
    )


def check_same(run: Run, meta: dict, data: dict[str, str] | None = None) -> None:
    """Compares this run with what was saved.

    Args:
      run: as it is asked for.
      meta: of a checkpoint.
      data: digests of the run's rows, files and code.

    Raises:
      UserError: another base, other rows, other settings, or fewer updates than are done.
    """
    output = run.config.output
    if meta["base"] != run.base.fingerprint:
        raise UserError(
            f"{output} was trained on another base model (it was {meta['model']}, now "
            f"{run.config.model.path}); use that base, or another output"
        )
    judged = meta["progress"].get("best") is not None
    check_settings(run.config, meta, judged)
    known = meta.get("data", {})
    for name, digest in (data or {}).items():
        part, of = name.split("/")
        if known.get(name, digest) != digest and (judged or part not in JUDGES):
            what = COMPARED.get(part, "rows of {of}.{part}").format(of=of, part=part)
            raise UserError(
                f"{output} was trained with other {what} than are there now; use those "
                f"{what.split()[0]}, or choose another output"
            )
    check_length(run.config, meta["step"], run.total)


def check_length(config: Config, done: int, total: int) -> None:
    """Compares the updates that are done with those that the run should have.

    Raises:
      UserError: fewer than are done.
    """
    if total < done:
        raise UserError(
            f"{config.output} has done {done} updates, now the run should have {total}; raise "
            "train.steps, or choose another output"
        )


def check_settings(config: Config, saved: dict[str, Any], judged: bool) -> None:
    """Compares settings with those that were saved.

    Args:
      saved: a checkpoint's meta or a run's record: its `config`, and perhaps `began_from`.

    Raises:
      UserError: some that must not change are different.
    """
    found = differences(saved["config"], dataclasses.asdict(config), judged)
    same = same_start(saved, config)
    if same is False:
        raise UserError(
            f"{config.output} began from another adapter than {config.adapter.start} holds now; "
            "name that one as adapter.start, or choose another output"
        )
    if same:
        found = [one for one in found if one[0] != "adapter.start"]  # its folder may move
    if found:
        was = "; ".join(f"with {key}={old}, now it is {new}" for key, old, new in found)
        back = "it" if len(found) == 1 else "them"
        raise UserError(
            f"{config.output} was trained {was}; set {back} back, or choose another output"
        )


def meta_of(
    run: Run, start: Start, step: int, progress: Progress, evaluated: bool
) -> dict[str, Any]:
    """What is saved with a checkpoint's arrays, as JSON."""
    return {
        "step": step,
        "run": start.identity,
        "base": run.base.fingerprint,
        "model": run.config.model.path,
        "data": start.data,
        "began_from": start.began_from,
        "total": run.total,
        "evaluated": evaluated,
        "progress": dataclasses.asdict(progress),
        "standards": standards.to_meta(run.frozen.standards),
        "config": dataclasses.asdict(run.config),
    }
