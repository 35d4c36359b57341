"""`jaxalign merge`: PEFT folders in, one PEFT folder or one model out, and what the merge cost.

merge(['runs/task/adapter', 'runs/align/adapter'], [0.6, 0.4], Recipe('delta'), 'runs/both')
merge(['runs/task/adapter'], [1.0], Recipe(), 'runs/model', into='models/llama')
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxalign.adapters.lora import Lora
from jaxalign.base import weights_digest
from jaxalign.errors import UserError
from jaxalign.hf.card import model_card
from jaxalign.hf.find import locate, small_files
from jaxalign.hf.load import fingerprint, load_spec
from jaxalign.hf.names import TARGETS, sizes
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.peft_config import VLLM_RANKS, named_base, vllm_limits, vllm_rank
from jaxalign.hf.save import merged_tensors, write_model
from jaxalign.hf.stream import Pending
from jaxalign.merge.algebra import (
    METHODS,
    Cell,
    Merged,
    Recipe,
    Weighted,
    check,
    combine,
    whole_updates,
)
from jaxalign.merge.card import base_template, merge_facts
from jaxalign.model.spec import ModelSpec
from jaxalign.multihost import barrier, is_main

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Source:
    """An adapter folder that was read."""

    path: str
    lora: dict[str, Any]
    adapter: Lora
    base: str  # as its configuration names it
    template: str  # the chat template beside it, or nothing

    def weighted(self, weight: float) -> Weighted:
        """With its weight in a merge."""
        return Weighted(self.lora, self.adapter, weight, self.path)


def merge(
    paths: Sequence[str],
    weights: Sequence[float],
    recipe: Recipe,
    out: str,
    *,
    base: str = "",
    into: str = "",
    existing: str = "refuse",
) -> None:
    """Combines adapters and writes an adapter, or with `into` a whole model; prints what it did.

    Args:
      paths: PEFT folders or hub names, all over one base.
      weights: one for each.
      recipe: method, rank, density, seed.
      out: the folder to write.
      base: the adapters' base; empty: the one that the first names.
      into: the base that the update is added to; empty: an adapter is written.
      existing: what to do where `out` is not empty, `refuse` or `replace`.

    Raises:
      UserError: anything in the adapters, the weights, the recipe or the folder that cannot work.
    """
    if len(weights) != len(paths):
        raise UserError(
            f"--weights: {len(weights)} for {len(paths)} adapters; give one number for each, as in "
            f"{','.join(['1'] * len(paths))} for their sum"
        )
    check_out(out, paths, existing)
    name, spec = find_base(paths, into or base)
    sources = read_adapters(paths, spec)
    parts = [source.weighted(weight) for source, weight in zip(sources, weights, strict=True)]
    check(parts, spec, recipe)
    console = Console(quiet=not is_main())
    warn(sources, into or base, console)
    if into:
        _into_base(sources, weights, spec, recipe, into, out)
        console.print(f"{_sum_of(paths, weights)} by {recipe.method}, added to {into}: {out}",
                      highlight=False)  # fmt: skip
    else:
        merged = combine(parts, spec, recipe)
        write_adapter(merged, sources, weights, spec, recipe, out, name, small_files(name))
        show(merged, sources, weights, recipe, out, console)
    barrier("merged")


# Reading ------------------------------------------------------------------------------------------


def find_base(paths: Sequence[str], given: str = "") -> tuple[str, ModelSpec]:
    """The base that is given, or that the first adapter names, and its facts.

    Raises:
      UserError: no base is named, or it cannot be read.
    """
    if given:
        return given, load_spec(given)
    named = _named_base(paths[0])
    if not named:
        raise UserError(f"{paths[0]}: its configuration names no base; give it by --base MODEL")
    try:
        return named, load_spec(named)
    except UserError as error:
        raise UserError(
            f"{paths[0]}: the base that it names cannot be read ({error}); give it by --base MODEL"
        ) from error


def read_adapters(paths: Sequence[str], spec: ModelSpec) -> list[Source]:
    """Every adapter, checked against the base.

    Raises:
      UserError: one that is not for this base, incomplete, or not finite.
    """
    return [_read(path, spec) for path in paths]


def _read(path: str, spec: ModelSpec) -> Source:
    lora, adapter = load_peft(path, spec)
    template = locate(path) / TEMPLATE
    text = template.read_text("utf-8") if template.is_file() else ""
    return Source(path, lora, adapter, _named_base(path), text)


def _named_base(path: str) -> str:
    return named_base(locate(path))


def warn(sources: Sequence[Source], given: str, console: Console) -> None:
    """Says what makes a merge doubtful: other bases, other chat templates."""
    named = [(source.path, source.base) for source in sources if source.base]
    reference = (sources[0].path, sources[0].base) if not given else ("the command line", given)
    for path, base in named:
        if reference[1] and base != reference[1]:
            console.print(
                f"warning: {path} names {base} as its base, {reference[0]} {reference[1]}; the "
                "shapes agree, but an update learnt on one base means little on another",
                style="yellow",
                highlight=False,
            )
    templates = {source.template for source in sources if source.template}
    if len(templates) > 1:
        console.print(
            f"warning: the adapters come with different chat templates; {sources[0].path}'s is "
            "written",
            style="yellow",
            highlight=False,
        )


# Writing ------------------------------------------------------------------------------------------


def check_out(out: str, paths: Sequence[str], existing: str) -> None:
    """Refuses a folder that must not be written to.

    Raises:
      UserError: it is one of the adapters, or not empty and `existing` is `refuse`.
    """
    folder = Path(out)
    for path in paths:
        if Path(path).exists() and folder.resolve() == Path(path).resolve():
            raise UserError(f"--out: {out} is one of the adapters; choose a folder of its own")
    if existing == "refuse" and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out: {out} is not empty; choose a new folder, or add --force")


def write_adapter(
    merged: Merged,
    sources: Sequence[Source],
    weights: Sequence[float],
    spec: ModelSpec,
    recipe: Recipe,
    out: str,
    base: str,
    base_files: Path,
) -> None:
    """The PEFT folder, with `merge.json` (how it was made), a card and what prompts need.

    That is the tokenizer of the base, from `base_files`, and the first adapter's chat template.
    """
    record = {
        "method": recipe.method,
        "adapters": [
            {"path": s.path, "weight": w, "digest": weights_digest(s.path), "rank": s.adapter.r}
            for s, w in zip(sources, weights, strict=True)
        ],
        "rank": merged.adapter.r,
        "density": recipe.density,
        "seed": recipe.seed if "seed" in METHODS[recipe.method].reads else None,
        "relative_error": merged.error,
        "modules": {
            target: {str(block): error for block, error in merged.errors(target).items()}
            for target in merged.adapter.targets
        } if merged.lost else None,
    }  # fmt: skip
    texts = {"merge.json": json.dumps(record, indent=1) + "\n"}
    template = next((source.template for source in sources if source.template), "")
    if template:
        texts[TEMPLATE] = template
    facts = merge_facts(
        out,
        base,
        _parts(sources, weights),
        recipe,
        merged,
        template="own" if template else base_template(base_files),
    )
    texts["README.md"] = model_card(facts)
    save_peft(
        out,
        merged.lora,
        spec,
        merged.adapter,
        base_name=base,
        texts=texts,
        tokenizer_from=base_files,
    )


def _into_base(
    sources: Sequence[Source],
    weights: Sequence[float],
    spec: ModelSpec,
    recipe: Recipe,
    base: str,
    out: str,
) -> None:
    """Writes the base with the update added, tensor by tensor, in the dtype they are stored in."""
    fingerprint(base)  # complete and known, before anything is written
    parts = [source.weighted(weight) for source, weight in zip(sources, weights, strict=True)]
    merged = None
    if METHODS[recipe.method].low or recipe.rank is not None:
        merged = combine(parts, spec, recipe)
        tensors = merged_tensors(base, spec, merged.lora, merged.adapter)
    else:
        tensors = _whole_tensors(base, spec, whole_updates(parts, spec, recipe))
    dtype = next(tensor.dtype for tensor in tensors)
    facts = merge_facts(
        out,
        base,
        _parts(sources, weights),
        recipe,
        merged,
        kind="model",
        template=base_template(locate(base)),
    )
    write_model(
        out,
        tensors,
        spec.to_hf() | {"torch_dtype": dtype.name},
        tokenizer_from=base,
        texts={"README.md": model_card(facts)},
    )


def _parts(sources: Sequence[Source], weights: Sequence[float]) -> list[tuple[str, float, Lora]]:
    return [(one.path, weight, one.adapter) for one, weight in zip(sources, weights, strict=True)]


def _whole_tensors(
    base: str, spec: ModelSpec, updates: Mapping[Cell, Callable[[], np.ndarray]]
) -> list[Pending]:
    """The base's tensors with whole updates added: nothing is cut to a rank."""
    size = sizes(spec)
    cell_of = {TARGETS[cell[0]].name(cell[1] - 1): cell for cell in updates}

    def add(plain: Pending, cell: Cell) -> np.ndarray:
        row = TARGETS[cell[0]]
        kernel = row.to_ours(plain.make().astype(np.float32), size)
        whole = kernel + updates[cell]().reshape(kernel.shape)
        return row.to_hf(whole, size).astype(plain.dtype)

    found = []
    for plain in merged_tensors(base, spec, {}, Lora(targets=())):
        cell = cell_of.get(plain.name)
        changed = dataclasses.replace(plain, make=partial(add, plain, cell)) if cell else plain
        found.append(changed)
    return found


# Telling ------------------------------------------------------------------------------------------


def show(
    merged: Merged,
    sources: Sequence[Source],
    weights: Sequence[float],
    recipe: Recipe,
    out: str,
    console: Console,
) -> None:
    """Prints what was merged, what it cost, and how it can be served."""
    table = Table(box=None, header_style="bold")
    for head in ("adapter", "weight", "rank", "scale", "targets", "blocks"):
        number = head in ("weight", "rank", "scale")
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for source, weight in zip(sources, weights, strict=True):
        table.add_row(source.path, f"{weight:g}", *_facts(source.adapter))
    table.add_row(f"{out} ({recipe.method})", "", *_facts(merged.adapter), style="bold")
    console.print(table)
    if merged.lost:
        console.print(_error_table(merged))
        console.print(
            f"relative error of the whole update (Frobenius norm): {merged.error:.2%}",
            highlight=False,
        )
    console.print(serving(merged.adapter), highlight=False)


def serving(adapter: Lora) -> str:
    """What vLLM needs to be told to serve an adapter, or why it does not."""
    if limits := vllm_limits(adapter):
        return "; ".join(limits)
    rank = adapter.r
    enough = vllm_rank(rank)
    if enough == rank:
        return f"vLLM serves it with --max-lora-rank {rank}"
    told = (
        f"rank {rank} is none of vLLM's --max-lora-rank ({', '.join(map(str, VLLM_RANKS))}): serve "
        f"it with {enough}, which pads it"
    )
    below = max(served for served in VLLM_RANKS if served < rank)
    return told + (f", or cut it by --method svd --rank {below}" if 2 * below > rank else "")


def _facts(adapter: Lora) -> tuple[str, str, str, str]:
    blocks, layers = ", ".join(map(str, adapter.layers)) or "all", adapter.layers
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        blocks = f"{layers[0]}..{layers[-1]}"
    scale = f"{adapter.scale:g}" if adapter.even else "mixed"
    return str(adapter.r), scale, " ".join(adapter.targets), blocks


def _error_table(merged: Merged) -> Table:
    table = Table(box=None, header_style="bold")
    for head in ("left out by rank", "all blocks", "worst block"):
        table.add_column(head, justify="left" if head == "left out by rank" else "right")
    for target in merged.adapter.targets:
        errors = merged.errors(target)
        lost = sum(v for (name, _), v in merged.lost.items() if name == target)
        whole = sum(v for (name, _), v in merged.whole.items() if name == target)
        worst = max(errors, key=lambda block: errors[block])
        table.add_row(
            target,
            f"{math.sqrt(lost / whole) if whole else 0:.2%}",
            f"{errors[worst]:.2%} ({worst})",
        )
    return table


def _sum_of(paths: Sequence[str], weights: Sequence[float]) -> str:
    return " + ".join(f"{w:g} x {path}" for path, w in zip(paths, weights, strict=True))


def parse_numbers(text: str, option: str) -> list[float]:
    """`0.6,0.4` -> [0.6, 0.4].

    Raises:
      UserError: something that is not a number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option}: cannot read {text!r}; write numbers as in 0.6,0.4") from error
