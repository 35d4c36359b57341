"""`jaxalign merge`: PEFT folders in, one PEFT folder or one model out, and what the merge cost.

merge(['runs/task/adapter', 'runs/align/adapter'], [0.6, 0.4], Recipe('delta'), 'runs/both')
merge(['runs/task/adapter'], [1.0], Recipe(), 'runs/model', into='models/llama')
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np

from jaxalign.base import Opened
from jaxalign.data.template import TOKENIZER_FILE, Template, template_files
from jaxalign.errors import UserError
from jaxalign.folders import check_target, whole_folder
from jaxalign.generate.stops import taught_stops
from jaxalign.hf.card import model_card
from jaxalign.hf.find import pinned
from jaxalign.hf.generation import GENERATION_FILE, generation_files, unsaid_stops
from jaxalign.hf.peft import CONFIG_FILE, save_peft
from jaxalign.hf.pending import merged_tensors
from jaxalign.hf.save import write_like_base
from jaxalign.hf.stream import Pending, finite
from jaxalign.merge import record
from jaxalign.merge.algebra import Merged, combine, whole_updates
from jaxalign.merge.check import Cell, check
from jaxalign.merge.facts import Part, merge_facts
from jaxalign.merge.methods import METHODS, Recipe
from jaxalign.merge.source import (
    AdapterFolder,
    check_weights,
    find_base,
    read_adapters,
    template_of,
    warn,
    warn_templates,
)
from jaxalign.merge.tell import show
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS, sizes
from jaxalign.multihost import barrier, is_main
from jaxalign.terminal import console

SEARCH_FILE = "search.json"
MADE = (CONFIG_FILE, "config.json", SEARCH_FILE)  # by one of which an older result is known


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
    if base and into:
        raise UserError(
            f"--base: --into-base {into} is taken as the base of the adapters; leave out --base"
        )
    check_out(out, paths, existing)  # before a base is looked for, which may be on the hub
    opened = find_base(paths, into or base)
    check_out(out, [*paths, opened.path], existing)
    sources, spec = read_adapters(paths, opened), opened.spec
    parts = [source.weighted(weight) for source, weight in zip(sources, weights, strict=True)]
    check(parts, spec, recipe)
    screen = console()
    warn(sources, screen, used=bool(into))
    warn_templates(sources, weights, screen)
    if into:
        check_weights(sources, opened)  # before anything is written
        with replaced(out, existing) as folder:
            _into_base(sources, weights, opened, recipe, out, folder)
        screen.print(f"{_sum_of(paths, weights)} by {recipe.method}, added to {into}: {out}")
    else:
        merged = combine(parts, spec, recipe)
        with replaced(out, existing) as folder:
            write_adapter(merged, sources, weights, opened, recipe, out, folder)
        show(merged, sources, weights, recipe, out, screen)
    barrier("merged")


# Writing ------------------------------------------------------------------------------------------


def check_out(out: str, paths: Sequence[str], existing: str) -> None:
    """Refuses a folder that must not be written to.

    Args:
      paths: what is read: adapters, a base; they may not go with what is replaced.

    Raises:
      UserError: it is one of those, or not empty and `existing` is `refuse`, or holds something
        that no merge has written.
    """
    folder, read = Path(out), [Path(path) for path in paths if Path(path).exists()]
    if any(folder.resolve() == path.resolve() for path in read):
        raise UserError(f"--out: {out} is read by this merge; choose a folder of its own")
    check_target(folder, existing, [Path.cwd(), Path.home(), *read], MADE)


@contextmanager
def replaced(out: str, existing: str, sealed: Sequence[str] = (".",)) -> Iterator[Path]:
    """The folder to write to, which takes the place of `out` as a whole; process 0 writes."""
    new = whole_folder(Path(out), existing, markers=MADE, sealed=sealed)
    with new if is_main() else nullcontext(Path(out)) as folder:
        yield folder


def write_adapter(
    merged: Merged,
    sources: Sequence[AdapterFolder],
    weights: Sequence[float],
    base: Opened,
    recipe: Recipe,
    out: str,
    folder: Path,
) -> None:
    """The PEFT folder with `merge.json` (how it was made), a card and what prompts need.

    That is the tokenizer of the base and the chat template of `template_of`. It is written into
    `folder`, which becomes `out`.
    """
    how = record.recorded(merged, sources, weights, recipe)
    template = template_of(sources, weights, base.files)
    texts = {record.FILE: json.dumps(how, indent=1) + "\n"}
    texts |= template_files(template, base.files / TOKENIZER_FILE)
    facts = merge_facts(
        out,
        pinned(base.path, base.revision),
        _parts(sources, weights),
        recipe,
        merged,
        template=template.kind,
        stops=unsaid_stops(base.files / GENERATION_FILE, base.spec, _taught(base, template)),
    )
    texts["README.md"] = model_card(facts)
    save_peft(
        folder,
        merged.lora,
        base.spec,
        merged.adapter,
        base_name=pinned(base.path, base.revision),
        texts=texts,
        tokenizer_from=base.files,
    )


def _into_base(
    sources: Sequence[AdapterFolder],
    weights: Sequence[float],
    base: Opened,
    recipe: Recipe,
    out: str,
    target: Path,
) -> None:
    """Writes the base with the update added, tensor by tensor, in the dtype they are stored in."""
    spec, path = base.spec, base.path
    parts = [source.weighted(weight) for source, weight in zip(sources, weights, strict=True)]
    merged = None
    if recipe.rank is not None or "rank" not in METHODS[recipe.method].reads:
        merged = combine(parts, spec, recipe)
        tensors = merged_tensors(path, spec, merged.lora, merged.adapter)
    else:
        tensors = _whole_tensors(path, spec, whole_updates(parts, spec, recipe))
    advice = "the base's files are damaged, or the weights are too large for its dtype"
    tensors = [finite(tensor, advice) for tensor in tensors]
    folder = base.whole
    template = template_of(sources, weights, folder)
    facts = merge_facts(
        out,
        pinned(path, base.revision),
        _parts(sources, weights),
        recipe,
        merged,
        kind="model",
        template=template.kind,
    )
    taught = _taught(base, template)
    texts = {"README.md": model_card(facts)} | template_files(template, folder / TOKENIZER_FILE)
    texts |= generation_files(folder / GENERATION_FILE, spec, taught)
    write_like_base(target, tensors, spec, folder, texts=texts)


def _taught(base: Opened, template: Template) -> tuple[int, ...]:
    """The tokens that end answers; none, with a warning, where nothing can be rendered."""
    try:
        return taught_stops(base.its_tokenizer, template.text)
    except UserError as error:
        console().print(
            f"warning: which token ends an answer is not known ({error}); what is written ends "
            "answers as the base does",
            style="yellow",
        )
        return ()


def _parts(sources: Sequence[AdapterFolder], weights: Sequence[float]) -> list[Part]:
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
    for plain in merged_tensors(base, spec, {}, None):
        cell = cell_of.get(plain.name)
        changed = dataclasses.replace(plain, make=partial(add, plain, cell)) if cell else plain
        found.append(changed)
    return found


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
