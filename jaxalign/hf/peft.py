"""PEFT adapter folders, there and back, bit by bit.

A folder is adapter_config.json and adapter_model.safetensors; what is in them is the business of
each kind of adapter (`jaxalign.adapters`).

    save_peft('out/adapter', lora, spec, Lora(r=8, targets=('q', 'v')), base_name='models/llama')
    lora, adapter = load_peft('out/adapter', spec)
    save_peft('copy', lora, spec, adapter)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file

from jaxalign.adapters import KINDS, Adapter, Lora
from jaxalign.adapters.peft_options import check_kinds
from jaxalign.checksums import check_sums, read_sealed
from jaxalign.errors import reading
from jaxalign.hf.files import read_json, write_json
from jaxalign.hf.find import locate, pinned
from jaxalign.hf.pending import to_host
from jaxalign.hf.save import METADATA, TOKENIZER_FILES, copy_files, writing
from jaxalign.hf.tensors import DiskFile, StoredTensor, check_content, open_index, weights_in
from jaxalign.model.spec import ModelSpec
from jaxalign.paths import RECORD

CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"


def save_peft(
    folder: str | Path,
    trained: Mapping[str, Any],
    spec: ModelSpec,
    adapter: Adapter,
    *,
    base_name: str = "",
    texts: Mapping[str, str] | None = None,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write an adapter that PEFT loads: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: appears when everything is written; an older adapter there is replaced.
        trained: the adapter's weights; called by all processes where they are split over devices.
        spec: the base's facts.
        adapter: what they are; only what it adapts is stored.
        base_name: folder or hub name of the base (`NAME@REVISION` with its revision), for whoever
            loads the adapter.
        texts: more files to write in the same step (name to content), such as a model card.
        tokenizer_from: a folder whose tokenizer is copied along; `texts` replace its files.

    Raises:
        UserError: `folder` holds something that is not an adapter.
        ValueError: the tree does not have the targets, shapes or ranks that `adapter` says.
    """
    tensors = adapter.tensors(jax.tree.map(to_host, trained), spec)
    config = adapter.config(spec, base_name)
    with writing(folder, CONFIG_FILE) as target_folder:
        if target_folder:
            save_file(tensors, target_folder / f"{STEM}.safetensors", metadata=METADATA)
            write_json(target_folder / CONFIG_FILE, config)
            if tokenizer_from:
                copy_files(Path(tokenizer_from), target_folder, TOKENIZER_FILES)
            for name, content in (texts or {}).items():
                (target_folder / name).write_text(content, encoding="utf-8")


def load_peft(
    folder: str | Path, spec: ModelSpec, revision: str | None = None
) -> tuple[dict[str, Any], Adapter]:
    """The adapter tree (NumPy float32, zero where there is no adapter) and what it is.

    Args:
        folder: a PEFT folder, or a hub name.
        spec: the base it will sit on.
        revision: hub branch, tag or commit.

    Raises:
        UserError: of no kind that is known, not for this base, incomplete, not finite, or a
            configuration that speaks of other tensors.
    """
    folder = locate(folder, revision)
    with reading(str(folder), "an adapter"):
        check_sums(folder, [CONFIG_FILE])
        content = read_json(folder / CONFIG_FILE)

        def tensors() -> dict[str, StoredTensor]:
            index = open_index(folder, STEM)
            check_content(index)
            return index

        # What no kind claims is left to LoRA, which says what it wants.
        kinds = (kind for kind in KINDS.values() if kind.claims(content))
        return next(kinds, Lora).read(folder / CONFIG_FILE, content, tensors, spec)


def named_base(folder: Path) -> str:
    """The base that an adapter's configuration names, `NAME@REVISION` where it names a revision.

    Empty where it names none.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = folder / CONFIG_FILE
    content = read_json(file)
    check_kinds(file, content)
    return pinned(content.get("base_model_name_or_path") or "", content.get("revision"))


def trained_on(folder: Path) -> str:
    """The fingerprint of the base that an adapter was trained on, by the record of its run.

    Empty where there is no such record beside the folder.
    """
    return str(_record(folder).get("inputs", {}).get("model.path", ""))


def rounded_to(folder: Path) -> str:
    """The `model.quantize` that an adapter was trained with, by the same record; empty: unknown."""
    return str(_record(folder).get("config", {}).get("model", {}).get("quantize", ""))


def _record(folder: Path) -> dict[str, Any]:
    """Of the run whose output an adapter is; empty where there is none."""
    folder = folder.absolute()
    return read_sealed(folder.parent / RECORD) if folder.name == "adapter" else {}


def weights_digest(adapter: str) -> str:
    """A short name for what an adapter folder holds: another content, another name.

    Raises:
        UserError: the weights are in several files, and one of them is missing or damaged.
    """
    folder, digest = locate(adapter), hashlib.sha256()
    index_file = folder / f"{STEM}.safetensors.index.json"
    weights = weights_in(folder)
    stored = [weights[name] for name in (f"{STEM}.safetensors",) if name in weights]
    if not stored and index_file.is_file():
        # As `load_peft` reads them; the index is part of the content: it says which copy counts.
        shards = {str(one.file): one.file for one in open_index(folder, STEM).values()}
        stored = [DiskFile(index_file), *(shards[name] for name in sorted(shards))]
    if (config := DiskFile(folder / CONFIG_FILE)).path.is_file():
        stored = [config, *stored]
    for file in stored:
        digest.update(file.read(0, file.size))
    return digest.hexdigest()[:16]
