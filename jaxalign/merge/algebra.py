"""Several adapters over one base become one: ΔW = Σ wᵢ sᵢ Aᵢ Bᵢ, exactly or nearly so.

Every method works module by module, so ranks, scales, targets and blocks may differ. The result is
a plain LoRA of scale 1 without dropout.

    parts = [Weighted(lora, adapter, 0.6), Weighted(other_lora, other_adapter, 0.4)]
    merged = combine(parts, spec, Recipe('delta'))            # exact, the ranks add up
    merged = combine(parts, spec, Recipe('svd', rank=16))     # merged.error says what it cost
    merged.lora, merged.adapter                               # for save_peft or a decoder
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jaxalign.adapters.lora import Lora
from jaxalign.adapters.peft import adapter_rows
from jaxalign.adapters.peft_config import peft_module
from jaxalign.errors import UserError
from jaxalign.merge.matrices import (
    LowRank,
    add,
    drop,
    elect,
    trim,
    truncate,
    truncate_product,
)
from jaxalign.merge.swap import swapped
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS, get_leaf, set_leaf, sizes

Cell = tuple[str, int]  # a target and its block, counted from 1


@dataclass(frozen=True)
class Weighted:
    """One adapter and its weight."""

    lora: Mapping[str, Any]
    adapter: Lora
    weight: float = 1.0
    name: str = "adapter"  # how an error calls it
    shares: Mapping[int, float] = field(default_factory=dict)  # of blocks that are not all or none

    def share(self, block: int) -> float:
        """What this adapter's update of a block (from 1) is multiplied with, besides its weight."""
        return self.shares.get(block, 1.0)


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined; see `METHODS`."""

    method: str = "delta"
    rank: int | None = None  # of the result, for methods that choose one; None: the largest given
    density: float | None = None  # share of an update's entries that is kept
    seed: int = 1  # of what is dropped at random
    blocks: str = ""  # that come from the second adapter, as `1..2,7`
    transition: int = 0  # blocks next to these that are the mean of both


@dataclass(frozen=True)
class Merged:
    """The combined adapter, and by module what an approximation left out."""

    lora: dict[str, Any]
    adapter: Lora
    lost: dict[Cell, float] = field(default_factory=dict)  # squared Frobenius norms
    whole: dict[Cell, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """‖ΔW - merged‖ / ‖ΔW‖ over all modules; 0 where the method is exact."""
        whole = sum(self.whole.values())
        return math.sqrt(sum(self.lost.values()) / whole) if whole else 0.0

    def errors(self, target: str) -> dict[int, float]:
        """Block -> relative error of one target's module there."""
        return {
            block: math.sqrt(lost / self.whole[name, block]) if self.whole[name, block] else 0.0
            for (name, block), lost in self.lost.items()
            if name == target
        }


@dataclass(frozen=True)
class _Piece:
    """One adapter's share in one module."""

    a: np.ndarray  # [in, r] float64
    b: np.ndarray  # [r, out] float64, scaled
    weight: float
    name: str
    seed: tuple[int, ...]  # of its own dice: the same whatever the order of the adapters

    def update(self) -> np.ndarray:
        """[in, out] float32, unweighted."""
        return (self.a @ self.b).astype(np.float32)


Pieces = list[_Piece]


def _concatenated(pieces: Pieces, recipe: Recipe) -> LowRank:
    return LowRank(
        np.hstack([piece.a for piece in pieces]),
        np.vstack([piece.weight * piece.b for piece in pieces]),
    )


def _truncated(pieces: Pieces, recipe: Recipe) -> LowRank:
    assert recipe.rank is not None  # combine fills it in
    whole = _concatenated(pieces, recipe)
    return truncate_product(whole.a, whole.b, recipe.rank)


def _averaged(pieces: Pieces, recipe: Recipe) -> LowRank:
    return LowRank(
        np.sum([piece.weight * piece.a for piece in pieces], axis=0),
        np.sum([piece.weight * piece.b for piece in pieces], axis=0),
    )


def _trimmed(piece: _Piece, recipe: Recipe) -> np.ndarray:
    assert recipe.density is not None  # checked
    return trim(piece.update(), recipe.density)


def _dropped(piece: _Piece, recipe: Recipe) -> np.ndarray:
    assert recipe.density is not None  # checked
    dice = np.random.default_rng([recipe.seed, *piece.seed])
    return drop(piece.update(), recipe.density, dice)


@dataclass(frozen=True)
class Method:
    """One way to combine, either on factors (`low`) or on whole updates (`prune`, then `join`)."""

    says: str
    low: Callable[[Pieces, Recipe], LowRank] | None = None
    prune: Callable[[_Piece, Recipe], np.ndarray] | None = None
    join: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None
    reads: tuple[str, ...] = ()  # of the recipe, besides the method

    def whole(self, pieces: Pieces, recipe: Recipe) -> np.ndarray:
        """[in, out] float32: the joined update, before it is made low-rank."""
        assert self.prune is not None and self.join is not None
        weighted = [np.float32(p.weight) * self.prune(p, recipe) for p in pieces]
        return self.join(weighted)


METHODS = {
    "delta": Method("exact sum of the weighted updates; the ranks add up", _concatenated),
    "task_arithmetic": Method("another name of delta (Ilharco et al. 2023)", _concatenated),
    "svd": Method("the same sum cut to --rank", _truncated, reads=("rank",)),
    "average": Method("weighted average of the factors A and of B, not of the updates", _averaged),
    "magnitude": Method(
        "sum of updates cut to their largest entries",
        prune=_trimmed, join=add, reads=("rank", "density"),
    ),
    "ties": Method(
        "trim, elect signs, mean of those that agree (Yadav et al. 2023)",
        prune=_trimmed, join=elect, reads=("rank", "density"),
    ),
    "dare": Method(
        "sum of updates with entries dropped at random (Yu et al. 2024)",
        prune=_dropped, join=add, reads=("rank", "density", "seed"),
    ),
    "layer_swap": Method(
        "--blocks of the second adapter in the first (Bandarkar & Peng 2025)",
        partial(_concatenated), reads=("blocks", "transition"),
    ),
    "dare_ties": Method(
        "drop at random, then elect signs as ties does",
        prune=_dropped, join=elect, reads=("rank", "density", "seed"),
    ),
}  # fmt: skip


def combine(parts: Sequence[Weighted], spec: ModelSpec, recipe: Recipe) -> Merged:
    """One adapter for several; parts of weight 0 are absent.

    A single adapter of weight 1 comes back as it is from the methods that change nothing then
    (delta, average), bit by bit.

    Args:
      parts: adapters over the base that `spec` describes.
      spec: the base.
      recipe: method, rank, density, seed.

    Raises:
      UserError: a recipe that cannot be followed with these adapters.
    """
    method, parts = check(parts, spec, recipe)
    if len(parts) == 1 and parts[0].weight == 1 and method.low in (_concatenated, _averaged):
        return Merged(dict(parts[0].lora), parts[0].adapter)
    if "rank" in method.reads and recipe.rank is None:
        largest = max(part.adapter.r for part in parts)
        recipe = dataclasses.replace(recipe, rank=largest)
    cells: dict[Cell, LowRank] = {}
    for cell in _cells(parts, spec):
        pieces = _pieces(parts, *cell)
        if method.low:
            cells[cell] = method.low(pieces, recipe)
        else:
            assert recipe.rank is not None  # filled in above
            cells[cell] = truncate(method.whole(pieces, recipe), recipe.rank)
    return _assembled(cells, spec, "rank" in method.reads)


def whole_updates(
    parts: Sequence[Weighted], spec: ModelSpec, recipe: Recipe
) -> dict[Cell, Callable[[], np.ndarray]]:
    """Module -> what makes its joined update [in, out] float32, cut to no rank.

    For methods that work on whole updates, on their way into a base.

    Raises:
      UserError: as `combine`.
      ValueError: a method that works on factors; `combine` gives them.
    """
    method, parts = check(parts, spec, recipe)
    if method.low:
        raise ValueError(f"{recipe.method} works on factors")

    def make(cell: Cell) -> np.ndarray:
        return method.whole(_pieces(parts, *cell), recipe)

    return {cell: partial(make, cell) for cell in _cells(parts, spec)}


def check(
    parts: Sequence[Weighted], spec: ModelSpec, recipe: Recipe
) -> tuple[Method, list[Weighted]]:
    """The method, and the parts whose weight is not 0.

    Raises:
      UserError: as `check_recipe`; DoRA among several, ranks that cannot be averaged.
    """
    method = check_recipe(recipe, [(part.name, part.weight) for part in parts])
    used = [part for part in parts if part.weight != 0]
    alone = len(used) == 1 and used[0].weight == 1 and method.low in (_concatenated, _averaged)
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
    if method.low is _averaged:
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


def _check_options(recipe: Recipe, method: Method) -> None:
    for option in ("rank", "density", "blocks", "transition"):
        if getattr(recipe, option) not in (None, "", 0) and option not in method.reads:
            readers = ", ".join(name for name, one in METHODS.items() if option in one.reads)
            raise UserError(
                f"--{option}: {recipe.method} has no use for it; it is read by {readers}"
            )
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
            sum(part.adapter.rank_of(*cell) for part in parts) for cell in _cells(parts, spec)
        )
        what = f"the exact sum has rank {most} already (--method delta)"
    else:
        size = sizes(spec)
        most = max(
            min(
                math.prod(size[x] for x in axes)
                for axes in (TARGETS[target].inputs, TARGETS[target].outputs)
            )
            for target, _ in _cells(parts, spec)
        )
        what = f"no module of this base has more than {most}"
    if recipe.rank > most:
        raise UserError(f"--rank: {recipe.rank} is more than there is; {what}")


def _check_same_ranks(parts: list[Weighted], spec: ModelSpec) -> None:
    for target, block in _cells(parts, spec):
        ranks = [part.adapter.rank_of(target, block) for part in parts]
        if len(set(ranks)) > 1:
            what = ", ".join(
                f"{p.name} {r or 'nothing'}" for p, r in zip(parts, ranks, strict=True)
            )
            raise UserError(
                f"--method average needs equal ranks, but in {peft_module(target)} of block "
                f"{block} there is {what}; use delta, or svd with a --rank"
            )


def _cells(parts: Sequence[Weighted], spec: ModelSpec) -> list[Cell]:
    """Modules that at least one part changes, target by target."""
    return [
        (target, block)
        for target in TARGETS
        for block in range(1, spec.layers + 1)
        if any(part.adapter.rank_of(target, block) and part.share(block) for part in parts)
    ]


def _pieces(parts: Sequence[Weighted], target: str, block: int) -> Pieces:
    having = (p for p in parts if p.adapter.rank_of(target, block) and p.share(block))
    return [_piece(part, target, block) for part in having]


def _piece(part: Weighted, target: str, block: int) -> _Piece:
    rank = part.adapter.rank_of(target, block)
    leaves = [get_leaf(part.lora, row.path)[block - 1] for row in adapter_rows(target)]
    a = np.asarray(leaves[0], np.float64)
    b = np.asarray(leaves[1], np.float64)
    a = a.reshape(-1, a.shape[-1])[:, :rank]  # [in, r]
    b = b.reshape(b.shape[0], -1)[:rank]  # [r, out]
    seed = (zlib.crc32(np.ascontiguousarray(a).tobytes()), zlib.crc32(b.tobytes()))
    place = (list(TARGETS).index(target), block)
    scaled = part.adapter.scale_of(target, block) * b
    weight = part.weight * part.share(block)
    return _Piece(a, scaled, weight, part.name, (*seed, *place))


def _assembled(cells: dict[Cell, LowRank], spec: ModelSpec, approximate: bool) -> Merged:
    rank = max(low.a.shape[1] for low in cells.values())
    size = sizes(spec, rank)
    targets = tuple(target for target in TARGETS if any(target == name for name, _ in cells))
    blocks = sorted({block for _, block in cells})
    lora: dict[str, Any] = {}
    for target in targets:
        for row, side in zip(adapter_rows(target), "ab", strict=True):
            leaf = np.zeros(row.shape(size), np.float32)
            for (name, block), low in cells.items():
                if name != target:
                    continue
                factor = getattr(low, side)
                filled = np.zeros(_flat(leaf[block - 1], side), np.float32)
                filled[tuple(slice(length) for length in factor.shape)] = factor
                leaf[block - 1] = filled.reshape(leaf[block - 1].shape)
            set_leaf(lora, row.path, leaf)
    adapter = Lora(
        r=rank,
        alpha=float(rank),
        targets=targets,
        layers=tuple(blocks) if len(blocks) < spec.layers else (),
    )
    if not approximate:
        return Merged(lora, adapter)
    return Merged(
        lora,
        adapter,
        {cell: low.lost for cell, low in cells.items()},
        {cell: low.whole for cell, low in cells.items()},
    )


def _flat(factor: np.ndarray, side: str) -> tuple[int, int]:
    """The matrix shape of a factor: a [in..., R] -> [in, R], b [R, out...] -> [R, out]."""
    if side == "a":
        return math.prod(factor.shape[:-1]), factor.shape[-1]
    return factor.shape[0], math.prod(factor.shape[1:])
