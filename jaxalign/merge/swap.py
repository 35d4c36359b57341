"""Layer swapping: some blocks of a task's adapter are replaced by those of a language's.

Bandarkar & Peng 2025 (arXiv 2505.18356), after Bandarkar et al. 2024 (arXiv 2410.01335): a task
expert and a language expert are trained apart; the merged model has the lowest and the highest
blocks of the language and the middle of the task, with a few blocks between that are the mean of
both. Which blocks, is chosen for a model. The papers swap weights of whole models and, in the
later one, of LoRA as well; here updates of adapters, each times its weight. Their code was not
looked for.

    first, second = swapped([task, language], spec, Recipe('layer_swap', blocks='1..2,7..8'))
    first.share(3), second.share(3)                  # 1.0, 0.0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxalign.adapters.ranks import parse_layers
from jaxalign.errors import UserError
from jaxalign.merge.methods import Recipe, Weighted
from jaxalign.model.spec import ModelSpec


def swapped(parts: Sequence[Weighted], spec: ModelSpec, recipe: Recipe) -> list[Weighted]:
    """Two adapters, each with its share in every block.

    Args:
      parts: the two.
      spec: the base.
      recipe: as `check.check_recipe` lets it pass.

    Raises:
      UserError: blocks that are not of the base, or all of it.
    """
    theirs = parse_layers(recipe.blocks, spec.layers, "--blocks")
    if not theirs:
        raise UserError(
            "--blocks: all blocks come from the second adapter; leave some to the first"
        )
    shares = {}  # of the second adapter
    for block in range(1, spec.layers + 1):
        distance = min(abs(block - other) for other in theirs)
        shares[block] = 1.0 if not distance else 0.5 if distance <= recipe.transition else 0.0
    kept = {block: 1 - share for block, share in shares.items()}
    found = [
        dataclasses.replace(part, shares=own)
        for part, own in zip(parts, (kept, shares), strict=True)
        if part.weight != 0
    ]
    changes = (
        part.share(block) and part.adapter.rank_of(target, block)
        for part in found
        for target in part.adapter.targets
        for block in kept
    )
    if not any(changes):
        raise UserError("--blocks: no adapter changes a block that it is left with")
    return found
