"""What survives a dead run: adapter, optimiser, step, settings; written by Orbax.

`checkpoints/` keeps the newest few, `best/` the one with the best validation metric; a run goes on
from the furthest of both. Orbax writes into a temporary folder and renames it when it is whole, so
death at any moment leaves the older checkpoint untouched. The data position is the step itself: a
batch is a function of seed and step.

Disks and copies change bits without an error, hence every checkpoint carries the sums of its arrays
and is compared with them when it is read (`sums.py`). One that is not what was written is moved to
`damaged/` and the next older one is taken.

    store = Checkpoints('runs/demo', keep=2)
    store.save(200, state, meta)
    found = store.furthest(abstract_state, check)    # onto any mesh; None: there is no checkpoint
    found.state, found.meta, found.notes
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxalign.checksums import seal
from jaxalign.errors import UserError
from jaxalign.multihost import barrier, everywhere, is_main
from jaxalign.sharding import path_name
from jaxalign.train.state import TrainState
from jaxalign.train.stored import (
    BEST,
    DAMAGED,
    NEWEST,
    Damaged,
    Place,
    move,
    places,
    read_meta,
    reading,
    reason_of,
    root_of,
)
from jaxalign.train.sums import array_sums, kind_of


@dataclass(frozen=True)
class Found:
    """An intact checkpoint."""

    state: TrainState
    meta: dict[str, Any]
    place: Place
    notes: tuple[str, ...] = ()  # sentences about those that were not intact


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, output: str | Path, keep: int) -> None:
        self.output = str(output)
        self._newest = _manager(self.output, NEWEST, keep)
        self._best = _manager(self.output, BEST, 1)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._newest.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint, or None."""
        return self._best.latest_step()

    def save(self, step: int, state: TrainState, meta: dict, best: bool = False) -> None:
        """Starts writing a checkpoint; returns as soon as the arrays have left the device.

        Raises:
          UserError: this one, or the one before, could not be written.
        """
        manager = self._best if best else self._newest
        if manager.latest_step() == step:
            return
        tree = _tree(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree),
            meta=ocp.args.JsonSave(seal(meta | {"sums": array_sums(tree)})),
        )
        self._guard(lambda: manager.save(step, args=items))

    def furthest(
        self, abstract: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> Found | None:
        """The intact checkpoint with the most updates; every process gets the same one.

        Args:
          abstract: shapes, dtypes and the shardings to restore onto.
          check: raises UserError where a checkpoint's meta belongs to another run.

        Raises:
          UserError: there are checkpoints and none is intact, or one cannot be read for a reason
            other than damage.
        """
        damaged: list[tuple[Place, str]] = []
        for place in places(self.output):
            try:
                state, meta = self._read(place, abstract, check)
            except Damaged as reason:
                damaged.append((place, str(reason)))
                continue
            notes = tuple(self._set_aside(one, why, place) for one, why in damaged)
            return Found(state, meta, place, notes)
        if damaged:
            names = "; ".join(f"{place.name}: {reason}" for place, reason in damaged)
            raise UserError(
                f"{self.output}: no checkpoint is intact ({names}); nothing was changed: restore "
                "intact copies, or choose another output to start over"
            )
        return None

    def best_weights(self, abstract: TrainState, step: int, run: str) -> Found:
        """The state after `step` updates, which validation chose.

        Raises:
          UserError: neither of the two places that can hold it is intact.
        """
        reasons = []
        known = places(self.output)
        for place in (Place(self.output, kind, step) for kind in (BEST, NEWEST)):
            if place not in known:
                reasons.append(f"{place.name} is missing")
                continue
            try:
                state, meta = self._read(place, abstract, lambda _: None)
            except Damaged as reason:
                reasons.append(f"{place.name}: {reason}")
                continue
            if meta.get("run", "") == run:
                return Found(state, meta, place)
            reasons.append(f"{place.name} belongs to another run")
        raise UserError(
            f"{self.output}: the best weights (step {step}) cannot be handed over "
            f"({'; '.join(reasons)}); `jaxalign export {self.output} --step latest` takes the last "
            "ones, train in another output to choose again"
        )

    def forget_best_after(self, step: int) -> bool:
        """Drops a best checkpoint from beyond the step that a run resumes from.

        Returns:
          Whether a best one remains.
        """
        for later in [s for s in self._best.all_steps() if s > step]:
            self._best.delete(later)
        return self._best.latest_step() is not None

    def forget_from(self, step: int) -> None:
        """Drops the newest checkpoints from this step on: states from which nothing finite came."""
        self.wait()
        for later in [s for s in self._newest.all_steps() if s >= step]:
            self._newest.delete(later)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          UserError: something could not be written.
        """
        self._guard(self._newest.wait_until_finished)
        self._guard(self._best.wait_until_finished)

    def close(self) -> None:
        """Ends the writers; what they could not write, `save` or `wait` has reported already."""
        for manager in (self._newest, self._best):
            with contextlib.suppress(Exception):
                manager.close()

    def _read(
        self, place: Place, abstract: TrainState, check: Callable[[dict[str, Any]], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        """One checkpoint, compared with its sums; all processes agree whether it is damaged."""
        meta = _together(lambda: read_meta(place))
        check(meta)
        tree = _tree(abstract)
        sums = meta.get("sums")  # absent in those of older versions, which nothing can vouch for
        if sums is not None:
            _same_tree(place, tree, sums)
        found = _together(lambda: _read_state(place, tree))
        if sums is not None:
            wrong = [name for name, text in array_sums(found).items() if sums[name] != text]
            if wrong:
                raise Damaged(f"{wrong[0]} is not what was written")
        return TrainState(**found), meta

    def _set_aside(self, place: Place, reason: str, instead: Place) -> str:
        target = root_of(self.output) / DAMAGED / f"{place.kind}-{place.step}"
        if is_main():
            number = 1
            while target.exists():
                number += 1
                target = target.parent / f"{place.kind}-{place.step}-{number}"
            move(place.folder, target)
        barrier(f"set aside {place.name}")
        (self._best if place.kind == BEST else self._newest).reload()
        return (
            f"checkpoint {place.name} is damaged ({reason}) and was moved to {target.parent.name}/"
            f"{target.name}; going on from {instead.name}"
        )

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


def _together(action: Callable[[], Any]) -> Any:
    """What the action returns, where it is damaged for no process; otherwise `Damaged` for all."""
    result, reason = None, ""
    try:
        result = action()
    except Damaged as error:
        reason = str(error)
    if not everywhere([not reason])[0]:
        raise Damaged(reason or "another process could not read its part")
    return result


def _read_state(place: Place, tree: dict[str, Any]) -> dict[str, Any]:
    with reading():
        handler = ocp.StandardCheckpointHandler()
        return handler.restore(place.folder / "state", args=ocp.args.StandardRestore(tree))


def _same_tree(place: Place, tree: dict[str, Any], sums: dict[str, str]) -> None:
    """The state must have the arrays that were saved."""
    ours = {path_name(p): kind_of(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    theirs = {name: text.partition(":")[0] for name, text in sums.items()}
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{place.run}: {name} of checkpoint {place.name} is {theirs.get(name, 'absent')}, "
                f"this run has {ours.get(name, 'none')}; it was written by another version of "
                "jaxalign or over another base: choose another output"
            )


def _manager(output: str, name: str, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=True,
        create=True,
        cleanup_tmp_directories=True,  # what a killed run left half written
    )
    return ocp.CheckpointManager(root_of(output) / name, options=options)


def _tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trained": state.trained, "optimiser": state.optimiser}


def _reason(error: BaseException, output: str) -> str:
    text = f"{error} {error.__cause__}"
    full = any(word in text for word in ("No space left", "ENOSPC", "RESOURCE_EXHAUSTED"))
    if "://" not in output and not full:
        full = shutil.disk_usage(Path(output).absolute()).free < 1 << 20
    return "the disk is full" if full else reason_of(error)
