"""What survives a dead run: adapter, optimiser, step, settings; written by Orbax.

`checkpoints/` keeps the newest few and is what `resume: auto` reads; `best/` keeps the one with
the best validation metric. Orbax writes into a temporary folder and renames it when whole, so
death at any moment leaves the older checkpoint untouched. The data position is the step itself: a
batch is a function of seed and step.

    store = Checkpoints('runs/demo', keep=2)
    store.save(200, state, meta)
    state, meta = store.restore(abstract_state)      # the newest, onto any mesh
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxalign.errors import UserError
from jaxalign.train.state import TrainState


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, output: str | Path, keep: int) -> None:
        self.output = str(output)
        self._newest = _manager(self.output, "checkpoints", keep)
        self._best = _manager(self.output, "best", 1)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._newest.latest_step()

    def save(self, step: int, state: TrainState, meta: dict, best: bool = False) -> None:
        """Starts writing a checkpoint; returns as soon as the arrays have left the device.

        Raises:
          UserError: this one, or the one before, could not be written.
        """
        manager = self._best if best else self._newest
        if manager.latest_step() == step:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_tree(state)), meta=ocp.args.JsonSave(meta)
        )
        self._guard(lambda: manager.save(step, args=items))

    def restore(self, abstract: TrainState, best: bool = False) -> tuple[TrainState, dict]:
        """The newest (or the best) checkpoint, on the shardings that `abstract` names."""
        manager = self._best if best else self._newest
        step = manager.latest_step()
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(_tree(abstract)), meta=ocp.args.JsonRestore()
        )
        try:
            found = manager.restore(step, args=items)
        except (ValueError, FileNotFoundError, KeyError, OSError) as error:
            raise UserError(
                f"{self.output}: checkpoint {step} cannot be read ({_first_line(error)}); delete "
                "that folder to go on from an older one, or choose another output"
            ) from error
        return TrainState(**found["state"]), found["meta"]

    def meta(self) -> dict:
        """What was saved beside the newest checkpoint's arrays."""
        step = self._newest.latest_step()
        return self._newest.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint, or None."""
        return self._best.latest_step()

    def forget_best_after(self, step: int) -> bool:
        """Drops a best checkpoint from beyond the step that a run resumes from.

        Returns:
          Whether a best one remains.
        """
        for later in [s for s in self._best.all_steps() if s > step]:
            self._best.delete(later)
        return self._best.latest_step() is not None

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          UserError: something could not be written.
        """
        self._guard(self._newest.wait_until_finished)
        self._guard(self._best.wait_until_finished)

    def close(self) -> None:
        """Ends the writers; what they could not write, `save` or `wait` has told already."""
        for manager in (self._newest, self._best):
            with contextlib.suppress(Exception):
                manager.close()

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            # Orbax and its backends report a full disk as OSError, ValueError or RuntimeError.
            whole = self._newest.latest_step()
            intact = "no earlier checkpoint exists" if whole is None else f"step {whole} is intact"
            raise UserError(
                f"{self.output}: a checkpoint could not be written ({_reason(error, self.output)})"
                f"; {intact}; free space and run the same command again to go on from there"
            ) from error


def _manager(output: str, name: str, keep: int) -> ocp.CheckpointManager:
    # Cloud paths (gs://) stay as they are; Orbax wants local ones absolute.
    folder = f"{output}/{name}" if "://" in output else str(Path(output, name).absolute())
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
    )
    return ocp.CheckpointManager(folder, options=options)


def _tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trained": state.trained, "optimiser": state.optimiser}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _reason(error: BaseException, output: str) -> str:
    text = f"{error} {error.__cause__}"
    full = any(word in text for word in ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED"))
    if "://" not in output and not full:
        full = shutil.disk_usage(Path(output).absolute()).free < 1 << 20
    return "the disk is full" if full else _first_line(error)
