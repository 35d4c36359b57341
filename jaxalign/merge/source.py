"""The adapters of a merge, read and checked against their base.

name, spec = find_base(paths)                       # the base that the first one names
sources = read_adapters(paths, spec, tokenizer)
sources[0].weighted(0.6), template_of(sources, weights, folder)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxalign.adapters.lora import Lora
from jaxalign.data.template import Template, belonging, stored
from jaxalign.errors import UserError
from jaxalign.hf.find import locate
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import load_peft
from jaxalign.hf.peft_config import named_base
from jaxalign.merge.algebra import Weighted
from jaxalign.model.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """An adapter folder that was read."""

    path: str
    lora: dict[str, Any]
    adapter: Lora
    base: str  # as its configuration names it
    template: str  # the chat template stored with it, or nothing

    def weighted(self, weight: float) -> Weighted:
        """With its weight in a merge."""
        return Weighted(self.lora, self.adapter, weight, self.path)


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


def read_adapters(
    paths: Sequence[str], spec: ModelSpec, tokenizer: Callable[[], Any]
) -> list[Source]:
    """Every adapter, checked against the base, with the template that belongs to it.

    Args:
      paths: PEFT folders or hub names.
      spec: the base's facts.
      tokenizer: gives the base's tokenizer, where a template needs it.

    Raises:
      UserError: one that is not for this base, incomplete, or not finite.
    """
    return [_read(path, spec, tokenizer) for path in paths]


def _read(path: str, spec: ModelSpec, tokenizer: Callable[[], Any]) -> Source:
    lora, adapter = load_peft(path, spec)
    template = belonging(locate(path), tokenizer)
    return Source(path, lora, adapter, _named_base(path), template)


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
            )
    templates = {source.template for source in sources if source.template}
    if len(templates) > 1:
        console.print(
            f"warning: the adapters come with different chat templates; {sources[0].path}'s is "
            "written",
            style="yellow",
        )


def template_of(sources: Sequence[Source], weights: Sequence[float], base: Path) -> Template:
    """The template of the first adapter that counts, or else the base's; `warn` names others."""
    own = stored(base)
    used = [source for source, weight in zip(sources, weights, strict=True) if weight]
    text = next((source.template for source in used if source.template), own)
    return Template(text, "none" if not text else "base" if text == own else "own")
