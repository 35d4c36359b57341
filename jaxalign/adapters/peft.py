"""A low-rank adapter's tensors in PEFT's names and layout, there and back, bit by bit.

Whatever LoRA or DoRA PEFT can describe: rank-stabilised scales, ranks and alphas of a module's
own, some layers, targets that differ between layers. Tensors and `adapter_config.json` are compared
by PEFT's own rules first; an adapter that could be loaded only in part is refused.

    a, b = adapter_rows('q')     # base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A...
    tensors = to_tensors(ranks, lora, spec)          # what adapter_model.safetensors holds
    table = compare(said, index, spec)               # (target, block) -> (rank, alpha)
    lora = from_tensors(ranks, index, spec)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxalign.adapters.interface import Stored
from jaxalign.adapters.peft_config import PeftConfig, module_name, peft_module
from jaxalign.adapters.ranks import Ranks
from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS, Row, checked_leaf, set_leaf, sizes


def to_tensors(ranks: Ranks, lora: Mapping[str, Any], spec: ModelSpec) -> dict[str, np.ndarray]:
    """PEFT's name -> tensor, float32, of what is adapted, each at its own rank.

    Args:
        ranks: what the tree is.
        lora: NumPy leaves, stacked over all L blocks.
        spec: the base's facts.

    Raises:
        ValueError: the tree does not have the targets, shapes or ranks that `ranks` says.
    """
    tensors: dict[str, np.ndarray] = {}
    rows = [row for target in ranks.targets for row in tensor_rows(target, ranks.dora)]
    for row in rows:
        stacked = checked_leaf(row, lora, sizes(spec, ranks.r)).astype(np.float32)
        for block in range(1, spec.layers + 1):
            if rank := ranks.rank_of(row.path[2], block):
                own = _cut(stacked[block - 1], row, rank, ranks.r)
                tensors[row.name(block - 1)] = row.to_hf(own, sizes(spec, rank))
    if len(rows) != len(jax.tree.leaves(lora)):
        raise ValueError(f"the adapter tree has more than the targets {ranks.targets}")
    return tensors


def from_tensors(ranks: Ranks, index: Mapping[str, Stored], spec: ModelSpec) -> dict[str, Any]:
    """The adapter's tree (NumPy float32, zero where nothing is adapted); compared before.

    Raises:
        UserError: a tensor that is not finite.
    """
    lora: dict[str, Any] = {}
    for target in ranks.targets:
        for row in tensor_rows(target, ranks.dora):
            stacked = np.zeros(row.shape(sizes(spec, ranks.r)), np.float32)
            for block in range(1, spec.layers + 1):
                if rank := ranks.rank_of(target, block):
                    tensor = read_tensor(index[row.name(block - 1)])
                    stacked[block - 1][_own(row, rank)] = row.to_ours(tensor, sizes(spec, rank))
            set_leaf(lora, row.path, stacked)
    return lora


def adapter_rows(target: str) -> tuple[Row, Row]:
    """The PEFT rows of factors a [in, R] and b [R, out] of one projection (`'q'`, ...)."""
    kernel = TARGETS[target]
    # 'OUT IN -> in out' of the kernel gives A as 'R IN -> in R' and B as 'OUT R -> R out'.
    outs, ins = kernel.outputs, kernel.inputs
    stem = "base_model.model." + kernel.hf.removesuffix(".weight")
    module = kernel.path[:-1]
    a = Row((*module, "a"), stem + ".lora_A.weight", f"R {_axis(ins)} -> {' '.join(ins)} R")
    b = Row((*module, "b"), stem + ".lora_B.weight", f"{_axis(outs)} R -> R {' '.join(outs)}")
    return a, b


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


def compare(
    said: PeftConfig, index: Mapping[str, Stored], spec: ModelSpec
) -> dict[tuple[str, int], tuple[int, float]]:
    """(target, block from 1) -> (rank, alpha), of everything that both files name."""
    folder = said.file.parent
    if not index:
        raise UserError(f"{folder}: the adapter holds no tensors")
    held = _held(said, index, spec)
    table: dict[tuple[str, int], tuple[int, float]] = {}
    for target in TARGETS:
        for block in range(1, spec.layers + 1):
            module = module_name(target, block)
            if said.adapts(module) != ((target, block) in held):
                raise _disagreement(said, module, (target, block) in held)
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


def _held(said: PeftConfig, index: Mapping[str, Stored], spec: ModelSpec) -> set[tuple[str, int]]:
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


def _disagreement(said: PeftConfig, module: str, held: bool) -> UserError:
    if held:
        return UserError(
            f"{said.file}: {said.selection} leaves out {module}, but the adapter holds tensors for "
            "it; the two files do not belong together"
        )
    return UserError(
        f"{said.file}: {said.selection} takes in {module}, but the adapter holds no tensors for "
        "it; the file is incomplete, or the adapter was trained on another base"
    )


def _unknown_tensor(name: str, tensor: Stored, spec: ModelSpec) -> UserError:
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


def _check_tensor(row: Row, stored: Stored, size: Mapping[str, int]) -> None:
    """By the header alone, before anything of that size is asked of the memory."""
    shape = row.hf_shape(size)
    if stored.shape != shape:
        raise UserError(
            f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}, but rank "
            f"{size['R']} and this base ask for {list(shape)}; the adapter was trained on another "
            "base or rank"
        )
    stored.dtype  # noqa: B018 - or says that there is none


def read_tensor(stored: Stored) -> np.ndarray:
    """A tensor of a file, float32.

    Raises:
        UserError: a number that is not finite.
    """
    tensor = stored.view().astype(np.float32)
    if not np.isfinite(tensor).all():
        raise UserError(
            f"{stored.file}: tensor {stored.name} holds NaN or infinity; the training that wrote "
            "it diverged, take an earlier checkpoint"
        )
    return tensor


def _axis(letters: tuple[str, ...]) -> str:
    return letters[0] if len(letters) == 1 else f"({' '.join(letters)})"
