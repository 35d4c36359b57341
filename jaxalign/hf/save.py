"""Folders that PyTorch reads: a base or merged model, and a PEFT adapter, there and back.

Every save is atomic (a folder is complete or absent) and is called by all processes: each helps to
gather the arrays, process 0 writes. The others return before it is done; who reads the folder next
waits at a barrier of its own.

    save_base('out/model', params, spec, tokenizer_from='models/llama')
    save_peft('out/adapter', lora, spec, Lora(r=8, targets=('q', 'v')), base_name='models/llama')
    lora, adapter = load_peft('out/adapter', spec)
    save_peft('copy', lora, spec, adapter)
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.hf.files import (
    DTYPES,
    StoredTensor,
    atomic_folder,
    locate,
    open_index,
    read_json,
    write_json,
)
from jaxalign.hf.names import (
    TARGETS,
    Row,
    adapter_rows,
    base_rows,
    get_leaf,
    peft_module,
    set_leaf,
    sizes,
)
from jaxalign.model.spec import ModelSpec

# Transformers refuses a file that does not say which framework it is for.
_METADATA = {"format": "pt"}
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def save_base(
    folder: str | Path,
    params: Mapping[str, Any],
    spec: ModelSpec,
    *,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write a model that transformers and vLLM load: config.json and safetensors.

    Args:
        folder: appears when everything is written; an older model there is replaced.
        params: the parameter tree; leaves keep their dtype. The host holds one shard at a time.
        spec: the facts for config.json.
        max_shard_bytes: a new file begins where the next tensor would pass this.
        tokenizer_from: a folder whose tokenizer and generation settings are copied along.

    Raises:
        UserError: `folder` holds something that is not a model.
    """
    size = sizes(spec)
    shards = _plan_shards(params, spec, max_shard_bytes)
    with _writing(folder, "config.json") as target:
        weight_map: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(shards, 1):
            of_all = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"model{of_all}.safetensors"
            tensors = {
                row.name(layer): row.to_hf(_to_host(_one(row, params, layer)), size)
                for row, layer in shard
            }
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
            if target:
                save_file(tensors, target / file, metadata=_METADATA)
        if not target:
            return
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(target / "model.safetensors.index.json", index)
        # Transformers 4 knows only this name; 5 reads it too.
        dtype = np.dtype(params["embed"].dtype).name
        write_json(target / "config.json", spec.to_hf() | {"torch_dtype": dtype})
        if tokenizer_from:
            _copy_tokenizer(locate(tokenizer_from), target)


def save_peft(
    folder: str | Path,
    lora: Mapping[str, Any],
    spec: ModelSpec,
    adapter: Lora,
    *,
    base_name: str = "",
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter that PEFT and vLLM load: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: appears when everything is written; an older adapter there is replaced.
        lora: the adapter tree, leaves stacked over all L blocks; stored as float32.
        spec: the base's facts.
        adapter: what the tree is; only the tensors of its `layers` are stored.
        base_name: folder or hub name of the base, for whoever loads the adapter.
        texts: more files to write in the same step (name to content), such as a model card.

    Raises:
        UserError: `folder` holds something that is not an adapter.
        ValueError: the tree does not have the targets or shapes that `adapter` says.
    """
    blocks = adapter.layers or tuple(range(1, spec.layers + 1))
    size = sizes(spec, adapter.r)
    tensors = {}
    for target in adapter.targets:
        for row in adapter_rows(target):
            leaf = _checked_leaf(row, lora, size)
            stacked = _to_host(leaf).astype(np.float32)
            for block in blocks:
                tensors[row.name(block - 1)] = row.to_hf(stacked[block - 1], size)
    if len(tensors) != len(jax.tree.leaves(lora)) * len(blocks):
        raise ValueError(f"the adapter tree has more than the targets {adapter.targets}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapter.r,
        # PEFT and vLLM type it as a whole number.
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": [peft_module(target) for target in adapter.targets],
        # PEFT and HF count from 0.
        "layers_to_transform": None if len(blocks) == spec.layers else [b - 1 for b in blocks],
        "use_rslora": adapter.rank_stabilised,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    with _writing(folder, "adapter_config.json") as target_folder:
        if target_folder:
            save_file(tensors, target_folder / "adapter_model.safetensors", metadata=_METADATA)
            write_json(target_folder / "adapter_config.json", config)
            for name, content in (texts or {}).items():
                (target_folder / name).write_text(content, encoding="utf-8")


def load_peft(
    folder: str | Path, spec: ModelSpec, revision: str | None = None
) -> tuple[dict[str, Any], Lora]:
    """The adapter tree (NumPy float32, zero in blocks without adapter) and what it is.

    Args:
        folder: a PEFT folder, or a hub name.
        spec: the base it will sit on.
        revision: hub branch, tag or commit.

    Raises:
        UserError: not a plain LoRA, not for this base, incomplete, or not finite.
    """
    folder = locate(folder, revision)
    file = folder / "adapter_config.json"
    config = read_json(file)
    _refuse_variants(file, config)
    index = open_index(folder, "adapter_model")
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{file}: r should be a positive whole number, found {rank!r}")
    targets, layers = _find_modules(folder, index, spec)
    _compare_with_config(file, config, targets, layers)
    lora: dict[str, Any] = {}
    size = sizes(spec, rank)
    for target in targets:
        for row in adapter_rows(target):
            stacked = np.zeros(row.shape(size), np.float32)
            for block in layers:
                tensor = _read_factor(row, block, index, size)
                stacked[block - 1] = row.to_ours(tensor, size)
            set_leaf(lora, row.path, stacked)
    adapter = Lora(
        r=rank,
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=targets,
        layers=layers if len(layers) < spec.layers else (),
        rank_stabilised=bool(config.get("use_rslora")),
    )
    return lora, adapter


# --- writing ------------------------------------------------------------------------------------


@contextmanager
def _writing(folder: str | Path, marker: str) -> Iterator[Path | None]:
    """The folder to write into on process 0, None elsewhere."""
    first = jax.process_index() == 0
    with atomic_folder(Path(folder), marker) if first else nullcontext() as target:
        yield target


def _to_host(array: Any) -> np.ndarray:
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    if whole or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _one(row: Row, params: Mapping[str, Any], layer: int) -> Any:
    leaf = get_leaf(params, row.path)
    if not row.stacked:
        return leaf
    if isinstance(leaf, jax.Array):
        # A traced index: one compilation for all layers.
        return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return leaf[layer]


def _checked_leaf(row: Row, tree: Mapping[str, Any], size: Mapping[str, int]) -> Any:
    leaf = get_leaf(tree, row.path)
    if leaf.shape != row.shape(size):
        raise ValueError(f"{'/'.join(row.path)} is {leaf.shape}, expected {row.shape(size)}")
    return leaf


def _plan_shards(
    params: Mapping[str, Any], spec: ModelSpec, max_shard_bytes: int
) -> list[list[tuple[Row, int]]]:
    """Which tensors go into which file: embeddings, block after block, norm and head."""
    size = sizes(spec)
    rows = base_rows(spec)
    blocks = [(row, layer) for layer in range(spec.layers) for row in rows if row.stacked]
    ends = [(row, 0) for row in rows if not row.stacked]
    shards: list[list[tuple[Row, int]]] = [[]]
    filled = 0
    for row, layer in ends[:1] + blocks + ends[1:]:
        leaf = _checked_leaf(row, params, size)
        nbytes = leaf.nbytes // (spec.layers if row.stacked else 1)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((row, layer))
        filled += nbytes
    return shards


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)


# --- reading an adapter -------------------------------------------------------------------------

# Settings that change what the tensors mean. Absent or empty, they are plain LoRA.
_VARIANTS = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Initialisations that leave the base as it is; others (PiSSA, OLoRA, LoftQ, ...) move a part of the
# base into the adapter, which then fits only that altered base.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def _refuse_variants(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type {config.get('peft_type')!r} is not supported; supported: LORA"
        )
    refused = {key: config[key] for key in _VARIANTS if config.get(key)}
    if config.get("bias") not in (None, "none"):
        refused["bias"] = config["bias"]
    if config.get("init_lora_weights") not in _INITS:
        refused["init_lora_weights"] = config["init_lora_weights"]
    if refused:
        settings = ", ".join(f"{key}={value!r}" for key, value in refused.items())
        raise UserError(
            f"{file}: {settings} is not supported; only plain LoRA is (merge the adapter into its "
            "base in PEFT and give the merged model instead)"
        )


def _find_modules(
    folder: Path, index: Mapping[str, StoredTensor], spec: ModelSpec
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The targets and the blocks (from 1) that have tensors: both factors, everywhere the same."""
    known = {
        row.name(layer): (target, layer + 1)
        for target in TARGETS
        for row in adapter_rows(target)
        for layer in range(spec.layers)
    }
    for name, tensor in index.items():
        if name not in known:
            raise _unknown_tensor(name, tensor, spec)
    if not index:
        raise UserError(f"{folder}: the adapter holds no tensors")
    found = {known[name] for name in index}
    targets = tuple(target for target in TARGETS if any(target == one for one, _ in found))
    layers = tuple(sorted({layer for _, layer in found}))
    for target in targets:
        for row in adapter_rows(target):
            for layer in layers:
                if row.name(layer - 1) not in index:
                    raise UserError(
                        f"{folder}: tensor {row.name(layer - 1)} is missing; an adapter needs both "
                        "factors of every adapted projection, in every adapted layer"
                    )
    return targets, layers


def _unknown_tensor(name: str, tensor: StoredTensor, spec: ModelSpec) -> UserError:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= spec.layers:
        return UserError(
            f"{tensor.file}: tensor {name} is for layer {layer[1]} (from 0), but this base has "
            f"{spec.layers} layers; the adapter was trained on another base"
        )
    modules = ", ".join(peft_module(target) for target in TARGETS)
    return UserError(
        f"{tensor.file}: tensor {name} has no place in this base; supported are lora_A and lora_B "
        f"under base_model.model.model.layers.N. of {modules}"
    )


def _compare_with_config(
    file: Path, config: Mapping[str, Any], targets: tuple[str, ...], layers: tuple[int, ...]
) -> None:
    named = config.get("target_modules")
    if isinstance(named, list):  # a string is a pattern or 'all-linear': the tensors tell
        for target in TARGETS:
            if peft_module(target) in named and target not in targets:
                raise UserError(
                    f"{file}: target_modules names {peft_module(target)}, but the adapter holds no "
                    "tensors for it; the file is incomplete"
                )
    chosen = config.get("layers_to_transform")
    if chosen is None:
        return
    chosen = [chosen] if isinstance(chosen, int) else chosen
    if {layer + 1 for layer in chosen} != set(layers):
        raise UserError(
            f"{file}: layers_to_transform is {sorted(chosen)}, but the adapter holds tensors for "
            f"layers {[layer - 1 for layer in layers]}; the two files do not belong together"
        )


def _read_factor(
    row: Row, block: int, index: Mapping[str, StoredTensor], size: Mapping[str, int]
) -> np.ndarray:
    name = row.name(block - 1)
    stored, shape = index[name], row.hf_shape(size)
    if stored.shape != shape:
        raise UserError(
            f"{stored.file}: tensor {name} has shape {list(stored.shape)}, but r={size['R']} and "
            f"this base ask for {list(shape)}; the adapter was trained on another base or rank"
        )
    if stored.dtype_name not in DTYPES:
        raise UserError(
            f"{stored.file}: tensor {name} is stored as {stored.dtype_name}; supported: "
            f"{', '.join(DTYPES)}"
        )
    tensor = stored.view().astype(np.float32)
    if not np.isfinite(tensor).all():
        raise UserError(
            f"{stored.file}: tensor {name} holds NaN or infinity; the training that wrote it "
            "diverged, take an earlier checkpoint"
        )
    return tensor
