"""What is exported: the weights of a run or of an adapter folder, and the base they belong to.

source = open_source('runs/own')                 # its best checkpoint, or the newest
source.adapter, source.weights                   # what they are, and the tree of arrays
source.spec, source.base, source.config          # config: None where nothing says how it was
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.adapters import Adapter
from jaxalign.base import Opened, open_files
from jaxalign.config import saved
from jaxalign.data.template import recorded
from jaxalign.errors import UserError
from jaxalign.export.checkpoint import Saved, find
from jaxalign.hf.find import holds_weights, locate
from jaxalign.hf.kinship import another_base
from jaxalign.hf.load import abstract_params
from jaxalign.hf.peft import load_peft, named_base
from jaxalign.model.spec import ModelSpec
from jaxalign.paths import SETTINGS
from jaxalign.settings import Config
from jaxalign.sharding import path_name
from jaxalign.terminal import say
from jaxalign.train.design import adapter_of
from jaxalign.train.same import same_start
from jaxalign.train.stored import local_places

CONFIG_FILE = "adapter_config.json"
DIVERGED = "the training that wrote it diverged, take an earlier step"


@dataclass(frozen=True)
class Source:
    """Weights that leave the house, and where they come from."""

    run: str  # as it was given
    name: str  # what to call it
    opened: Opened  # the base
    adapter: Adapter | None  # None: all weights were trained
    weights: Any  # the adapter's tree (NumPy), or all weights, read when asked for
    config: Config | None = None  # of the training, where it is known
    saved: Saved | None = None  # the checkpoint; None: an adapter folder
    files: Path | None = None  # the adapter folder

    @property
    def base(self) -> str:
        """Folder or hub name of the base."""
        return self.opened.path

    @property
    def folder(self) -> Path:
        """Of the base; without weights where the hub has them and nobody asked yet."""
        return self.opened.files

    @property
    def spec(self) -> ModelSpec:
        """The facts of the base."""
        return self.opened.spec

    @property
    def home(self) -> Path | None:
        """The local folder of the run, which may hold an evaluation; None: there is none."""
        for folder in (Path(self.run), Path(self.run).absolute().parent):
            if (folder / SETTINGS).is_file():
                return folder
        return None


def whole_base(source: Source) -> Path:
    """The base's folder with its weights, checked: complete, and the base of the training.

    Raises:
        UserError: a file or tensor is missing or misshapen, or it is another base.
    """
    found = source.opened.fingerprint
    if source.saved and found != source.saved.meta["base"]:
        raise another_base(source.saved.run, source.base, source.saved.meta.get("model", ""))
    if source.files:
        source.opened.check_weights(source.files, fetch=True)
    return source.opened.whole


def open_source(run: str, step: str = "", base: str = "") -> Source:
    """The weights of a training's output folder, or of a PEFT folder or hub name.

    Args:
        run: where they are.
        step: of a training: a number, best or latest; see `checkpoint.find`.
        base: in place of the base that the run or the adapter names.

    Raises:
        UserError: nothing there, not that step, another base, or weights that are not finite.
    """
    run = run.rstrip("/")
    trained = "://" in run or (Path(run).is_dir() and local_places(run))
    if trained:
        return _of_checkpoint(find(run, step), base)
    if step:
        raise UserError(f"--step: {run} holds no checkpoints to choose from")
    inner = Path(run) / "adapter"
    if Path(run).is_dir() and not (Path(run) / CONFIG_FILE).is_file():
        if not (inner / CONFIG_FILE).is_file():
            find(run)  # says what is missing
        return _of_folder(run, inner, base)
    return _of_folder(run, locate(run), base)


def config_of(meta: dict[str, Any]) -> Config:
    """The configuration that was saved with a checkpoint.

    Settings of another version of this package, which mean nothing here, are passed over.
    """
    return saved(meta["config"])


def trained_adapter(config: Config, spec: ModelSpec) -> Adapter | None:
    """What a run with this configuration trained next to the base; None: the base itself."""
    adapter, start = adapter_of(config, spec), config.adapter.start
    if adapter is None or not start:
        return adapter
    try:
        return adapter.following(load_peft(start, spec)[1], start)
    except UserError as error:
        raise UserError(
            f"adapter.start: {error}; the ranks are those of the adapter that the run began with: "
            "put it back"
        ) from error


def _of_checkpoint(saved: Saved, base: str) -> Source:
    config = config_of(saved.meta)
    opened = open_files(base) if base else open_files(config.model.path, config.model.revision)
    spec, path = _spec(opened, saved.run), opened.path
    if holds_weights(opened.files) and opened.fingerprint != saved.meta["base"]:
        raise another_base(saved.run, path, saved.meta.get("model", ""))
    if same_start(saved.meta, config) is False:
        raise UserError(
            f"{saved.run} began from another adapter than {config.adapter.start} holds now, and "
            "has the ranks and alphas of that earlier adapter; put that one back"
        )
    adapter = trained_adapter(config, spec)
    _check_shapes(saved, adapter, spec, path)
    return Source(
        run=saved.run,
        name=_name(saved.run),
        opened=opened,
        adapter=adapter,
        weights=_adapter_tree(saved, adapter, spec) if adapter else saved.lazy(),
        config=config,
        saved=saved,
    )


def _of_folder(run: str, folder: Path, base: str) -> Source:
    named = named_base(folder)
    path = base or named
    if not path:
        raise UserError(f"{folder / CONFIG_FILE}: names no base; give it by --base MODEL")
    opened = open_files(path)
    weights, adapter = read_adapter(folder, _spec(opened, run), path)
    opened.check_weights(folder)
    if doubt := opened.doubt(folder, str(folder)):
        say(f"warning: {doubt}")
    return Source(
        run=run,
        name=_name(run),
        opened=opened,
        adapter=adapter,
        weights=weights,
        config=recorded(folder),
        files=folder,
    )


def _spec(opened: Opened, run: str) -> ModelSpec:
    """The facts of the base; where it cannot be read, how to name another."""
    try:
        return opened.spec
    except UserError as error:
        raise UserError(f"the base of {run}: {error}; name it by --base MODEL") from error


def read_adapter(folder: Path, spec: ModelSpec, base: str) -> tuple[dict[str, Any], Adapter]:
    """A PEFT folder's tree and what it is; one that does not fit is refused by its base's name.

    Raises:
        UserError: as `load_peft`, with the base that the adapter names.
    """
    named = named_base(folder)
    try:
        return load_peft(folder, spec)
    except UserError as error:
        if not named or named == base:
            raise
        raise UserError(f"{error} (it names {named} as its base, not {base})") from error


def _check_shapes(saved: Saved, adapter: Adapter | None, spec: ModelSpec, base: str) -> None:
    """The stored tree must be what this configuration trains on this base."""
    params = abstract_params(spec, np.float32)
    if adapter is None:
        expected: Any = params
    else:
        expected = jax.eval_shape(partial(adapter.init, spec), jax.random.key(0), params)
    theirs, ours = (
        {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (saved.shapes, expected)
    )
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{saved.run}: {name} of checkpoint {saved.step} is "
                f"{_shape(theirs.get(name))}, {base} asks for {_shape(ours.get(name))}; it was "
                f"trained on another base ({saved.meta.get('model')})"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _adapter_tree(saved: Saved, adapter: Adapter, spec: ModelSpec) -> dict[str, Any]:
    """The stored weights, finite, and zero where nothing is adapted (as a PEFT folder has it)."""
    tree = adapter.cleared(jax.tree.map(np.array, saved.tree()), spec)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not np.isfinite(leaf).all():
            raise UserError(
                f"{saved.run}: {path_name(path)} of checkpoint {saved.step} holds NaN or infinity; "
                f"{DIVERGED}"
            )
    return tree


def _name(run: str) -> str:
    parts = [part for part in Path(run).absolute().parts if part not in ("adapter", "/")]
    return parts[-1] if parts else "export"
