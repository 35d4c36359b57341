"""What a run says about itself: JSONL always, a progress bar on a terminal, trackers as extras.

Numbers stay on the device until the step after theirs has been dispatched, so logging never makes
the accelerator wait.

    log = Log('runs/demo', steps=400)
    log.update(step, metrics, tokens=8192)
    log.event('eval', step, {'eval/loss': 1.2})
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.errors import missing_extra
from jaxalign.model.spec import ModelSpec, parameter_count

# Peak dense bf16 FLOP/s of one device, by JAX's name of it (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

SHOWN = ("task/loss", "align/loss", "align/contrastive/retrieval", "eval/loss")


def training_flops(spec: ModelSpec, tokens: int, length: int, blocks: int | None = None) -> float:
    """Least FLOPs to train an adapter on `tokens` tokens of rows of `length`.

    Forward and the backward pass to the activations: 4 per weight and token (a frozen weight has no
    gradient of its own), plus causal attention. `blocks`: only the lower ones, without the head.
    """
    head = spec.vocab * spec.dim
    inner = (parameter_count(spec) - head * (1 if spec.tied else 2)) / spec.layers
    depth = spec.layers if blocks is None else blocks
    weights = inner * depth + (head if blocks is None else 0)
    attention = depth * spec.heads * spec.head_dim * length  # causal: half of 2 · 2 · T
    return tokens * (4 * weights + 4 * attention)


class Log:
    """The log of one run; only process 0 writes."""

    def __init__(
        self,
        output: str | Path,
        *,
        steps: int,
        every: int = 10,
        start: int = 0,
        progress: str = "auto",
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: dict[str, Any] | None = None,
        title: str = "training",
    ) -> None:
        self._every, self._writes = every, jax.process_index() == 0
        self._window: list[tuple[int, Any]] = []
        self._closed: deque[tuple[int, list, float, float, float]] = deque()
        self._tokens = self._flops = 0.0
        self._since = time.monotonic()
        kind = jax.devices()[0].device_kind
        self._peak = PEAK_FLOPS.get(kind, 0.0) * jax.device_count()
        self._sinks: list[Any] = []
        self._bar: Any = None
        if not self._writes:
            return
        if "://" not in str(output):
            Path(output).mkdir(parents=True, exist_ok=True)
            self._sinks.append(_Jsonl(Path(output, "log.jsonl"), start))
        if tensorboard:
            self._sinks.append(_tensorboard(str(output)))
        if wandb:
            self._sinks.append(_wandb(wandb, str(output), settings or {}))
        if progress == "auto":
            self._bar = _Bar(title, steps, start)

    def update(self, step: int, metrics: Any, tokens: int, flops: float) -> None:
        """Takes one update's metrics (still on the device); step counts from 1."""
        while self._closed:
            self._flush(*self._closed.popleft())
        self._window.append((step, metrics))
        self._tokens += tokens
        self._flops += flops
        if step % self._every == 0:
            self._close(step)
        if self._bar:
            self._bar.advance(step)

    def event(self, name: str, step: int, values: dict[str, Any]) -> None:
        """Writes something that happened once, as an evaluation."""
        self.drain()
        self._write(step, name, values)

    def message(self, text: str) -> None:
        """A line for the reader."""
        if self._writes:
            from rich.console import Console

            console = self._bar.console if self._bar else Console(soft_wrap=True)
            console.print(text, highlight=False, markup=False)

    def drain(self) -> None:
        """Writes what is still on the device, and starts the clock anew."""
        if self._window:
            self._close(self._window[-1][0])
        while self._closed:
            self._flush(*self._closed.popleft())
        self._since = time.monotonic()

    def close(self) -> None:
        """Ends bar and trackers."""
        self.drain()
        if self._bar:
            self._bar.stop()
        for sink in self._sinks:
            sink.close()

    def _close(self, step: int) -> None:
        now = time.monotonic()
        steps = [metrics for _, metrics in self._window]
        self._closed.append((step, steps, self._tokens, self._flops, now - self._since))
        self._window, self._tokens, self._flops, self._since = [], 0.0, 0.0, now

    def _flush(self, step: int, steps: list, tokens: float, flops: float, took: float) -> None:
        values = mean_metrics(jax.device_get(steps))
        values["tokens_per_second"] = tokens / max(took, 1e-9)
        values["seconds_per_step"] = took / len(steps)
        if self._peak:
            values["mfu"] = flops / max(took, 1e-9) / self._peak
        self._write(step, "train", values)

    def _write(self, step: int, event: str, values: dict[str, Any]) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.write(step, event, plain)
        if self._bar:
            self._bar.show(plain)


def mean_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Each metric's mean over the updates that had it (a phase without a turn has none)."""
    names = dict.fromkeys(name for metrics in steps for name in metrics)
    means = {}
    for name in names:
        values = [np.mean(metrics[name]) for metrics in steps if name in metrics]
        means[name] = float(np.mean(values))
    return {name: value for name, value in means.items() if not name.endswith("micro_losses")}


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    # JSON has no NaN; null keeps the line readable by every parser.
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Jsonl:
    """One object a line; lines past the step that a resumed run starts from are dropped first."""

    def __init__(self, path: Path, start: int) -> None:
        kept = []
        if path.exists() and start:
            for line in path.read_text("utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= start:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    continue  # the line a dying run did not finish
        path.write_text("".join(kept), "utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, event: str, values: dict[str, Any]) -> None:
        stamp = round(time.time(), 3)
        line = {"step": step, "event": event, "time": stamp, **values}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


class _Bar:
    """A rich progress bar with the losses and the time left."""

    def __init__(self, title: str, steps: int, start: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console()
        columns = [
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
        ]
        self._progress = Progress(
            *columns, console=self.console, disable=not self.console.is_terminal
        )
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


def _wandb(project: str, output: str, settings: dict[str, Any]) -> _Tracker:
    try:
        import wandb
    except ImportError as error:
        raise missing_extra("wandb", "log") from error
    run = wandb.init(project=project, dir=output, config=settings, resume="allow")
    return _Tracker(lambda step, event, values: run.log(values, step=step), run.finish)
