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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jaxalign.adapters.lora import Lora
from jaxalign.adapters.peft import adapter_rows
from jaxalign.merge.check import Cell, cells_of, check
from jaxalign.merge.matrices import LowRank, truncate
from jaxalign.merge.methods import Piece, Pieces, Recipe, Weighted
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS, get_leaf, set_leaf, sizes


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


def combine(parts: Sequence[Weighted], spec: ModelSpec, recipe: Recipe) -> Merged:
    """One adapter for several; parts of weight 0 are absent.

    A single adapter of weight 1 comes back as it is from the methods that change nothing then
    (delta, average), bit by bit.

    Args:
      parts: adapters over the base that `spec` describes.
      spec: the base.
      recipe: method, rank (None: the largest of the parts), density, seed.

    Raises:
      UserError: a recipe that cannot be followed with these adapters.
    """
    method, parts = check(parts, spec, recipe)
    if len(parts) == 1 and parts[0].weight == 1 and method.keeps:
        return Merged(dict(parts[0].lora), parts[0].adapter)
    if "rank" in method.reads and recipe.rank is None:
        largest = max(part.adapter.r for part in parts)
        recipe = dataclasses.replace(recipe, rank=largest)
    cells: dict[Cell, LowRank] = {}
    for cell in cells_of(parts, spec):
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

    For methods that choose a rank, on their way into a base, which needs none.

    Raises:
      UserError: as `combine`.
    """
    method, parts = check(parts, spec, recipe)
    recipe = dataclasses.replace(recipe, rank=None)

    def make(cell: Cell) -> np.ndarray:
        return method.whole(_pieces(parts, *cell), recipe)

    return {cell: partial(make, cell) for cell in cells_of(parts, spec)}


def _pieces(parts: Sequence[Weighted], target: str, block: int) -> Pieces:
    having = (p for p in parts if p.adapter.rank_of(target, block) and p.share(block))
    return [_piece(part, target, block) for part in having]


def _piece(part: Weighted, target: str, block: int) -> Piece:
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
    return Piece(a, scaled, weight, part.name, (*seed, *place))


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
