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
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxalign.config import to_yaml
from jaxalign.data.loader import prefetch
from jaxalign.errors import UserError
from jaxalign.hf.peft import save_peft
from jaxalign.hf.peft_config import vllm_limits
from jaxalign.hf.save import save_base
from jaxalign.multihost import barrier, is_main
from jaxalign.paths import Desk
from jaxalign.settings import Config, flatten
from jaxalign.sharding import put_batch
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.memory import telling_memory
from jaxalign.train.metrics import Log
from jaxalign.train.pace import Work
from jaxalign.train.setup import Run, prepare
from jaxalign.train.state import TrainState
from jaxalign.train.step import combine
from jaxalign.train.validate import validate
from jaxalign.train.warm import warm_up
from jaxalign.train.watch import Watch


@dataclass
class Result:
    """What a run leaves behind."""

    adapter: str  # PEFT folder, or under full fine-tuning a model folder
    step: int  # updates done
    best_step: int | None  # of the exported weights, where validation chose them
    metrics: dict[str, float] = field(default_factory=dict)  # the last (or best) validation
    stopped: str = "finished"  # finished | patience | signal

    @property
    def exit_code(self) -> int:
        """143 after a stop on request, as of a program that SIGTERM ended: a cluster takes 0 for a
        finished run and starts no other try."""
        return 128 + signal.SIGTERM if self.stopped == "signal" else 0


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


Judge = Callable[[Run, TrainState], dict[str, float]]


def train(config: Config, title: str = "training", judge: Judge | None = None) -> Result:
    """Trains as the configuration says, resuming where an earlier run of it stopped.

    Args:
      config: the run.
      title: of the progress bar.
      judge: looked up at every validation for more `eval/...` values, such as scores of what the
        model writes; every process calls it.

    Raises:
      UserError: anything the user can mend; see `setup.prepare` and `Checkpoints`.
    """
    with (
        Desk(config.output) as desk,
        telling_memory(desk.folder),
        Watch(config, desk.folder) as watch,
    ):
        run = prepare(config)
        if judge and not run.valid and config.train.metric == "eval/loss":
            raise UserError(
                "train.metric: eval/loss needs validation rows; name task.valid, or choose a score "
                "of the sample, as in train.metric=eval/slot_f1 train.goal=max"
            )
        with jax.set_mesh(run.mesh):
            return _train(run, title, judge, desk, watch)


def _train(run: Run, title: str, judge: Judge | None, desk: Desk, watch: Watch) -> Result:
    config = run.config
    store = Checkpoints(desk.output, config.checkpoint.keep)
    state, progress, start = _resume(run, store)
    log = _open_log(run, desk, start, title)
    key = jax.random.fold_in(jax.random.key(config.seed), 2) if run.drops else None
    if config.train.warm_up == "ahead":
        with watch.pause("compile"):
            log.message(f"all programs compiled in {warm_up(run, state, key):.1f} s")
    stopped = "finished"
    step = start
    with _stop_signal() as asked, _closing(log, store):
        for batches, work in watch.inputs(_batches(run, start)):
            with watch.update(run.step, step + 1, work) as update:
                state, metrics = update(state, run.frozen, batches, key)
            step += 1
            watch.dispatched(metrics["grad_norm"], work)
            log.update(step, metrics, work, watch.timings())
            _check_first(run, step, start, metrics)
            if _due(step, config.train.cosine_every):
                log.event("gradients", step, _compare_gradients(run, state, step))

            last = step == run.total
            if (run.valid or judge) and (last or _due(step, config.train.eval_every)):
                with watch.pause("evaluate"):
                    values = validate(run, state) | (judge(run, state) if judge else {})
                log.event("eval", step, values)
                log.event("goodput", step, watch.goodput())
                if progress.see(_watched(config, values), config.train.goal, values):
                    with watch.pause("save"):
                        store.save(step, state, _meta(run, step, progress), best=True)
                if config.train.patience and progress.waited >= config.train.patience:
                    stopped = "patience"
            if asked(step) and not last and stopped == "finished":
                stopped = "signal"
            if last or stopped != "finished" or _due(step, config.checkpoint.every):
                with watch.pause("save"):
                    store.save(step, state, _meta(run, step, progress))
                    desk.publish()
            if stopped != "finished":
                break
        log.drain()
        with watch.pause("save"):
            store.wait()
            result = _finish(run, desk, store, state, step, progress, stopped)
        log.event("goodput", step, watch.goodput())
        log.message(watch.sentence())
        return result


def _batches(run: Run, start: int) -> Iterator[tuple[dict, dict[str, Work]]]:
    """Per update: its device batches, and what each phase has to do."""
    host = jax.process_index(), jax.process_count()

    def item(update: int) -> dict:
        return {name: run.train[name].stack(r, *host) for name, r in run.turns(update).items()}

    for batches in prefetch(item, start, run.total):
        work = {name: _work(run, name, batch) for name, batch in batches.items()}
        yield put_batch(run.mesh, batches, stacked=True), work


def _work(run: Run, name: str, batch: Any) -> Work:
    """Tokens of all hosts, padding counted, and least FLOPs."""
    micro, rows, length = batch[0].shape  # of this host
    rows *= micro * jax.process_count()
    answers = rows * batch.answers.shape[-1] if name == "task" else None
    least = run.least_flops(name, rows, length, answers)
    return Work(run.tokens(name, rows, length), least)


def _compare_gradients(run: Run, state: TrainState, step: int) -> dict[str, Any]:
    """Norms and cosine of both phases' gradients on one micro-batch of each.

    Turns by micro-batch and joint training see both phases in one update and log this anyway; it is
    turns by step that need a look of their own.
    """
    host = jax.process_index(), jax.process_count()
    gradients = {}
    for name, stream in run.train.items():
        batch = put_batch(run.mesh, stream.stack([step], *host), stacked=True)
        gradients[name], _ = run.step.gradient(name, state, run.frozen, batch, None)
    return combine(gradients, dict.fromkeys(gradients, 1), run.config.align.every)[1]


def _resume(run: Run, store: Checkpoints) -> tuple[TrainState, Progress, int]:
    """The state to go on from: the newest checkpoint of this output, or the beginning."""
    if store.latest is None:
        return run.state, Progress(), 0
    if run.config.checkpoint.resume == "never":
        raise UserError(
            f"{run.config.output} holds a run at step {store.latest}; choose another output, "
            "or checkpoint.resume=auto to go on with it"
        )
    meta = store.meta()
    _check_same(run, meta)
    state, meta = store.restore(run.abstract_state)
    step = int(meta["step"])
    # What was best may have been saved after this checkpoint; the run will come to it again.
    progress = Progress(**meta["progress"]) if store.forget_best_after(step) else Progress()
    return state, progress, step


# A resumed run must not differ in these; other changes are the user's to make.
FIXED = ("trainable", "lora.", "seed", "batch.", "align.every", "model.dtype", "model.quantize")


def _check_same(run: Run, meta: dict) -> None:
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


def _meta(run: Run, step: int, progress: Progress) -> dict[str, Any]:
    return {
        "step": step,
        "base": run.base,
        "model": run.config.model.path,
        "progress": dataclasses.asdict(progress),
        "config": dataclasses.asdict(run.config),
    }


def _finish(
    run: Run,
    desk: Desk,
    store: Checkpoints,
    state: TrainState,
    step: int,
    progress: Progress,
    stopped: str,
) -> Result:
    """Exports the best weights (the last ones where nothing was validated)."""
    best = store.best if progress.best is not None else None
    if best is not None and best != step:
        state, _ = store.restore(run.abstract_state, best=True)
    name = "adapter" if run.adapter else "model"
    folder = desk.folder / name
    if run.adapter:
        save_peft(
            folder,
            state.trained,
            run.spec,
            run.adapter,
            base_name=run.config.model.path,
            texts=_template(run),
        )
    else:
        save_base(folder, state.trained, run.spec, tokenizer_from=run.config.model.path)
    barrier("exported")
    return Result(f"{desk.output}/{name}", step, best, progress.metrics, stopped)


def _template(run: Run) -> dict[str, str]:
    """The chat template travels with the adapter: prompts must look as they did in training."""
    template = getattr(run.tokenizer, "chat_template", None)
    return {"chat_template.jinja": template} if isinstance(template, str) else {}


def _open_log(run: Run, desk: Desk, start: int, title: str) -> Log:
    config = run.config
    log = Log(
        desk.folder,
        steps=run.total,
        every=config.train.log_every,
        start=start,
        progress=config.log.progress,
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        settings=dict(flatten(dataclasses.asdict(config))),
        title=title,
    )
    if is_main():
        Path(desk.folder, "config.yaml").write_text(to_yaml(config), "utf-8")
    log.message(
        f"{run.trained_count:,} trained parameters; {run.total:,} updates"
        + (f", from step {start:,}" if start else "")
        + f"; mesh {dict(run.mesh.shape)}"
    )
    for name, stream in run.train.items():
        log.message(f"{name}: {stream.report}; padded lengths {list(stream.buckets)}")
    for limit in vllm_limits(run.adapter) if run.adapter else ():
        log.message(f"lora: {limit}")
    return log


def _check_first(run: Run, step: int, start: int, metrics: Any) -> None:
    """After the first update: do the trained parameters receive gradients at all?"""
    if step != start + 1:
        return
    for name in run.active:
        norm = metrics.get(f"{name}/grad_norm")
        if norm is not None and not (float(norm) > 0 and float(norm) < float("inf")):
            align, pairs = run.config.align, run.config.batch.pairs
            if name == "align" and (align.layer == 0 or pairs == 1):
                raise UserError(
                    "align: no gradient reaches the adapter; the embeddings (align.layer=0) are "
                    "frozen and a single pair has no negatives: choose a layer of 1 or more and "
                    "batch.pairs of 2 or more"
                )
            raise UserError(
                f"{name}: the first gradient has norm {float(norm)}; where it is 0, no trained "
                "block sees the rows (lora.layers); where it is not finite, try model.dtype=float32"
            )


def _watched(config: Config, values: dict[str, float]) -> float:
    if config.train.metric not in values:
        raise UserError(
            f"train.metric: {config.train.metric!r} is not measured; choose among "
            f"{', '.join(sorted(values))}"
        )
    return values[config.train.metric]


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


@contextmanager
def _stop_signal() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM (a preempted machine) into a last checkpoint: asked after every step."""
    if jax.process_count() > 1:
        # One process hears it first, and all must leave at the same step: JAX agrees on one.
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    seen: list[float] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: seen.append(time.monotonic()))
    except ValueError:  # not the main thread: the caller handles signals
        yield lambda step: False
        return
    try:
        yield lambda step: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)
