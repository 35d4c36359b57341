"""The adapters of a merge, read and checked against their base.

opened = find_base(paths)                           # the base that the first one names
sources = read_adapters(paths, opened)
sources[0].weighted(0.6), template_of(sources, weights, folder)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxalign.adapters.lora import Lora
from jaxalign.base import Opened, open_files
from jaxalign.data.template import Template, belonging, stored
from jaxalign.errors import UserError
from jaxalign.hf.find import locate
from jaxalign.hf.peft import named_base
from jaxalign.merge.methods import Weighted


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter that was read from its folder."""

    path: str
    lora: dict[str, Any]
    adapter: Lora
    doubt: str  # a sentence where its configuration names another base; else ''
    rounding: str  # the same where it learnt on rounded weights
    template: str  # the chat template stored with it, or nothing

    def weighted(self, weight: float) -> Weighted:
        """With its weight in a merge."""
        return Weighted(self.lora, self.adapter, weight, self.path)


def find_base(paths: Sequence[str], given: str = "") -> Opened:
    """The base that is given, or that the first adapter names; its facts are read.

    Raises:
      UserError: no base is named, or it cannot be read.
    """
    named = given or _named_base(paths[0])
    if not named:
        raise UserError(f"{paths[0]}: its configuration names no base; give it by --base MODEL")
    opened = open_files(named)
    try:
        opened.spec  # noqa: B018  (read while it is known who named it)
    except UserError as error:
        if given:
            raise
        raise UserError(
            f"{paths[0]}: the base that it names cannot be read ({error}); give it by --base MODEL"
        ) from error
    return opened


def read_adapters(paths: Sequence[str], base: Opened) -> list[AdapterFolder]:
    """Every adapter, checked against the base, with the template that belongs to it.

    Args:
      paths: PEFT folders or hub names.
      base: its tokenizer is read where a template needs it.

    Raises:
      UserError: one that is not for this base, was trained on other weights, is incomplete, or not
        finite.
    """
    return [_read(path, base) for path in paths]


def check_weights(sources: Sequence[AdapterFolder], base: Opened) -> None:
    """Compares the base's weights, which are fetched for it, with those that the adapters had.

    Raises:
      UserError: the weights are incomplete, or one of the adapters was trained on others.
    """
    base.fingerprint  # noqa: B018  (complete and known, also where no adapter has a record)
    for source in sources:
        base.check_weights(locate(source.path), fetch=True)


def _read(path: str, base: Opened) -> AdapterFolder:
    lora, adapter = base.adapter(path)
    if not isinstance(adapter, Lora):
        raise UserError(f"{path}: {adapter.name} cannot be merged, only LoRA adapters can")
    folder = locate(path)
    template = belonging(folder, lambda: base.tokenizer)
    doubts = base.doubt(folder, path), base.rounding(folder, path)
    return AdapterFolder(path, lora, adapter, *doubts, template)


def _named_base(path: str) -> str:
    return named_base(locate(path))


def warn(sources: Sequence[AdapterFolder], console: Console, used: bool) -> None:
    """Says what makes a merge doubtful: other bases.

    Args:
      used: whether the base as it is here takes part in what is written or judged.
    """
    for source in sources:
        for doubt in filter(None, (source.doubt, source.rounding if used else "")):
            console.print(f"warning: {doubt}", style="yellow")


def warn_templates(
    sources: Sequence[AdapterFolder], weights: Sequence[float], console: Console
) -> None:
    """Says which chat template is written where the adapters that count come with several."""
    taught = with_templates(sources, weights)
    if len({source.template for source in taught}) > 1:
        console.print(
            f"warning: the adapters come with different chat templates; {taught[0].path}'s is "
            "written",
            style="yellow",
        )


def template_of(sources: Sequence[AdapterFolder], weights: Sequence[float], base: Path) -> Template:
    """The template of the first adapter that counts and has one, or else the base's."""
    own = stored(base)
    text = next((source.template for source in with_templates(sources, weights)), own)
    return Template(text, "none" if not text else "base" if text == own else "own")


def with_templates(
    sources: Sequence[AdapterFolder], weights: Sequence[float]
) -> list[AdapterFolder]:
    """The adapters that count and come with a template."""
    pairs = zip(sources, weights, strict=True)
    return [source for source, weight in pairs if weight and source.template]
