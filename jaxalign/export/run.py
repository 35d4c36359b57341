"""`jaxalign export`: a run or an adapter becomes what PyTorch, vLLM or JAX load.

export(Request('runs/own'))                                  # runs/own/export/peft
export(Request('runs/own', format='merged', dtype='bfloat16', verify=True))
export(Request('runs/own', push='me/slots-cy', private=True))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign.data.template import TOKENIZER_FILE, find_template, template_files
from jaxalign.errors import UserError
from jaxalign.export.facts import card_facts
from jaxalign.export.push import check_hub, push
from jaxalign.export.request import Request
from jaxalign.export.source import (
    CONFIG_FILE,
    DIVERGED,
    Source,
    holds_weights,
    open_source,
    whole_base,
)
from jaxalign.export.verify import BOUNDS, in_memory, verify
from jaxalign.folders import check_target, whole_folder
from jaxalign.generate.stops import taught_stops
from jaxalign.hf.card import model_card
from jaxalign.hf.files import read_json, write_json
from jaxalign.hf.find import on_hub, pinned
from jaxalign.hf.generation import GENERATION_FILE, generation_files, unsaid_stops
from jaxalign.hf.kinship import other_rounding
from jaxalign.hf.peft import save_peft
from jaxalign.hf.pending import assemble, merged_tensors, tree_tensors
from jaxalign.hf.save import TOKENIZER_FILES, config_for, copy_files, write_like_base
from jaxalign.hf.stream import SHARD_BYTES, Pending, finite
from jaxalign.hf.tensors import open_index
from jaxalign.terminal import console

KINDS = {"peft": "adapter", "merged": "model", "orbax": "tree"}  # of the card, by format
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}  # as the hub counts


def export(request: Request) -> Path:
    """Writes what is asked for and prints what it was.

    Returns:
        The folder that was written.

    Raises:
        UserError: anything in the run, the base, the folder or the hub that cannot work.
    """
    screen = console(soft_wrap=True)
    shard_bytes = parse_size(request.max_shard_size) if request.max_shard_size else SHARD_BYTES
    if request.format not in WRITERS:
        raise UserError(f"--format {request.format}: choose among {', '.join(WRITERS)}")
    if request.dtype and request.dtype not in BOUNDS:
        raise UserError(f"--dtype {request.dtype}: choose among {', '.join(BOUNDS)}")
    if request.dtype and request.format == "peft":
        raise UserError("--dtype is for merged and orbax; an adapter is always float32")
    if request.max_shard_size and request.format != "merged":
        raise UserError(
            f"--max-shard-size: {request.format} is not written in shards; leave it out, or use "
            "--format merged"
        )
    out = Path(request.out) if request.out else default_out(request.source, request.format)
    check_target(out, request.existing)
    if request.push:
        check_hub(request.push)
    source = open_source(request.source, request.step, request.base)
    if source.adapter is None and request.format == "peft":
        raise UserError(
            f"{request.source} trained all weights, so there is no adapter; use --format merged"
        )
    if source.adapter and not source.adapter.merges and request.format != "peft":
        raise UserError(
            f"--format {request.format}: the {source.adapter.name} of {request.source} is not a "
            "change of weights and cannot be merged; use --format peft"
        )
    if source.files and request.format != "peft":  # which gets the adapter's own tokenizer
        source.opened.check_tokens(source.files)
    must_stay = [Path.cwd(), Path.home(), source.folder, *([source.files] if source.files else [])]
    if "://" not in request.source and Path(request.source).is_dir():
        must_stay.append(Path(request.source))
    trained = source.config.model.quantize if source.config and source.adapter else ""
    if request.format != "peft" and (doubt := other_rounding(trained, "none", request.source)):
        screen.print(f"warning: {doubt}")
    with whole_folder(out, request.existing, keep=must_stay) as folder:
        dtype = WRITERS[request.format](source, folder, request.dtype, shard_bytes)
        template = find_template(source.opened.its_tokenizer, source.config, source.files)
        write_texts(folder, template_files(template, folder / TOKENIZER_FILE))
        taught = taught_stops(source.opened.its_tokenizer, template.text)
        if request.format != "peft":
            write_texts(folder, generation_files(folder / GENERATION_FILE, source.spec, taught))
        facts = card_facts(
            source,
            KINDS[request.format],
            path=request.push or str(out),
            template=template,
            stops=unsaid_stops(source.folder / GENERATION_FILE, source.spec, taught),
            dtype="" if request.format == "peft" else dtype,
        )
        (folder / "README.md").write_text(model_card(facts), "utf-8")
        if request.push and not on_hub(source.base):
            _forget_place(folder / CONFIG_FILE)
        if request.verify:
            screen.print(str(verify(source, folder, request.format, dtype, in_memory(source))))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    screen.print(f"{describe(source)}: written to {out} ({request.format}, {size / 1e6:,.1f} MB)")
    if request.push:
        screen.print(
            f"pushed: {push(out, request.push, 'private' if request.private else 'default')}"
        )
        screen.print("README.md names no licence: choose one on that page")
    return out


def default_out(run: str, form: str) -> Path:
    """RUN/export/FORMAT, or next to an adapter folder; a hub name's adapter comes here."""
    if "://" in run:
        raise UserError(f"--out: {run} is in the cloud; name a local folder to export to")
    folder = Path(run.rstrip("/"))
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        return folder / "export" / form
    name = f"{folder.name}_{form}"
    return folder.parent / name if folder.is_dir() else Path(name)


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB' or a plain number.

    Raises:
        UserError: neither, or less than a byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: write a size such as 5GB or 500MB")
    return size


def describe(source: Source) -> str:
    """A few words about what is exported."""
    adapter, saved = source.adapter, source.saved
    what = adapter.brief if adapter else "all weights"
    if saved is None:
        return f"{source.name}, {what}"
    return f"{source.name}, step {saved.step:,}{' (best)' if saved.best else ''}, {what}"


def _forget_place(file: Path) -> None:
    """A base on this machine is named without its path, which nobody else has."""
    if file.is_file():
        config = read_json(file)
        name = Path(config["base_model_name_or_path"]).name
        write_json(file, config | {"base_model_name_or_path": name})


# Forms --------------------------------------------------------------------------------------------


def _peft(source: Source, folder: Path, dtype: str, shard_bytes: int) -> str:
    assert source.adapter is not None  # checked by `export`
    save_peft(
        folder,
        source.weights,
        source.spec,
        source.adapter,
        base_name=pinned(source.base, source.opened.revision),
    )
    own = source.files if source.files and any(source.files.glob("tokenizer*")) else None
    copy_files(own or source.folder, folder, TOKENIZER_FILES)
    return "float32"


def _merged(source: Source, folder: Path, dtype: str, shard_bytes: int) -> str:
    tensors = model_tensors(source, dtype)
    how: Any = {"max_shard_bytes": shard_bytes}
    return coarsest(write_like_base(folder, tensors, source.spec, source.folder, **how))


def _orbax(source: Source, folder: Path, dtype: str, shard_bytes: int) -> str:
    import orbax.checkpoint as ocp

    tensors = model_tensors(source, dtype)
    params = assemble(tensors, source.spec)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(folder / "params", args=ocp.args.StandardSave(params))
    kinds = {tensor.dtype.name for tensor in tensors}
    one = "" if len(kinds) > 1 else min(kinds)
    write_json(folder / "config.json", config_for(source.spec, one, source.folder))
    copy_files(source.folder, folder, (*TOKENIZER_FILES, GENERATION_FILE))
    return coarsest(kinds)


WRITERS: dict[str, Callable[[Source, Path, str, int], str]] = {
    "peft": _peft,
    "merged": _merged,
    "orbax": _orbax,
}


def model_tensors(source: Source, dtype: str = "") -> list[Pending]:
    """The whole model, tensor by tensor: the base with the adapter, or all trained weights.

    Args:
        source: what is exported.
        dtype: of every tensor; empty: that of the base's tensors.
    """
    kind: Any = jnp.dtype(dtype) if dtype else None
    if source.adapter is None:
        kind = kind or stored_dtype(source)
        tensors = tree_tensors(source.weights, source.spec, kind, order="leaves")
        return [finite(tensor, DIVERGED) for tensor in tensors]
    tensors = merged_tensors(whole_base(source), source.spec, source.weights, source.adapter, kind)
    advice = "the base's files are broken, or --dtype cannot hold such numbers"
    return [finite(tensor, advice) for tensor in tensors]


def stored_dtype(source: Source) -> np.dtype:
    """What the base's weights are stored as; by its config.json where they are not here."""
    if holds_weights(source.folder):
        return open_index(source.folder, "model")["model.embed_tokens.weight"].dtype
    config = read_json(source.folder / "config.json")
    return jnp.dtype(config.get("dtype") or config.get("torch_dtype") or "float32")


def coarsest(names: set[str]) -> str:
    """The dtype among these that rounds most."""
    return max(names, key=lambda name: BOUNDS.get(name, 0.0))


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Files by name."""
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
