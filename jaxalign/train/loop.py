"""The algorithm: take turns, update, look, keep the best.

for each update:
    the micro-batches whose turn it is      task, align, task, align, ...  (schedule.turns)
    one jitted step over them               losses, gradients, AdamW       (step.train_step)
    now and then: validation, the best kept, patience; a checkpoint

result = train(load('configs/demo.yaml').config)
result.adapter                              # a PEFT folder
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxalign.base import Base
from jaxalign.config import to_yaml
from jaxalign.data.loader import Counted, prefetch
from jaxalign.multihost import is_main
from jaxalign.paths import RECORD, SETTINGS, Desk
from jaxalign.settings import Config, flatten
from jaxalign.settings.together import unread
from jaxalign.sharding import put_batch, rows_here
from jaxalign.train import record
from jaxalign.train.apply import combine
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.clock import Due
from jaxalign.train.finish import ENDS, Result, finish
from jaxalign.train.flops import Work
from jaxalign.train.guard import Guard
from jaxalign.train.memory import telling_memory
from jaxalign.train.metrics import Log
from jaxalign.train.phases import facts_of
from jaxalign.train.resume import Progress, Start, meta_of, resume
from jaxalign.train.setup import Run, prepare
from jaxalign.train.state import TrainState
from jaxalign.train.stop import StopRequested, stop_signal
from jaxalign.train.validate import validate
from jaxalign.train.warm import warm_up
from jaxalign.train.watch import Watch

Judge = Callable[[Run, TrainState], dict[str, float]]


def train(
    config: Config, title: str = "training", judge: Judge | None = None, base: Base | None = None
) -> Result:
    """Trains as the configuration says, resuming where an earlier run of it stopped.

    Args:
      config: the run.
      title: of the progress bar.
      judge: looked up at every validation for more `eval/...` values, such as scores of what the
        model writes; every process calls it. Its attribute `scores`, if it has one, names those
        of which more is better, and `rows` is the digest of the rows by which it judges.
      base: the base of this configuration, where it is opened already.

    Raises:
      UserError: anything the user can mend; see `setup.prepare` and `Checkpoints`.
    """
    with (
        Desk(config.output) as desk,
        telling_memory(desk.folder),
        Watch(config, desk.folder) as watch,
    ):
        if done := record.over(config, desk):
            return done
        scores = getattr(judge, "scores", None) if judge else ()
        run = prepare(config, scores, base, getattr(judge, "rows", ""))
        with jax.set_mesh(run.mesh):
            return _train(run, title, judge, desk, watch)


def _train(run: Run, title: str, judge: Judge | None, desk: Desk, watch: Watch) -> Result:
    config = run.config
    store = Checkpoints(desk.output, config.checkpoint.keep)
    start = resume(run, store)
    state, progress, step = start.state, start.progress, start.step
    # With what is judged at this step again, its lines are written again.
    again = not start.evaluated and _judged_at(run, judge, step)
    log = _open_log(run, desk, start, again, title)
    key = jax.random.fold_in(jax.random.key(config.seed), 2) if run.drops else None
    if config.train.warm_up == "ahead":
        with watch.pause("compile"):
            log.message(f"all programs compiled in {warm_up(run, state, key):.1f} s")
    due = Due(config.checkpoint.every, config.checkpoint.minutes)
    saved, looked = step, set[str]()  # step of the newest checkpoint; phases that had an update

    def save(evaluated: bool, best: bool = False) -> bool:
        """Whether this state is kept now: not one from which nothing finite comes."""
        with watch.pause("save"):  # the device comes to rest first, so that its times are known
            guard.settle(state)
            log.drain()  # no line of an update may be lost that is not done again
            if guard.doubtful and not best:
                return False
            store.save(step, state, meta_of(run, start, step, progress, evaluated), best)
            desk.publish()
        log.drain()  # what follows is not a save
        return True

    def look() -> str:
        """Validation after this update: why to stop, or ''."""
        with watch.pause("evaluate"):
            log.drain()  # what follows is not an update
            values = validate(run, state) | (judge(run, state) if judge else {})
        log.event("eval", step, values)
        log.event("goodput", step, watch.goodput())
        assert run.aim is not None  # something is measured
        if progress.see(run.aim.value(values), run.aim.goal, values):
            progress.best_step = step
            save(evaluated=True, best=True)
        return "patience" if _patient_enough(config, progress) else ""

    guard, batches = Guard(run, log, key), None
    stopped = "patience" if _patient_enough(config, progress) else ""
    with stop_signal() as asked, _closing(log, store):
        run.look_up = lambda: asked.leave(step)
        try:
            if again and not stopped:
                stopped = look()
            for batches, work in () if stopped else watch.inputs(_batches(run, step)):
                with watch.update(run.step, step + 1, work) as update:
                    state, metrics = update(state, run.frozen, batches, key)
                step += 1
                watch.dispatched(metrics["grad_norm"], work)
                log.update(step, metrics, work, watch.timings())
                guard.update(step, state, batches, metrics)
                if step == start.step + 1:
                    _on_record(run, desk)
                for name in work.keys() - looked:
                    for sentence in facts_of(config, name).warnings(config, metrics):
                        log.message(sentence)
                looked |= work.keys()
                if _due(step, config.train.cosine_every):
                    log.event("gradients", step, _compare_gradients(run, state, step))
                judged = _judged_at(run, judge, step)
                if (due(step) or step == run.total) and save(evaluated=not judged):
                    saved = step
                if guard.diverged:
                    stopped = "diverged"
                elif judged:
                    stopped = look()
                if not stopped and asked(step) and step < run.total:
                    stopped = asked.how
                if stopped:
                    break
        except StopRequested:
            judged, stopped = False, asked.how
        stopped = stopped or "finished"
        if ENDS[stopped][0] == 0 and guard.last_look(state, batches, step, progress):
            stopped = "diverged"
        if saved < step:
            save(evaluated=judged)
        log.drain()
        why = guard.sentence(store) if stopped == "diverged" else ""
        with watch.pause("save"):
            store.wait()
            result = finish(run, desk, store, start, state, step, progress, stopped)
            result.why = why
            if result.complete:
                record.write(desk, run, start, progress, result)
        log.event("goodput", step, watch.goodput())
        log.message(watch.sentence())
        return result


def _batches(run: Run, start: int) -> Iterator[tuple[dict, dict[str, Work]]]:
    """Per update: its device batches, and what each phase has to do."""
    places = {name: rows_here(run.mesh, stream.size) for name, stream in run.train.items()}

    def item(update: int) -> tuple[dict, dict[str, Counted]]:
        turns = run.turns(update)
        rows = {name: run.batches(name, r, places[name]) for name, r in turns.items()}
        return rows, {name: run.train[name].counted(r) for name, r in turns.items()}

    for rows, counted in prefetch(item, start, run.total):
        batches = put_batch(run.mesh, rows, stacked=True)
        yield batches, {name: _work(run, name, batches[name], counted[name]) for name in batches}


def _work(run: Run, name: str, batches: Any, counted: Counted) -> Work:
    """Tokens of all hosts, and least FLOPs."""
    parts = [run.work(name, one) for one in (batches if isinstance(batches, list) else [batches])]
    useful = sum(counted.of(one.sides) for one in run.phases[name].passes)
    tokens, flops = sum(part.tokens for part in parts), sum(part.flops for part in parts)
    return Work(tokens, flops, useful)


def _compare_gradients(run: Run, state: TrainState, step: int) -> dict[str, Any]:
    """Norms of the phases' gradients, and the cosine of two, on one micro-batch of each.

    Turns by micro-batch and joint training see all phases in one update and log this anyway; it is
    turns by step that need a look of their own. A rule that looks ahead is compared with the plain
    gradient of the same rows.
    """
    gradients: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, stream in run.train.items():
        places = rows_here(run.mesh, stream.size)
        batches = put_batch(run.mesh, run.batches(name, [step], places), stacked=True)
        gradients[name], _ = run.step.phase(name, state, run.frozen, batches, None)
        found |= run.step.look(name, state, run.frozen, batches, gradients[name])
    return found | combine(gradients, dict.fromkeys(gradients, 1), run.config.align.every)[1]


def _open_log(run: Run, desk: Desk, start: Start, again: bool, title: str) -> Log:
    config = run.config
    log = Log(
        desk.folder,
        steps=run.total,
        every=config.train.log_every,
        start=start.step,
        again=again,
        progress=config.log.progress,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        settings=dict(flatten(dataclasses.asdict(config))),
        title=title,
    )
    if not start.step:
        _on_record(run, desk)
    for note in start.notes:
        log.message(note)
    if start.changed:
        log.event("changed", start.step, start.changed)
    log.message(
        f"{run.trained_count:,} trained parameters; {run.total:,} updates"
        + (f", from step {start.step:,}" if start.step else "")
        + f"; mesh {dict(run.mesh.shape)}"
    )
    for name, stream in run.train.items():
        log.message(f"{name}: {stream.report}; {stream.shape}")
        for called, codes in stream.namesakes.items():
            log.message(
                f"{name}: prompts call {' and '.join(codes)} {called}; to tell them apart, write "
                "names as the languages of these rows (Brazilian Portuguese)"
            )
    for name, stream in run.valid.items():
        if stream.report.shortened:
            log.message(f"{name}.valid: {stream.report}")
        if known := stream.also_in(run.train[name]):
            log.message(
                f"{name}.valid: {known} of {stream.len_rows} rows are in {name}.train, too, and "
                "measure only memorisation; leave them out of one of the two"
            )
    phases = (facts_of(config, name).unread(config) for name in run.phases)
    for sentence in itertools.chain(unread(config), *phases):
        log.message(sentence)
    for limit in run.adapter.limits() if run.adapter else ():
        log.message(f"adapter: {limit}")
    return log


def _on_record(run: Run, desk: Desk) -> None:
    """Writes the settings, once something is trained with them."""
    if is_main():
        Path(desk.folder, SETTINGS).write_text(to_yaml(run.config), "utf-8")
        desk.remove(RECORD)  # of when the run was shorter


def _judged_at(run: Run, judge: Judge | None, step: int) -> bool:
    """Whether validation comes after this update."""
    looks = step == run.total or _due(step, run.config.train.eval_every)
    return bool(step and looks and (run.valid or judge))


def _patient_enough(config: Config, progress: Progress) -> bool:
    return 0 < config.train.patience <= progress.waited


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _closing(log: Log, store: Checkpoints) -> Iterator[None]:
    try:
        yield
    finally:
        try:
            log.close()
        finally:
            store.close()
