"""A run's checkpoint read on one host, whatever mesh and however many hosts wrote it.

Arrays come out as NumPy, one leaf at a time: neither the optimiser's moments nor two copies of a
fully trained model are ever in memory.

    saved = find('runs/own', 'best')        # or '200', 'latest', '' (the best, if there is one)
    saved.step, saved.meta['config']
    saved.shapes                            # {'blocks': {'attention': {'q': {'a': ..., 'b': ...}}}}
    adapter = saved.tree()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign.errors import UserError

NEWEST, BEST = "checkpoints", "best"  # the folders of `jaxalign.train.checkpoint`
# What Orbax and its storage raise where a file is missing, cut short or not theirs.
UNREADABLE = (ValueError, KeyError, OSError, TypeError)


@dataclass(frozen=True)
class Saved:
    """One checkpoint."""

    run: str
    step: int
    best: bool
    folder: Any  # the step's, local or in the cloud

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What was saved beside the arrays: step, base, model, configuration, progress."""
        with self._reading():
            return dict(ocp.JsonCheckpointHandler().restore(self.folder / "meta"))

    @cached_property
    def shapes(self) -> dict[str, Any]:
        """The tree of what was trained, with a `jax.ShapeDtypeStruct` at every leaf."""
        with self._reading():
            found = ocp.PyTreeCheckpointHandler().metadata(self.folder / "state").tree["trained"]
            return jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), found)

    def leaf(self, path: tuple[str, ...]) -> np.ndarray:
        """One array of what was trained, whole.

        Raises:
            UserError: the files cannot be read.
        """
        item: Any = self.shapes
        for key in path:
            item = item[key]
        # As NumPy no device of the writing mesh is asked for.
        restore: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in (*reversed(path), "trained"):
            item, restore = {key: item}, {key: restore}
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
        with self._reading():
            found = ocp.PyTreeCheckpointHandler().restore(self.folder / "state", args=args)
            for key in ("trained", *path):
                found = found[key]
            return np.asarray(found)

    def tree(self) -> dict[str, Any]:
        """Everything that was trained, in memory: for an adapter."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self.leaf(tuple(key.key for key in path)), self.shapes
        )

    def lazy(self) -> dict[str, Any]:
        """The same tree with leaves that are read when they are asked for: for a whole model."""
        shelf = _Shelf(self)
        return jax.tree_util.tree_map_with_path(
            lambda path, one: Leaf(shelf, tuple(key.key for key in path), one.shape, one.dtype),
            self.shapes,
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{self.run}: checkpoint {self.step} cannot be read ({reason}); choose another by "
                "--step"
            ) from error


@dataclass(frozen=True)
class Leaf:
    """An array in a checkpoint that is read when it is used; the last one read is kept."""

    shelf: _Shelf
    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.shelf.take(self.path)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.shelf.take(self.path), dtype)


class _Shelf:
    """Room for one array."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self._path: tuple[str, ...] = ()
        self._array: np.ndarray | None = None

    def take(self, path: tuple[str, ...]) -> np.ndarray:
        if self._array is None or path != self._path:
            self._array = None  # the old one goes before the new one comes
            self._path, self._array = path, self._saved.leaf(path)
        return self._array


def steps(run: str) -> dict[str, dict[int, Any]]:
    """The complete checkpoints of a run: of each kind, step -> folder."""
    found = {}
    for kind in (NEWEST, BEST):
        # Storage wants local paths absolute and leaves those of the cloud (gs://) as they are.
        root = run if "://" in run else str(Path(run).expanduser().absolute())
        paths = ocp.utils.checkpoint_steps_paths(f"{root}/{kind}")
        found[kind] = {int(path.name): path for path in paths if path.name.isdigit()}
    return found


def find(run: str, step: str = "") -> Saved:
    """The checkpoint that is asked for.

    Args:
        run: the `output` of a training, local or in the cloud.
        step: a number, latest, best, or '' for the best where validation chose one, else latest:
            what the training itself exports.

    Raises:
        UserError: the run has no checkpoint, or not that one.
    """
    have = steps(run)
    newest, best = have[NEWEST], have[BEST]
    if not newest and not best:
        raise UserError(
            f"{run}: holds no checkpoint; give the output folder of a `jaxalign train`, or a PEFT "
            "folder"
        )
    if step == "best" and not best:
        raise UserError(f"{run}: no best checkpoint, the run had no validation; take --step latest")
    if best and step in ("", "best"):
        return _saved(run, max(best), best, "best")
    if step in ("", "latest"):
        # A run that died before its first regular checkpoint may have a best one only.
        return _saved(run, max(newest or best), newest or best, NEWEST if newest else BEST)
    number = int(step) if step.isdigit() else -1
    for kind, folders in have.items():
        if number in folders:
            return _saved(run, number, folders, kind)
    known = ", ".join(map(str, sorted({*newest, *best})))
    raise UserError(f"{run}: no checkpoint {step!r}; there are {known}, latest and best")


def _saved(run: str, step: int, folders: dict[int, Any], kind: str) -> Saved:
    return Saved(run, step, kind == BEST, folders[step])
