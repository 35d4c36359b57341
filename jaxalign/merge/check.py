"""Whether a recipe can be followed with these adapters, before anything is computed.

check_recipe(Recipe('ties'), [('task', 1.0)])    # UserError: --density is missing ...
method, used = check(parts, spec, recipe)        # the row of METHODS, parts that weigh anything
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxalign.adapters.peft_config import peft_module
from jaxalign.errors import UserError
from jaxalign.merge.methods import METHODS, Method, Recipe, Weighted
from jaxalign.merge.swap import swapped
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS, sizes

Cell = tuple[str, int]  # a target and its block, counted from 1


def check(
    parts: Sequence[Weighted], spec: ModelSpec, recipe: Recipe
) -> tuple[Method, list[Weighted]]:
    """The method, and the parts whose weight is not 0.

    Raises:
      UserError: as `check_recipe`; DoRA among several, ranks that cannot be averaged.
    """
    method = check_recipe(recipe, [(part.name, part.weight) for part in parts])
    used = [part for part in parts if part.weight != 0]
    alone = len(used) == 1 and used[0].weight == 1 and method.keeps
    dora = next((part for part in used if part.adapter.dora), None)
    if dora and not alone:
        raise UserError(
            f"{dora.name}: a DoRA adapter rescales the columns of base and update together, so its "
            "update cannot be weighed or added; write it into the base alone "
            f"(jaxalign merge {dora.name} --into-base MODEL --out DIR) and go on from that model"
        )
    if "blocks" in method.reads:
        used = swapped(parts, spec, recipe)
    _check_rank(parts, spec, recipe, method)
    if method.one_rank:
        _check_same_ranks(used, spec)
    return method, used


def check_recipe(recipe: Recipe, weights: Sequence[tuple[str, float]]) -> Method:
    """The method; what can be wrong whatever the adapters are is found before there are any.

    Args:
      recipe: how they will be combined.
      weights: name and weight of each.

    Raises:
      UserError: an unknown method, an option it does not read, that is missing or out of range,
        weights that are not finite or all 0, or too many. The sentence begins with the option.
    """
    if recipe.method not in METHODS:
        raise UserError(
            f"--method: {recipe.method!r} is unknown; choose among {', '.join(METHODS)}"
        )
    method = METHODS[recipe.method]
    _check_options(recipe, method)
    for name, weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"--weights: {weight} for {name} is not a number to weigh by")
    if not any(weight for _, weight in weights):
        raise UserError("--weights: all are 0, which leaves the bare base; give one that is not")
    if "blocks" in method.reads and len(weights) != 2:
        raise UserError(
            f"--method {recipe.method} takes two adapters, the task's and the language's, not "
            f"{len(weights)}"
        )
    return method


def check_read(method: str, option: str) -> None:
    """Refuses an option of the recipe that its method would ignore.

    Raises:
      UserError: it does not read it.
    """
    if method in METHODS and option not in METHODS[method].reads:
        readers = ", ".join(name for name, one in METHODS.items() if option in one.reads)
        raise UserError(f"--{option}: {method} has no use for it; it is read by {readers}")


def _check_options(recipe: Recipe, method: Method) -> None:
    for option in ("rank", "density", "blocks", "transition"):
        if getattr(recipe, option) not in (None, "", 0):
            check_read(recipe.method, option)
    if "density" in method.reads:
        if recipe.density is None:
            raise UserError(
                f"--density is missing: the share of entries that {recipe.method} keeps (ties' "
                "authors keep 0.2, those of dare 0.1 and more)"
            )
        if not 0 < recipe.density <= 1:
            raise UserError(
                f"--density: {recipe.density} is not a share of entries to keep; give a number "
                "above 0 and at most 1"
            )
    if recipe.rank is not None and recipe.rank < 1:
        raise UserError(f"--rank: {recipe.rank} is not a rank; use 1 or more")
    if "blocks" in method.reads and not recipe.blocks:
        raise UserError("--blocks is missing: those that come from the second adapter, as 1..2,7,8")


def _check_rank(parts: Sequence[Weighted], spec: ModelSpec, recipe: Recipe, method: Method) -> None:
    if recipe.rank is None:
        return
    if method.low:
        most = max(
            sum(part.adapter.rank_of(*cell) for part in parts) for cell in cells_of(parts, spec)
        )
        what = f"the exact sum has rank {most} already (--method delta)"
    else:
        size = sizes(spec)
        most = max(
            min(
                math.prod(size[x] for x in axes)
                for axes in (TARGETS[target].inputs, TARGETS[target].outputs)
            )
            for target, _ in cells_of(parts, spec)
        )
        what = f"no module of this base has more than {most}"
    if recipe.rank > most:
        raise UserError(f"--rank: {recipe.rank} is more than there is; {what}")


def _check_same_ranks(parts: list[Weighted], spec: ModelSpec) -> None:
    for target, block in cells_of(parts, spec):
        ranks = [part.adapter.rank_of(target, block) for part in parts]
        if len(set(ranks)) > 1:
            what = ", ".join(
                f"{p.name} {r or 'nothing'}" for p, r in zip(parts, ranks, strict=True)
            )
            raise UserError(
                f"--method average needs equal ranks, but in {peft_module(target)} of block "
                f"{block} there is {what}; use delta, or svd with a --rank"
            )


def cells_of(parts: Sequence[Weighted], spec: ModelSpec) -> list[Cell]:
    """Modules that at least one part changes, target by target."""
    return [
        (target, block)
        for target in TARGETS
        for block in range(1, spec.layers + 1)
        if any(part.adapter.rank_of(target, block) and part.share(block) for part in parts)
    ]
