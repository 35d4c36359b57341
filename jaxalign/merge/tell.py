"""What a merge prints: the adapters, what a rank left out, how the result can be served.

show(merged, sources, weights, recipe, 'runs/both', Console())
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jaxalign.adapters.lora import Lora
from jaxalign.adapters.peft_config import VLLM_RANKS, vllm_limits, vllm_rank
from jaxalign.merge.algebra import Merged
from jaxalign.merge.methods import Recipe
from jaxalign.merge.source import AdapterFolder


def show(
    merged: Merged,
    sources: Sequence[AdapterFolder],
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
        )
    console.print(serving(merged.adapter))


def serving(adapter: Lora) -> str:
    """What vLLM needs to serve an adapter, or why it does not."""
    if limits := vllm_limits(adapter):
        return "; ".join(limits)
    rank = adapter.r
    enough = vllm_rank(rank)
    if enough == rank:
        return f"vLLM serves it with --max-lora-rank {rank}"
    needed = (
        f"rank {rank} is not one of vLLM's --max-lora-rank values "
        f"({', '.join(map(str, VLLM_RANKS))}): serve it with {enough}, which pads it"
    )
    below = max(served for served in VLLM_RANKS if served < rank)
    return needed + (f", or cut it by --method svd --rank {below}" if 2 * below > rank else "")


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
