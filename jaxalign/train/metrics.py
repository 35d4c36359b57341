"""What a run says about itself: JSONL always, a progress bar on a terminal, trackers as extras.

Numbers stay on the device until their update is over, so logging never makes the accelerator wait.
An update lasts from the moment at which the one before it was seen to be over until it is over
itself; the loop waits for an update of its own accord (`pace`), so that moment is the true one.

    log = Log('runs/demo', steps=400)
    log.update(step, metrics, {'task': Work(tokens=8192, flops=1e12)})
    log.event('eval', step, {'eval/loss': 1.2})
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.chips import of_kind
from jaxalign.errors import missing_extra
from jaxalign.paths import whole_file
from jaxalign.terminal import bars, console
from jaxalign.train.flops import Work
from jaxalign.train.pace import Timing

SHOWN = ("task/loss", "align/loss", "align/contrastive/retrieval", "eval/loss")


@dataclass
class _Window:
    """The updates behind one line of the log."""

    steps: list[tuple[int, Any]] = field(default_factory=list)  # (step, metrics on the device)
    works: list[Work] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether the device has computed all of it."""
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.steps[-1][1]))


class Log:
    """The log of one run; only process 0 writes."""

    def __init__(
        self,
        output: str | Path,
        *,
        steps: int,
        every: int = 10,
        start: int = 0,
        again: bool = False,
        progress: str = "auto",
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: dict[str, Any] | None = None,
        title: str = "training",
    ) -> None:
        self._every, self._writes = every, jax.process_index() == 0
        self._window = _Window()
        self._closed: deque[_Window] = deque()
        self._since = time.monotonic()  # the end of what is logged
        chip = of_kind(jax.devices()[0].device_kind)
        self._peak = chip.flops * jax.device_count() if chip else 0.0
        self._sinks: list[Any] = []
        self._bar: Any = None
        if not self._writes:
            return
        Path(output).mkdir(parents=True, exist_ok=True)
        lines = _Jsonl(Path(output, "log.jsonl"), start, again)
        self._sinks.append(lines)
        if tensorboard:
            self._sinks.append(_tensorboard(str(output)))
        if wandb:
            self._sinks.append(_wandb(wandb, str(output), settings or {}, _tracked(lines, wandb)))
        if progress == "auto":
            self._bar = _Bar(title, steps, start)

    def update(
        self,
        step: int,
        metrics: Any,
        work: Mapping[str, Work],
        timings: Sequence[Timing] = (),
    ) -> None:
        """Takes one update's metrics (still on the device); step counts from 1.

        Args:
          step: of the update.
          metrics: what it computes.
          work: of each phase in it. Tokens per second and MFU of a line are those of all phases
            over the wall time since the line before.
          timings: of phases that ran alone or were timed apart; they give `task/mfu`,
            `align/tokens_per_second` and so on. Where both phases run in every update and
            `log.time_every` is 0 they cannot be separated without holding up the device: there
            are none, and `mfu` is that of both together.
        """
        self._flush()
        self._window.steps.append((step, metrics))
        self._window.works += work.values()
        self._window.timings += timings
        if step % self._every == 0:
            self._close()
        if self._bar:
            self._bar.advance(step)

    def event(self, name: str, step: int, values: dict[str, Any]) -> None:
        """Writes something that happened once, as an evaluation."""
        self.drain()
        self._write(step, name, values)

    def message(self, text: str) -> None:
        """A line for the reader."""
        if self._writes:
            screen = self._bar.console if self._bar else console(soft_wrap=True)
            screen.print(text)

    def drain(self) -> None:
        """Writes what is still on the device, and starts the clock anew: call it before and after
        what is not an update."""
        if self._window.steps:
            self._close()
        while self._closed:
            jax.block_until_ready(self._closed[0].steps)
            self._flush()
        self._since = time.monotonic()

    def close(self) -> None:
        """Ends bar and trackers."""
        try:
            self.drain()
        finally:
            if self._bar:
                self._bar.stop()
            for sink in self._sinks:
                sink.close()

    def _close(self) -> None:
        self._closed.append(self._window)
        self._window = _Window()

    def _flush(self) -> None:
        """Writes the windows that the device is done with; they share the time since the last."""
        over = []
        while self._closed and self._closed[0].over:
            over.append(self._closed.popleft())
        if over:
            now = time.monotonic()
            each = max(now - self._since, 1e-9) / sum(len(window.steps) for window in over)
            self._since = now
            for window in over:
                self._write_window(window, each)

    def _write_window(self, window: _Window, each: float) -> None:
        values = mean_metrics(jax.device_get([metrics for _, metrics in window.steps]))
        values |= self._speed("", each * len(window.steps), window.works)
        values["seconds_per_step"] = each
        values["flops_per_step"] = sum(work.flops for work in window.works) / len(window.steps)
        phases = defaultdict(list)
        for timing in window.timings:
            phases[timing.phase].append(timing)
        for name, timings in phases.items():
            seconds = sum(timing.seconds for timing in timings)
            values |= self._speed(f"{name}/", seconds, [timing.work for timing in timings])
        self._write(window.steps[-1][0], "train", values)

    def _speed(self, prefix: str, seconds: float, works: Sequence[Work]) -> dict[str, float]:
        tokens = sum(work.tokens for work in works)
        found = {f"{prefix}tokens_per_second": tokens / seconds}
        if not prefix:
            found["tokens_useful"] = sum(work.counted for work in works) / max(tokens, 1)
        if self._peak:
            flops = sum(work.flops for work in works)
            found[f"{prefix}mfu"] = flops / seconds / self._peak
        return found

    def _write(self, step: int, event: str, values: dict[str, Any]) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(step, event, plain)
        if self._bar:
            self._bar.show(plain)


def mean_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Each metric's mean over the updates that had it (a phase without a turn has none).

    Updates that were skipped are counted as `skipped`; the means are those of the others, and NaN
    where there is no other.
    """
    names = dict.fromkeys(name for metrics in steps for name in metrics)
    names = dict.fromkeys(name for name in names if not name.endswith("micro_losses"))
    done = [metrics for metrics in steps if not metrics.get("skipped")]
    means = {}
    for name in names:
        values = [float(metrics[name]) for metrics in done if name in metrics]
        means[name] = float(np.mean(values)) if values else math.nan
    if "skipped" in names:
        means["skipped"] = len(steps) - len(done)
    return means


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    # JSON has no NaN; null keeps the line readable by every parser.
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Jsonl:
    """One object a line; lines past the step that a resumed run starts from are dropped first."""

    def __init__(self, path: Path, start: int, again: bool) -> None:
        self.kept: list[dict[str, Any]] = []
        kept = []
        if path.exists() and start:
            for line in path.read_text("utf-8").splitlines():
                try:
                    row = json.loads(line)
                    # What is judged again is written again.
                    repeated = again and row["event"] in ("eval", "goodput")
                    if row["step"] < start + (not repeated):
                        kept.append(line + "\n")
                        self.kept.append(row)
                except (ValueError, KeyError, TypeError):
                    continue  # the line a dying run did not finish
        with whole_file(path) as new:
            new.write_text("".join(kept), "utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, event: str, values: dict[str, Any]) -> None:
        stamp = round(time.time(), 3)
        line = {"step": step, "event": event, "time": stamp, **values}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


class _Bar:
    """A progress bar with the losses."""

    def __init__(self, title: str, steps: int, start: int) -> None:
        self._progress = bars("{task.fields[losses]}")
        self.console = self._progress.console
        self._task = self._progress.add_task(title, total=steps, completed=start, losses="")
        self._shown: dict[str, float] = {}
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, values: dict[str, Any]) -> None:
        self._shown |= {name: values[name] for name in SHOWN if values.get(name) is not None}
        text = "  ".join(f"{name} {value:.3f}" for name, value in self._shown.items())
        self._progress.update(self._task, losses=text)

    def stop(self) -> None:
        self._progress.stop()


class _Tracker:
    """A tracker behind write and close."""

    def __init__(self, write: Any, close: Any) -> None:
        self.write, self.close = write, close


def _tensorboard(output: str) -> _Tracker:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise missing_extra("tensorboardX", "log") from error
    writer = SummaryWriter(output)

    def write(step: int, event: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, step)

    return _Tracker(write, writer.close)


def _tracked(lines: _Jsonl, project: str) -> str:
    """The id under which the tracker knows this run; it stays with the log, as a resumed run."""
    for row in lines.kept:
        if row["event"] == "wandb" and row.get("project") == project:
            return str(row["id"])
    made = uuid.uuid4().hex[:16]
    lines.write(0, "wandb", {"project": project, "id": made})
    return made


def _wandb(project: str, output: str, settings: dict[str, Any], run_id: str) -> _Tracker:
    try:
        import wandb
    except ImportError as error:
        raise missing_extra("wandb", "log") from error
    run = wandb.init(project=project, dir=output, config=settings, id=run_id, resume="allow")
    return _Tracker(lambda step, event, values: run.log(values, step=step), run.finish)
