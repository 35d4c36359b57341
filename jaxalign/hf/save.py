"""A folder that PyTorch reads: a base, fully trained or merged model.

Every save is atomic (a folder is complete or absent) and is called by all processes: each helps to
gather the arrays, process 0 writes. The others return before it is done; who reads the folder next
waits at a barrier of its own. `jaxalign.hf.pending` makes the tensors, `jaxalign.hf.peft` writes
adapters.

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
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.checksums import check_sums, read_sums
from jaxalign.errors import UserError
from jaxalign.folders import whole_folder
from jaxalign.hf.files import read_json, write_json
from jaxalign.hf.find import TOKENIZER_FILES as TOKENIZER_FILES
from jaxalign.hf.find import locate, small_files
from jaxalign.hf.generation import GENERATION_FILE
from jaxalign.hf.pending import tree_tensors
from jaxalign.hf.stream import METADATA as METADATA
from jaxalign.hf.stream import SHARD_BYTES, Pending, write_shards
from jaxalign.model.spec import ModelSpec


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


@contextmanager
def writing(folder: str | Path, marker: str) -> Iterator[Path | None]:
    """The folder to write into on process 0, None elsewhere."""
    first = jax.process_index() == 0
    whole = whole_folder(Path(folder), "update", markers=[marker]) if first else nullcontext()
    with whole as target:
        yield target


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
