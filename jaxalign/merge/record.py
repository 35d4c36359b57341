"""What `merge.json` says of how an adapter was made, and whether another merge would differ.

record = recorded(merged, sources, weights, recipe)        # of merge.json
difference('runs/both', ['runs/task/adapter', 'runs/align/adapter'], [1.0, 0.5], recipe)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.hf.peft import weights_digest
from jaxalign.merge.algebra import Merged
from jaxalign.merge.methods import METHODS, Recipe
from jaxalign.merge.source import AdapterFolder

FILE = "merge.json"


def recorded(
    merged: Merged, sources: Sequence[AdapterFolder], weights: Sequence[float], recipe: Recipe
) -> dict[str, Any]:
    """How an adapter was made, of what, and what its rank left out."""
    return {
        **_asked(recipe),
        "adapters": [
            {"path": s.path, "weight": w, "digest": weights_digest(s.path), "rank": s.adapter.r}
            for s, w in zip(sources, weights, strict=True)
        ],
        "rank": merged.adapter.r,
        "relative_error": merged.error,
        "modules": {
            target: {str(block): error for block, error in merged.errors(target).items()}
            for target in merged.adapter.targets
        } if merged.lost else None,
    }  # fmt: skip


def difference(
    folder: str | Path, paths: Sequence[str], weights: Sequence[float], recipe: Recipe
) -> str:
    """In what the merged adapter of a folder is not the one of this recipe; empty where it is.

    Args:
      folder: of the merged adapter.
      paths: folders of those it should be made of. They may have moved; their weights count.
      weights: one for each.
      recipe: how they are combined.

    Returns:
      As in `weights=[0.5, 0.5], now it is [1.0, 0.5]`.
    """
    try:
        record = json.loads(Path(folder, FILE).read_text("utf-8"))
        made = {
            **record,
            "weights": [one["weight"] for one in record["adapters"]],
            "adapters": [one["digest"] for one in record["adapters"]],
        }
    except (OSError, ValueError, LookupError, TypeError):
        return f"no {FILE} that can be read"
    asked = {
        **_asked(recipe),
        "weights": list(weights),
        "adapters": [weights_digest(path) for path in paths],
    }
    for key, value in asked.items():
        if (old := made.get(key, value)) != value:  # older records do not have all keys
            return f"{key}={old}, now it is {value}"
    return ""


def _asked(recipe: Recipe) -> dict[str, Any]:
    """The recipe, without what its method does not read."""
    reads = METHODS[recipe.method].reads

    def read(name: str) -> Any:
        return getattr(recipe, name) if name in reads else None

    return {
        "method": recipe.method,
        "asked_rank": read("rank"),
        **{name: read(name) for name in ("density", "blocks", "transition", "seed")},
    }
