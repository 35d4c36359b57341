"""A run's checkpoint read on one host, whatever mesh and however many hosts wrote it.

Arrays come out as NumPy, one leaf at a time: neither the optimiser's moments nor two copies of a
fully trained model are ever in memory. Meta and arrays are compared with the sums they were saved
with (`jaxalign.train.sums`), each when it is read.

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
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign.errors import UserError
from jaxalign.sharding import path_name
from jaxalign.train.state import without_heads
from jaxalign.train.stored import (
    BEST,
    NEWEST,
    Damaged,
    Place,
    local_places,
    read_meta,
    reading,
)
from jaxalign.train.sums import host_sum, kind_of


@dataclass(frozen=True)
class Saved:
    """One checkpoint."""

    place: Place

    @property
    def run(self) -> str:
        """The output of the training."""
        return self.place.run

    @property
    def step(self) -> int:
        """Updates done."""
        return self.place.step

    @property
    def best(self) -> bool:
        """Whether validation chose it."""
        return self.place.kind == BEST

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What was saved with the arrays: step, base, model, configuration, progress, sums.

        Raises:
            UserError: it cannot be read, or is not what was written.
        """
        with self._reading():
            return read_meta(self.place)

    @cached_property
    def shapes(self) -> dict[str, Any]:
        """The tree of the trained weights, with a `jax.ShapeDtypeStruct` at every leaf; heads that
        objectives trained for themselves are left out.

        Raises:
            UserError: it cannot be read, or is not what was written.
        """
        with self._reading():
            folder = self.place.folder / "state"
            found = ocp.PyTreeCheckpointHandler().metadata(folder).tree["trained"]
            tree = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), found)
            known = {
                name: text.partition(":")[0]
                for name, text in self.meta.get("sums", {}).items()
                if name.startswith("trained/")
            }
            leaves = jax.tree_util.tree_leaves_with_path({"trained": tree})
            if known and known != {path_name(path): kind_of(leaf) for path, leaf in leaves}:
                raise Damaged("its arrays are not those that were written")
            return without_heads(tree)

    def leaf(self, path: tuple[str, ...]) -> np.ndarray:
        """One array of what was trained, whole.

        Raises:
            UserError: the files cannot be read, or it is not what was written.
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
            found = ocp.PyTreeCheckpointHandler().restore(self.place.folder / "state", args=args)
            for key in ("trained", *path):
                found = found[key]
            array = np.asarray(found)
            name = "/".join(("trained", *path))
            sums = self.meta.get("sums")  # absent in those of older versions
            if sums is not None and sums[name] != host_sum(array):
                raise Damaged(f"{name} is not what was written")
            return array

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
            with reading():
                yield
        except Damaged as reason:
            raise UserError(
                f"{self.run}: checkpoint {self.place.name} is damaged ({reason}); choose another "
                f"by --step ({_known(local_places(self.run))})"
            ) from reason


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


def find(run: str, step: str = "") -> Saved:
    """The checkpoint that is asked for.

    Args:
        run: the `output` of a training, local or in the cloud.
        step: a number, latest, best, or '' for the best where validation chose one, else latest:
            what the training itself exports.

    Raises:
        UserError: the run has no checkpoint, or not that one.
    """
    have = local_places(run)
    if not have:
        raise UserError(
            f"{run}: holds no checkpoint; give the output folder of a `jaxalign train`, or a PEFT "
            "folder"
        )
    newest, best = ([place for place in have if place.kind == kind] for kind in (NEWEST, BEST))
    if step == "best" and not best:
        raise UserError(f"{run}: no best checkpoint, the run had no validation; take --step latest")
    if best and step in ("", "best"):
        return Saved(best[0])
    if step in ("", "latest"):
        # A run that died before its first regular checkpoint may have a best one only.
        return Saved((newest or best)[0])
    number = int(step) if step.isdigit() else -1
    for place in (*newest, *best):
        if place.step == number:
            return Saved(place)
    raise UserError(f"{run}: no checkpoint {step!r}; there are {_known(have)}")


def _known(have: list[Place]) -> str:
    return f"{', '.join(map(str, sorted({place.step for place in have})))}, latest and best"
