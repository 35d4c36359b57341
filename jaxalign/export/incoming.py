"""`jaxalign import`: an adapter trained elsewhere is checked against its base and made ours.

`--adapter` and `adapter.start` take a PEFT folder or a hub name as it is. An import reports what is
in it, mends spellings of its tensors' names, and leaves a folder that evaluation, probe, merge and
export take like a run's own, with the settings to go on training from it.

    import_adapter('danniliu/llama3-8b-slots', 'meta-llama/Meta-Llama-3-8B-Instruct', 'runs/theirs')
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.adapters import Adapter
from jaxalign.adapters.ranks import block_range
from jaxalign.base import open_files
from jaxalign.config import as_yaml
from jaxalign.data.template import TOKENIZER_FILE, find_template, recorded, template_files
from jaxalign.errors import UserError
from jaxalign.export.run import write_texts
from jaxalign.export.source import CONFIG_FILE, read_adapter
from jaxalign.folders import check_target, whole_folder
from jaxalign.hf.find import locate
from jaxalign.hf.kinship import other_name
from jaxalign.hf.peft import named_base, save_peft
from jaxalign.hf.save import TOKENIZER_FILES, copy_files
from jaxalign.hf.stream import Pending, write_file
from jaxalign.hf.tensors import open_index
from jaxalign.model.spec import ModelSpec
from jaxalign.settings import Config
from jaxalign.terminal import console

# Spellings of the same tensors: a state_dict saved by hand keeps the adapter's name in it, some
# tools leave PEFT's prefix out.
SPELLINGS = (
    (re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.default(?=\.weight$|$)"), r".\1"),
    (re.compile(r"^(?=model\.layers\.)"), "base_model.model."),
)
STEM = "adapter_model"


@dataclass(frozen=True)
class Found:
    """What an adapter turned out to be."""

    path: str
    base: str
    named_base: str  # as its configuration has it
    adapter: Adapter
    weights: Mapping[str, Any]
    stored: tuple[str, ...]  # dtypes in the file
    tensors: int
    renamed: int
    idle: tuple[int, ...]  # blocks whose factors b are all zero: they change nothing


def import_adapter(path: str, base: str, out: str, existing: str = "refuse") -> Found:
    """Checks, normalises, writes `OUT/adapter` and `OUT/continue.yaml`, prints what was found.

    Args:
        path: PEFT folder or hub name.
        base: the model it sits on: folder or hub name.
        out: the folder to make.
        existing: what becomes of a folder there that is not empty: refuse or replace.

    Raises:
        UserError: not an adapter that fits this base, or a folder that cannot be written.
    """
    check_target(Path(out), existing)
    folder, opened = locate(path), open_files(base)
    where, spec = opened.files, opened.spec
    found = inspect(folder, path, base, spec)
    opened.check_weights(folder)
    tokenizer = next((one for one in (folder, where) if any(one.glob("tokenizer*"))), None)
    if tokenizer:
        _check_vocabulary(path, tokenizer, spec)
    opened.check_tokens(folder)
    must_stay = [Path.cwd(), Path.home(), folder, where]
    # continue.yaml is there to be edited.
    with whole_folder(Path(out), existing, keep=must_stay, sealed=["adapter"]) as new:
        adapter = new / "adapter"
        save_peft(adapter, found.weights, spec, found.adapter, base_name=base)
        if tokenizer:
            copy_files(tokenizer, adapter, TOKENIZER_FILES)
        template = find_template(opened.its_tokenizer, None, folder)
        write_texts(adapter, template_files(template, adapter / TOKENIZER_FILE))
        (new / "continue.yaml").write_text(settings(found, out, recorded(folder)), "utf-8")
    whose = {folder: "its own", where: "the base's", None: "none"}[tokenizer]
    _show(found, spec, whose, template.kind, out)
    return found


def inspect(folder: Path, path: str, base: str, spec: ModelSpec) -> Found:
    """What the adapter in this folder is, checked against the base.

    Raises:
        UserError: not an adapter, not for this base, incomplete, or not finite.
    """
    named = named_base(folder)
    index = open_index(folder, STEM)
    spelled = {name: _spelled(name) for name in index}
    renamed = sum(name != new for name, new in spelled.items())
    if renamed:
        with tempfile.TemporaryDirectory() as work:
            tensors = [
                Pending(spelled[name], one.shape, one.dtype, partial(np.asarray, one.view()))
                for name, one in index.items()
            ]
            write_file(Path(work, f"{STEM}.safetensors"), tensors)
            copy_files(folder, Path(work), (CONFIG_FILE,))
            try:
                weights, adapter = read_adapter(Path(work), spec, base)
            except UserError as error:
                raise UserError(str(error).replace(work, str(folder))) from error
    else:
        weights, adapter = read_adapter(folder, spec, base)
    return Found(
        path=path,
        base=base,
        named_base=named,
        adapter=adapter,
        weights=weights,
        stored=tuple(sorted({one.dtype.name for one in index.values()})),
        tensors=len(index),
        renamed=renamed,
        idle=adapter.idle(weights),
    )


def settings(found: Found, out: str, trained: Config | None = None) -> str:
    """YAML with which `jaxalign train` goes on from the imported adapter.

    Args:
        found: the adapter.
        out: the folder that is made.
        trained: the settings of its training, where they are recorded beside it.
    """
    tree = {
        "output": f"{out}/continued",
        "model": {"path": found.base},
        **found.adapter.words(),
    }
    if trained and trained.templated:
        tree["prompt"] = dataclasses.asdict(trained.prompt)
    tree["adapter"] = tree.get("adapter", {}) | {"start": f"{out}/adapter"}
    return (
        f"# To go on training from {found.path}: name the data, as in\n"
        f"# jaxalign train {out}/continue.yaml task.train=[...] align.train=[...]\n" + as_yaml(tree)
    )


def _spelled(name: str) -> str:
    for pattern, new in SPELLINGS:
        name = pattern.sub(new, name)
    return name


def _check_vocabulary(path: str, tokenizer: Path, spec: ModelSpec) -> None:
    size = len(open_files(str(tokenizer)).tokenizer)
    if size > spec.vocab:
        raise UserError(
            f"{path}: its tokenizer knows {size} tokens, the base only {spec.vocab}; it was "
            "trained on a base with more embeddings, give that as --base"
        )


def _show(found: Found, spec: ModelSpec, tokenizer: str, template: str, out: str) -> None:
    screen = console(soft_wrap=True)
    rows = {
        "adapter": found.path,
        "base": found.base,
        "names as its base": found.named_base or "nothing",
        **found.adapter.facts(spec),
        "tensors": f"{found.tensors}, stored as {', '.join(found.stored)}, written as float32",
        "tokenizer": tokenizer,
        "chat template": {"base": "the base's", "own": "its own", "none": "none"}[template],
    }
    for name, value in rows.items():
        screen.print(f"{name:20}{value}")
    if found.renamed:
        screen.print(f"{found.renamed} tensors were renamed to PEFT's spelling")
    if found.idle:
        screen.print(
            f"in blocks {block_range(found.idle)} every lora_B is zero: it changes nothing there",
            style="yellow",
        )
    if said := other_name(found.named_base, found.base, found.path):
        screen.print(said, style="yellow")
    screen.print(
        f"written: {out}/adapter, for --adapter, jaxalign merge and jaxalign export; "
        f"{out}/continue.yaml, to go on training"
    )
