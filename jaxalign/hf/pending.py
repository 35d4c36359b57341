"""The tensors of a model, each gathered, merged or copied when it is written.

    tensors = tree_tensors(params, spec)                             # of a parameter tree
    tensors = merged_tensors('models/llama', spec, trained, adapter)   # of a base and an adapter
    assemble(tensors, spec)                                          # the tree again, in memory

The host holds one tensor at a time besides the parameters. Every process makes each of them, as all
help to gather what lies on several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.adapters import Adapter
from jaxalign.hf.find import locate
from jaxalign.hf.load import base_index
from jaxalign.hf.stream import Pending
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


def to_host(array: Any) -> np.ndarray:
    """The whole array as NumPy, on every process; called by all."""
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    if whole or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


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
