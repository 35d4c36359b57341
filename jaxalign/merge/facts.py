"""What is known of a merge, for its model card: the method, the adapters and weights, the base.

How each adapter was trained stays with that adapter; of it the card has the name and the rank.

    facts = merge_facts('runs/both', base, [('runs/task/adapter', 0.6, lora), ...], recipe, merged)
    texts = {'README.md': model_card(facts)}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxalign.adapters.lora import Lora
from jaxalign.adapters.peft_config import vllm_limits, vllm_rank
from jaxalign.evaluate.entrants import name_of
from jaxalign.generate.decoding import Decoding
from jaxalign.hf.card import Facts, Merge, base_facts
from jaxalign.merge.algebra import Merged
from jaxalign.merge.methods import METHODS, Recipe

Part = tuple[str, float, Lora]  # as it was given, its weight, what it is


def merge_facts(
    out: str,
    base: str,
    parts: Sequence[Part],
    recipe: Recipe,
    merged: Merged | None,
    *,
    kind: str = "adapter",
    template: str = "none",
    stops: tuple[int, ...] = (),
) -> Facts:
    """Everything known about a merge.

    Args:
      out: the folder that is written.
      base: folder or hub name, with @REVISION where it has one.
      parts: the adapters.
      recipe: how they were combined.
      merged: the adapter that came out; None: whole updates, cut to no rank, went into the base.
      kind: adapter, or model where the base has it inside.
      template: the chat template stored with the weights, see `Facts`.
      stops: the tokens that end answers, see `Facts`.
    """
    used = sum(weight != 0 for _, weight, _ in parts)
    number = "one adapter" if used == 1 else f"{used} adapters"
    lora = merged.adapter if merged and kind == "adapter" else None
    how = Decoding()
    return Facts(
        title=Path(out).name,
        kind=kind,
        path=out,
        **base_facts(base),
        tags=(*(("dora" if lora.dora else "lora",) if lora else ()), "merge"),
        summary=f"made of {number}" if lora else f"with {number} added",
        merge=Merge(
            tuple((_shown(path), f"{weight:g}", str(one.r)) for path, weight, one in parts),
            tuple(_settings(recipe, merged, lora)),
        ),
        call=how.call(),
        request=how.request(),
        template=template,
        stops=stops,
        served_rank=vllm_rank(lora.r) if lora else None,
        limits=tuple(vllm_limits(lora)) if lora else (),
    )


def _settings(
    recipe: Recipe, merged: Merged | None, lora: Lora | None
) -> Iterator[tuple[str, str]]:
    reads = METHODS[recipe.method].reads
    yield "method", recipe.method
    if merged and (lora or "rank" in reads):
        yield "rank", str(merged.adapter.r)
    if lora:
        yield "projections", ", ".join(lora.targets)
    if "density" in reads:
        yield "density", f"{recipe.density:g}"
    if "blocks" in reads:
        yield "blocks of the second adapter", recipe.blocks
        yield "blocks of both next to them", str(recipe.transition)
    if "seed" in reads:
        yield "seed", str(recipe.seed)
    if merged and merged.lost:
        yield "left out by the rank", f"{merged.error:.2%} of the update (Frobenius norm)"


def _shown(path: str) -> str:
    """An adapter without the folders of this machine."""
    return name_of(path) if Path(path).is_absolute() else path
