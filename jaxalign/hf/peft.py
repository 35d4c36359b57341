"""PEFT adapter folders, there and back, bit by bit.

Whatever LoRA or DoRA PEFT can describe: rank-stabilised scales, ranks and alphas of a module's
own, some layers, targets that differ between layers. Tensors and `adapter_config.json` are compared
by PEFT's own rules first; an adapter that could be loaded only in part is refused.

    save_peft('out/adapter', lora, spec, Lora(r=8, targets=('q', 'v')), base_name='models/llama')
    lora, adapter = load_peft('out/adapter', spec)
    save_peft('copy', lora, spec, adapter)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxalign.adapters.lora import Lora
from jaxalign.checksums import check_sums
from jaxalign.errors import UserError, reading
from jaxalign.hf.files import write_json
from jaxalign.hf.find import locate
from jaxalign.hf.names import TARGETS, Row, adapter_rows, peft_module, set_leaf, sizes
from jaxalign.hf.peft_config import PeftConfig, module_name, write_config
from jaxalign.hf.save import (
    METADATA,
    TOKENIZER_FILES,
    checked_leaf,
    copy_files,
    to_host,
    writing,
)
from jaxalign.hf.tensors import DTYPES, StoredTensor, check_content, open_index
from jaxalign.model.spec import ModelSpec


def save_peft(
    folder: str | Path,
    lora: Mapping[str, Any],
    spec: ModelSpec,
    adapter: Lora,
    *,
    base_name: str = "",
    texts: Mapping[str, str] | None = None,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write an adapter that PEFT loads: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: appears when everything is written; an older adapter there is replaced.
        lora: the adapter tree, leaves stacked over all L blocks; stored as float32.
        spec: the base's facts.
        adapter: what the tree is; only what it adapts is stored, at each projection's own rank.
        base_name: folder or hub name of the base (`NAME@REVISION` with its revision), for whoever
            loads the adapter.
        texts: more files to write in the same step (name to content), such as a model card.
        tokenizer_from: a folder whose tokenizer is copied along; `texts` replace its files.

    Raises:
        UserError: `folder` holds something that is not an adapter.
        ValueError: the tree does not have the targets, shapes or ranks that `adapter` says.
    """
    tensors: dict[str, np.ndarray] = {}
    leaves = 0
    for target in adapter.targets:
        for row in tensor_rows(target, adapter.dora):
            leaves += 1
            stacked = to_host(checked_leaf(row, lora, sizes(spec, adapter.r))).astype(np.float32)
            for block in range(1, spec.layers + 1):
                if rank := adapter.rank_of(target, block):
                    own = _cut(stacked[block - 1], row, rank, adapter.r)
                    tensors[row.name(block - 1)] = row.to_hf(own, sizes(spec, rank))
    if leaves != len(jax.tree.leaves(lora)):
        raise ValueError(f"the adapter tree has more than the targets {adapter.targets}")
    config = write_config(adapter, spec, base_name)
    with writing(folder, "adapter_config.json") as target_folder:
        if target_folder:
            save_file(tensors, target_folder / "adapter_model.safetensors", metadata=METADATA)
            write_json(target_folder / "adapter_config.json", config)
            if tokenizer_from:
                copy_files(Path(tokenizer_from), target_folder, TOKENIZER_FILES)
            for name, content in (texts or {}).items():
                (target_folder / name).write_text(content, encoding="utf-8")


def load_peft(
    folder: str | Path, spec: ModelSpec, revision: str | None = None
) -> tuple[dict[str, Any], Lora]:
    """The adapter tree (NumPy float32, zero where there is no adapter) and what it is.

    Args:
        folder: a PEFT folder, or a hub name.
        spec: the base it will sit on.
        revision: hub branch, tag or commit.

    Raises:
        UserError: neither LoRA nor DoRA, not for this base, incomplete, not finite, or a
            configuration that speaks of other tensors.
    """
    folder = locate(folder, revision)
    with reading(str(folder), "an adapter"):
        check_sums(folder, ["adapter_config.json"])
        said = PeftConfig.read(folder / "adapter_config.json")
        index = open_index(folder, "adapter_model")
        check_content(index)
        table = _compare(folder, said, index, spec)
    adapter = Lora.of_table(
        table,
        spec.layers,
        dropout=said.dropout,
        rank_stabilised=said.rank_stabilised,
        dora=said.dora,
    )
    lora: dict[str, Any] = {}
    for target in adapter.targets:
        for row in tensor_rows(target, adapter.dora):
            stacked = np.zeros(row.shape(sizes(spec, adapter.r)), np.float32)
            for block in range(1, spec.layers + 1):
                if rank := adapter.rank_of(target, block):
                    size = sizes(spec, rank)
                    tensor = _read_tensor(index[row.name(block - 1)])
                    stacked[block - 1][_own(row, rank)] = row.to_ours(tensor, size)
            set_leaf(lora, row.path, stacked)
    return lora, adapter


def tensor_rows(target: str, dora: bool) -> tuple[Row, ...]:
    """The PEFT rows of one projection: a [in, R], b [R, out], and DoRA's m [out]."""
    a, b = adapter_rows(target)
    if not dora:
        return a, b
    theirs, ours = b.axes.split(" -> ")
    stem = b.hf.removesuffix(".lora_B.weight")
    axes = f"{theirs.removesuffix(' R')} -> {ours.removeprefix('R ')}"
    return a, b, Row((*b.path[:-1], "m"), f"{stem}.lora_magnitude_vector", axes)


def _own(row: Row, rank: int) -> Any:
    """Where a projection's own ranks are in one block of the stacked leaf."""
    return {"a": (..., slice(rank)), "b": slice(rank), "m": ...}[row.path[-1]]


def _cut(block: np.ndarray, row: Row, rank: int, largest: int) -> np.ndarray:
    own = block[_own(row, rank)]
    if rank < largest and np.count_nonzero(own) != np.count_nonzero(block):
        raise ValueError(f"{'/'.join(row.path)} holds numbers beyond rank {rank}")
    return own


# --- what the two files say ---------------------------------------------------------------------


def _compare(
    folder: Path, said: PeftConfig, index: Mapping[str, StoredTensor], spec: ModelSpec
) -> dict[tuple[str, int], tuple[int, float]]:
    """(target, block from 1) -> (rank, alpha), of everything that both files name."""
    if not index:
        raise UserError(f"{folder}: the adapter holds no tensors")
    held = _held(said, index, spec)
    table: dict[tuple[str, int], tuple[int, float]] = {}
    for target in TARGETS:
        for block in range(1, spec.layers + 1):
            module = module_name(target, block)
            if said.adapts(module) != ((target, block) in held):
                raise _disagreement(folder, said, module, (target, block) in held)
            if (target, block) not in held:
                continue
            size = sizes(spec, said.rank(module))
            for row in tensor_rows(target, said.dora):
                if row.name(block - 1) not in index:
                    raise UserError(
                        f"{folder}: tensor {row.name(block - 1)} is missing; an adapter needs both "
                        f"factors{' and the magnitudes' * said.dora} of every adapted projection, "
                        "in every adapted layer"
                    )
                _check_tensor(row, index[row.name(block - 1)], size)
            table[target, block] = said.rank(module), said.alpha(module)
    return table


def _held(
    said: PeftConfig, index: Mapping[str, StoredTensor], spec: ModelSpec
) -> set[tuple[str, int]]:
    """The projections that have a tensor; each tensor must belong to one."""
    known = {
        row.name(layer): (target, layer + 1)
        for target in TARGETS
        for row in tensor_rows(target, dora=True)
        for layer in range(spec.layers)
    }
    for name, tensor in index.items():
        if name not in known:
            raise _unknown_tensor(name, tensor, spec)
        if name.endswith("lora_magnitude_vector") and not said.dora:
            raise UserError(
                f"{said.file}: use_dora is not set, but tensor {name} holds DoRA's magnitudes; set "
                "use_dora to true, or take the adapter_config.json that belongs to the tensors"
            )
    return {known[name] for name in index}


def _disagreement(folder: Path, said: PeftConfig, module: str, held: bool) -> UserError:
    if held:
        return UserError(
            f"{said.file}: {said.selection} leaves out {module}, but the adapter holds tensors for "
            "it; the two files do not belong together"
        )
    return UserError(
        f"{said.file}: {said.selection} takes in {module}, but the adapter holds no tensors for "
        "it; the file is incomplete, or the adapter was trained on another base"
    )


def _unknown_tensor(name: str, tensor: StoredTensor, spec: ModelSpec) -> UserError:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= spec.layers:
        return UserError(
            f"{tensor.file}: tensor {name} is for layer {layer[1]} (from 0), but this base has "
            f"{spec.layers} layers; the adapter was trained on another base"
        )
    if re.search(r"\.(embed_tokens|lm_head)\.(?!lora_)", name):
        rows = tensor.shape[0] if tensor.shape else 0
        other = f" with {rows} rows where this base has {spec.vocab}" if rows != spec.vocab else ""
        return UserError(
            f"{tensor.file}: tensor {name} is an embedding matrix of the adapter's own{other}, as "
            "PEFT saves it after resize_token_embeddings or for modules_to_save; merge the adapter "
            "into its base in PEFT (merge_and_unload), save it with its tokenizer, and give that "
            "model instead"
        )
    modules = ", ".join(peft_module(target) for target in TARGETS)
    return UserError(
        f"{tensor.file}: tensor {name} has no place in this base; supported are lora_A, lora_B and "
        f"lora_magnitude_vector under base_model.model.model.layers.N. of {modules}"
    )


def _check_tensor(row: Row, stored: StoredTensor, size: Mapping[str, int]) -> None:
    """By the header alone, before anything of that size is asked of the memory."""
    shape = row.hf_shape(size)
    if stored.shape != shape:
        raise UserError(
            f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, but rank "
            f"{size['R']} and this base ask for {list(shape)}; the adapter was trained on another "
            "base or rank"
        )
    if stored.dtype_name not in DTYPES:
        raise UserError(
            f"{stored.file}: tensor {stored.name} is stored as {stored.dtype_name}; supported: "
            f"{', '.join(DTYPES)}"
        )


def _read_tensor(stored: StoredTensor) -> np.ndarray:
    tensor = stored.view().astype(np.float32)
    if not np.isfinite(tensor).all():
        raise UserError(
            f"{stored.file}: tensor {stored.name} holds NaN or infinity; the training that wrote "
            "it diverged, take an earlier checkpoint"
        )
    return tensor
