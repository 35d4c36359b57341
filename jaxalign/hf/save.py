"""A folder that PyTorch reads: a base, fully trained or merged model.

Every save is atomic (a folder is complete or absent) and is called by all processes: each helps to
gather the arrays, process 0 writes. The others return before it is done; who reads the folder next
waits at a barrier of its own. The host holds one tensor at a time besides the parameters. Adapters
have a room of their own: `jaxalign.hf.peft`.

    save_base('out/model', params, spec, tokenizer_from='models/llama')
    tensors = merged_tensors('models/llama', spec, trained, adapter)    # nothing is read yet
    write_model('out/merged', tensors, config_json)                  # read, added, written by turns
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.adapters import Adapter
from jaxalign.checksums import check_sums, read_sums
from jaxalign.errors import UserError
from jaxalign.folders import whole_folder
from jaxalign.hf.files import read_json, write_json
from jaxalign.hf.find import TOKENIZER_FILES as TOKENIZER_FILES
from jaxalign.hf.find import locate, small_files
from jaxalign.hf.generation import GENERATION_FILE
from jaxalign.hf.load import base_index
from jaxalign.hf.stream import METADATA as METADATA
from jaxalign.hf.stream import SHARD_BYTES, Pending, write_shards
from jaxalign.hf.tensors import StoredTensor, check_content
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import (
    TARGETS,
    Row,
    base_rows,
    checked_leaf,
    get_leaf,
    set_leaf,
    sizes,
)


def save_base(
    folder: str | Path,
    params: Mapping[str, Any],
    spec: ModelSpec,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a model that transformers and vLLM load: config.json and safetensors.

    Args:
        folder: appears when everything is written; an older model there is replaced.
        params: the parameter tree; leaves keep their dtype.
        spec: the facts for config.json.
        max_shard_bytes: a new file begins where the next tensor would pass this.
        tokenizer_from: a folder whose tokenizer and generation settings are copied along.
        texts: more files to write in the same step (name to content); they replace copied ones.

    Raises:
        UserError: `folder` holds something that is not a model.
    """
    write_model(
        folder,
        tree_tensors(params, spec),
        config_for(spec, np.dtype(params["embed"].dtype).name, tokenizer_from),
        max_shard_bytes=max_shard_bytes,
        tokenizer_from=tokenizer_from,
        texts=texts,
    )


def config_for(spec: ModelSpec, dtype: str, base: str | Path | None = None) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        spec: its facts.
        dtype: of its weights; empty: as the base says, for weights of several.
        base: what it was made from: where its config.json says the same facts, it stays as it is
            with all its keys, also those that nobody here knows. Names of code are left out, which
            is not copied.
    """
    file = None if base is None else small_files(base) / "config.json"
    config = read_json(file) if file and file.is_file() else {}
    said = ModelSpec.from_hf(config) if config else None
    # Stop ids may come from generation_config.json, which is copied along.
    if said is None or said != dataclasses.replace(spec, eos_ids=said.eos_ids):
        config = spec.to_hf()
    config = {key: value for key, value in config.items() if key != "auto_map"}
    if dtype:
        # Transformers 5 calls it dtype; 4 knows only the longer name, and 5 reads that too.
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config


def write_model(
    folder: str | Path,
    tensors: Sequence[Pending],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a model whose tensors are made one after the other.

    Args:
        folder: appears when everything is written; an older model there is replaced.
        tensors: what the model consists of, under the names of Hugging Face.
        config: the content of config.json.
        max_shard_bytes: a new file begins where the next tensor would pass this.
        tokenizer_from: a folder whose tokenizer and generation settings are copied along.
        texts: more files to write in the same step (name to content), such as a model card.

    Raises:
        UserError: `folder` holds something that is not a model.
    """
    with writing(folder, "config.json") as target:
        write_shards(target, tensors, max_shard_bytes)
        if not target:
            return
        write_json(target / "config.json", dict(config))
        if tokenizer_from:
            source = locate(tokenizer_from)
            copy_files(source, target, (*TOKENIZER_FILES, GENERATION_FILE))
        for name, content in (texts or {}).items():
            (target / name).write_text(content, encoding="utf-8")


def write_like_base(
    folder: str | Path,
    tensors: Sequence[Pending],
    spec: ModelSpec,
    base: Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
) -> set[str]:
    """Write a model that was made of a base, with the base's configuration and tokenizer.

    Args:
        folder: as `write_model`.
        tensors: what the model consists of.
        spec: its facts.
        base: the base's folder; its weights need not be there.
        max_shard_bytes: as `write_model`.
        texts: as `write_model`.

    Returns:
        The dtypes of the tensors; config.json names one, or the base's where there are several.
    """
    kinds = {tensor.dtype.name for tensor in tensors}
    config = config_for(spec, "" if len(kinds) > 1 else min(kinds), base)
    write_model(
        folder,
        tensors,
        config,
        max_shard_bytes=max_shard_bytes,
        tokenizer_from=base,
        texts=texts,
    )
    return kinds


def tree_tensors(
    params: Mapping[str, Any], spec: ModelSpec, dtype: Any = None, order: str = "blocks"
) -> list[Pending]:
    """The tensors of a parameter tree.

    Args:
        params: leaves are arrays, on a mesh or not, or anything with `shape`, `dtype` and, where
            stacked, `[layer]`.
        spec: the model's facts.
        dtype: of every tensor; None keeps each leaf's.
        order: blocks (embeddings, block after block, norm and head), or leaves (all blocks of one
            leaf together, for leaves that are read when they are asked for).

    Raises:
        ValueError: the tree does not have the shapes of this model.
    """
    size = sizes(spec)
    found = []
    for row, layer in _places(spec, order):
        leaf = checked_leaf(row, params, size)
        kind = np.dtype(leaf.dtype if dtype is None else dtype)
        make = partial(_tensor_of, row, params, layer, size, kind)
        found.append(Pending(row.name(layer), row.hf_shape(size), kind, make))
    return found


def merged_tensors(
    base: str | Path,
    spec: ModelSpec,
    trained: Mapping[str, Any],
    adapter: Adapter | None,
    dtype: Any = None,
    revision: str | None = None,
) -> list[Pending]:
    """The tensors of a base with an adapter added, read from the base's files one by one.

    What is adapted is formed in float32 and rounded once; the rest is copied as it is.

    Args:
        base: folder or hub name; what `jaxalign.hf.load.fingerprint` checks is taken for granted.
        spec: the base's facts.
        trained: the adapter's weights, NumPy or on this host's devices.
        adapter: what they are; None copies all tensors.
        dtype: of every tensor; None keeps each tensor's own.
        revision: hub branch, tag or commit.
    """
    index = base_index(locate(base, revision), spec)
    check_content(index)
    size = sizes(spec)
    target_of = {row.path: target for target, row in TARGETS.items()}
    found = []
    for row, layer in _places(spec, "blocks"):
        stored = index[row.name(layer)]
        kind = np.dtype(stored.dtype if dtype is None else dtype)
        target = target_of.get(row.path)
        alone = adapter.alone(target, layer + 1) if adapter and target else None
        if alone:
            make = partial(_merged_tensor, row, stored, size, kind, trained, alone, layer)
        else:
            make = partial(_copied_tensor, stored, kind)
        found.append(Pending(row.name(layer), row.hf_shape(size), kind, make))
    return found


def assemble(tensors: Sequence[Pending], spec: ModelSpec) -> dict[str, Any]:
    """The parameter tree (NumPy) of these tensors: the model in memory, in the dtype they have."""
    size = sizes(spec)
    pending = {tensor.name: tensor for tensor in tensors}
    tree: dict[str, Any] = {}
    for row in base_rows(spec):
        if not row.stacked:
            set_leaf(tree, row.path, row.to_ours(pending[row.name()].make(), size).copy())
            continue
        leaf = np.empty(row.shape(size), pending[row.name(0)].dtype)
        for layer in range(spec.layers):
            leaf[layer] = row.to_ours(pending[row.name(layer)].make(), size)
        set_leaf(tree, row.path, leaf)
    return tree


@contextmanager
def writing(folder: str | Path, marker: str) -> Iterator[Path | None]:
    """The folder to write into on process 0, None elsewhere."""
    first = jax.process_index() == 0
    whole = whole_folder(Path(folder), "update", markers=[marker]) if first else nullcontext()
    with whole as target:
        yield target


def to_host(array: Any) -> np.ndarray:
    """The whole array as NumPy, on every process; called by all."""
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    if whole or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """The files of a folder that match, copied without their permissions.

    What is copied may be published. A link that a folder brought along could lead to any file of
    this machine; those of the hub's cache lead to its own blobs.

    Raises:
        UserError: a link to somewhere else, or a file whose content is not what was written.
    """
    found = [file for pattern in patterns for file in source.glob(pattern) if file.is_file()]
    names = {*(file.name for file in found), *read_sums(source)}
    names = {name for name in names if any(fnmatch(name, pattern) for pattern in patterns)}
    check_sums(source, sorted(name for name in names if "/" not in name))
    for file in found:
        if not _may_follow(file):
            raise UserError(
                f"{file}: is a link to {file.resolve()}, outside of its folder, and is not copied; "
                "put the file itself there"
            )
        shutil.copyfile(file, target / file.name)


def _may_follow(file: Path) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder, real = file.parent.resolve(), file.resolve()
    homes = [folder, Path(HF_HUB_CACHE).expanduser().resolve()]
    if folder.parent.name == "snapshots":  # of a cache in another place
        homes.append(folder.parents[1] / "blobs")
    return any(real.is_relative_to(home) for home in homes)


def _places(spec: ModelSpec, order: str) -> list[tuple[Row, int]]:
    """Every tensor of a model as its row and its layer, in the order of writing."""
    rows = base_rows(spec)
    if order == "leaves":
        return [(row, i) for row in rows for i in range(spec.layers if row.stacked else 1)]
    blocks = [(row, layer) for layer in range(spec.layers) for row in rows if row.stacked]
    ends = [(row, 0) for row in rows if not row.stacked]
    return ends[:1] + blocks + ends[1:]


def _tensor_of(
    row: Row, params: Mapping[str, Any], layer: int, size: Mapping[str, int], dtype: np.dtype
) -> np.ndarray:
    return row.to_hf(_as(to_host(_one(row, params, layer)), dtype), size)


def _one(row: Row, params: Mapping[str, Any], layer: int) -> Any:
    leaf = get_leaf(params, row.path)
    if not row.stacked:
        return leaf
    if isinstance(leaf, jax.Array):
        # A traced index: one compilation for all layers.
        return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return leaf[layer]


def _as(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # What a narrow dtype cannot hold becomes infinite, and `finite` reports it.
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _copied_tensor(stored: StoredTensor, dtype: np.dtype) -> np.ndarray:
    return _as(stored.view(), dtype)


def _merged_tensor(
    row: Row,
    stored: StoredTensor,
    size: Mapping[str, int],
    dtype: np.dtype,
    trained: Mapping[str, Any],
    alone: Adapter,
    layer: int,
) -> np.ndarray:
    """One kernel merged as a model of one block and one projection."""
    half, name = row.path[1:3]
    kernel = row.to_ours(stored.view(), size)[None].astype(np.float32)  # [1, in, out]
    own = jax.tree.map(lambda leaf: leaf[layer : layer + 1], trained["blocks"][half][name])
    merged = alone.merge(
        {"blocks": {half: {name: {"kernel": jnp.asarray(kernel)}}}},
        {"blocks": {half: {name: own}}},
    )
    kernel = np.asarray(merged["blocks"][half][name]["kernel"])[0]
    return row.to_hf(_as(kernel, dtype), size)
