"""A base checkpoint becomes sharded arrays: read in slices, one leaf at a time, without torch.

Everything that can be wrong is checked on the headers before the first weight is read. The host
never holds more than this process's share of the parameters and of one stacked leaf.

    spec = load_spec('models/llama')                             # a folder or a hub name
    shardings = shard_tree(mesh, abstract_params(spec, jnp.bfloat16))
    params = load_params('models/llama', spec, jnp.bfloat16, shardings)
    fingerprint('models/llama')                                  # same base as last time?
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.checksums import check_sums
from jaxalign.errors import UserError, reading
from jaxalign.frozen.quantised import quantise, quantise_on
from jaxalign.hf.files import read_json
from jaxalign.hf.find import locate, small_files
from jaxalign.hf.leaf import load_leaf
from jaxalign.hf.tensors import DTYPES, StoredTensor, check_content, open_index
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.keys import ids
from jaxalign.model.spec.tensors import (
    TARGETS,
    Row,
    base_rows,
    get_leaf,
    set_leaf,
    sizes,
)

# More readers hide the latency of network disks, but each keeps one mapped tensor resident.
_READERS = 4
# Of a few bytes each: in a bucket every one is a request that is waited for.
_SAMPLERS = 32
# Numbers of the embeddings that are compared with a written head at once.
_STRIP = 1 << 22
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_spec(path: str | Path, revision: str | None = None) -> ModelSpec:
    """The facts of the model in this folder or hub repository.

    The stop ids of `generation_config.json` join those of `config.json`: instruction-tuned models
    often name their end-of-turn token only there. From the hub no weights are fetched for it.

    Raises:
        UserError: no such folder, no config.json, or a model that is not supported.
    """
    folder = small_files(path, revision)
    check_sums(folder, ["config.json", "generation_config.json"])
    config = read_json(folder / "config.json")
    try:
        with reading(str(folder / "config.json"), "the facts of a model"):
            spec = ModelSpec.from_hf(config)
        if (file := folder / "generation_config.json").is_file():
            more = ids(read_json(file), "eos_token_id", file.name)
            spec = dataclasses.replace(spec, eos_ids=tuple(dict.fromkeys([*spec.eos_ids, *more])))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(f"{folder}") else f"{folder}: {text}") from error
    return spec


def abstract_params(spec: ModelSpec, dtype: Any, quantize: str = "none") -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s: for shardings, plans and restores."""
    tree: dict[str, Any] = {}
    for row in base_rows(spec):
        leaf: Any = jax.ShapeDtypeStruct(row.shape(sizes(spec)), dtype)
        if quantize != "none" and row in TARGETS.values():
            round_ = partial(quantise, kind=quantize, inputs=len(row.inputs))
            leaf = jax.eval_shape(round_, leaf)
        set_leaf(tree, row.path, leaf)
    return tree


def load_params(
    path: str | Path,
    spec: ModelSpec,
    dtype: Any,
    shardings: Any = None,
    revision: str | None = None,
    quantize: str = "none",
) -> dict[str, Any]:
    """The parameter tree of a checkpoint.

    Args:
        path: folder in Hugging Face layout, or a hub name.
        spec: its facts, from `load_spec`.
        dtype: of every leaf; float16, bfloat16, float32 (and float64) files are converted.
        shardings: a tree like the parameters' with a `jax.sharding.Sharding` at every leaf, or one
            for all leaves; None puts everything on the default device.
        revision: hub branch, tag or commit.
        quantize: `int8`, `int4` or `nf4` for the projections' weights, each rounded on its devices
            before the next is read; `none`.

    Returns:
        Nested dicts of `jax.Array` (`Quantised` where rounded), blocks stacked over L.

    Raises:
        UserError: the folder, a file or a tensor is missing, cut short, misshapen or not known.
    """
    folder = locate(path, revision)
    index = _checked_index(folder, spec)
    check_content(index, jax.process_index(), jax.process_count())
    _check_head(index, spec, jax.process_index(), jax.process_count())
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shared = isinstance(shardings, jax.sharding.Sharding)
    params: dict[str, Any] = {}
    with ThreadPoolExecutor(_READERS) as readers:
        for row in base_rows(spec):
            sharding = shardings if shared else get_leaf(shardings, row.path)
            leaf: Any = load_leaf(row, index, spec, np.dtype(dtype), sharding, readers)
            if quantize != "none" and row in TARGETS.values():
                leaf = quantise_on(leaf, quantize, len(row.inputs), sharding)
            set_leaf(params, row.path, leaf)
    return params


def fingerprint(path: str | Path, revision: str | None = None) -> str:
    """A hex digest by which the same base is known again, without reading all of it.

    It covers the facts that change the model's outputs and, of every tensor, name, shape, dtype and
    some bytes; not how the tensors are spread over files, nor which version wrote them.
    """
    folder = locate(path, revision)
    spec = load_spec(folder)
    index = _checked_index(folder, spec)
    facts = dataclasses.asdict(spec)
    for key in ("bos_id", "eos_ids", "pad_id", "max_position"):
        del facts[key]
    # A fact that a family lacks is left out: new facts leave the digests of old models alone.
    for field in dataclasses.fields(spec):
        if field.default is not dataclasses.MISSING and facts[field.name] == field.default:
            del facts[field.name]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    tensors = {name: index[name] for name in _expected_names(spec)}
    with ThreadPoolExecutor(_SAMPLERS) as readers:
        samples = readers.map(StoredTensor.sample, tensors.values())
        for (name, tensor), sample in zip(tensors.items(), samples, strict=True):
            digest.update(f"{name} {tensor.dtype_name} {tensor.shape}".encode())
            digest.update(sample)
    return digest.hexdigest()


def base_index(folder: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """Every tensor of a base, compared with what its config.json asks for.

    No weight is read, but for a head that is written out next to the embeddings that it should be.

    Raises:
        UserError: the folder, a file or a tensor is missing, cut short, misshapen or not known.
    """
    index = _checked_index(folder, spec)
    _check_head(index, spec)
    return index


def _checked_index(folder: Path, spec: ModelSpec) -> dict[str, StoredTensor]:
    """As `base_index`, from the headers alone: a fingerprint costs no pass over a head."""
    index = open_index(folder, "model")
    if spec.tied and _EMBED not in index and _HEAD in index:
        index[_EMBED] = index.pop(_HEAD)  # some tools keep the other name of the one matrix
    expected = _expected_names(spec)
    for name, row in expected.items():
        if name not in index:
            raise _missing(folder, name, index)
        tensor, shape = index[name], row.hf_shape(sizes(spec))
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, but config.json "
                f"asks for {list(shape)}; the two files are not of the same model"
            )
        if tensor.dtype_name not in DTYPES:
            raise UserError(
                f"{tensor.file}: tensor {name} is stored as {tensor.dtype_name}; quantized weights "
                "are not supported, give a float16, bfloat16 or float32 checkpoint"
            )
    for name, tensor in index.items():
        if name not in expected and not _may_be_ignored(name, spec):
            raise UserError(
                f"{tensor.file}: tensor {name} has no place in the {spec.family} model that "
                "config.json describes; the two files are not of the same model"
            )
    return index


def _expected_names(spec: ModelSpec) -> dict[str, Row]:
    return {
        row.name(layer): row
        for row in base_rows(spec)
        for layer in range(spec.layers if row.stacked else 1)
    }


def _check_head(
    index: dict[str, StoredTensor], spec: ModelSpec, part: int = 0, parts: int = 1
) -> None:
    """A tied head that is written out, too, must be the embeddings, number by number.

    Transformers 4 ignores such a head, transformers 5 uses it where it differs: two models.

    Args:
        index: of a base whose shapes and dtypes are right.
        spec: its facts.
        part: which share of the rows this process compares.
        parts: how many processes there are.

    Raises:
        UserError: they differ.
    """
    if not spec.tied or _HEAD not in index:
        return
    embed, head = index[_EMBED], index[_HEAD]
    each = max(1, _STRIP // spec.dim)
    starts = range(part * each, spec.vocab, parts * each)

    def same(start: int) -> bool:
        stop = min(start + each, spec.vocab)
        # As they are used: the two may be stored in different precisions.
        ours, theirs = (one.rows(start, stop).astype(np.float32) for one in (embed, head))
        return np.array_equal(ours, theirs)

    with ThreadPoolExecutor(_READERS) as readers:
        if head.shape == embed.shape and all(readers.map(same, starts)):
            return
    raise UserError(
        f"{head.file}: {_HEAD} differs from {_EMBED}, though config.json says "
        "tie_word_embeddings; set it to false if the head is separate, or save the model again "
        "without it"
    )


def _missing(folder: Path, name: str, index: dict[str, StoredTensor]) -> UserError:
    if name == _HEAD:
        return UserError(
            f"{folder}: tensor {name} is missing; if the embeddings are also the head, set "
            "tie_word_embeddings: true in config.json"
        )
    if any(".lora_A." in known for known in index):
        return UserError(f"{folder}: holds an adapter, not a base model; give the base's folder")
    return UserError(
        f"{folder}: tensor {name} is missing ({len(index)} others are there); the checkpoint is "
        "incomplete or config.json is another model's"
    )


def _may_be_ignored(name: str, spec: ModelSpec) -> bool:
    # Old exports carry the rotary table, and a tied head written out next to the embeddings.
    return name.endswith("rotary_emb.inv_freq") or (spec.tied and name == _HEAD)
