"""The ways to combine adapters, a row of `METHODS` each, and what they are given.

A method works module by module on the adapters' pieces there: on their factors (`low`), which gives
factors again, or on whole updates (`prune`, then `join`), which are cut to a rank afterwards.

    parts = [Weighted(lora, adapter, 0.6), Weighted(other_lora, other_adapter, 0.4)]
    recipe = Recipe('svd', rank=16)
    METHODS[recipe.method].reads                     # ('rank',)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxalign.adapters.lora import Lora
from jaxalign.merge.matrices import LowRank, add, drop, elect, trim, truncate_product


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
class Piece:
    """One adapter's share in one module."""

    a: np.ndarray  # [in, r] float64
    b: np.ndarray  # [r, out] float64, scaled
    weight: float
    name: str
    seed: tuple[int, ...]  # of its own dice: the same whatever the order of the adapters

    def update(self) -> np.ndarray:
        """[in, out] float32, unweighted."""
        return (self.a @ self.b).astype(np.float32)


Pieces = list[Piece]


def _concatenated(pieces: Pieces, recipe: Recipe) -> LowRank:
    return LowRank(
        np.hstack([piece.a for piece in pieces]),
        np.vstack([piece.weight * piece.b for piece in pieces]),
    )


def _truncated(pieces: Pieces, recipe: Recipe) -> LowRank:
    whole = _concatenated(pieces, recipe)
    if recipe.rank is None:  # on its way into a base; for an adapter, combine fills it in
        return whole
    return truncate_product(whole.a, whole.b, recipe.rank)


def _averaged(pieces: Pieces, recipe: Recipe) -> LowRank:
    return LowRank(
        np.sum([piece.weight * piece.a for piece in pieces], axis=0),
        np.sum([piece.weight * piece.b for piece in pieces], axis=0),
    )


def _trimmed(piece: Piece, recipe: Recipe) -> np.ndarray:
    assert recipe.density is not None  # checked
    return trim(piece.update(), recipe.density)


def _dropped(piece: Piece, recipe: Recipe) -> np.ndarray:
    assert recipe.density is not None  # checked
    dice = np.random.default_rng([recipe.seed, *piece.seed])
    return drop(piece.update(), recipe.density, dice)


@dataclass(frozen=True)
class Method:
    """One way to combine, either on factors (`low`) or on whole updates (`prune`, then `join`)."""

    says: str
    low: Callable[[Pieces, Recipe], LowRank] | None = None
    prune: Callable[[Piece, Recipe], np.ndarray] | None = None
    join: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None
    reads: tuple[str, ...] = ()  # of the recipe, besides the method
    keeps: bool = False  # one adapter of weight 1 as it is
    one_rank: bool = False  # of all adapters in a module

    def whole(self, pieces: Pieces, recipe: Recipe) -> np.ndarray:
        """[in, out] float32: the joined update, before it is made low-rank."""
        if self.low:
            low = self.low(pieces, recipe)
            return (low.a @ low.b).astype(np.float32)
        assert self.prune is not None and self.join is not None
        weighted = [np.float32(p.weight) * self.prune(p, recipe) for p in pieces]
        return self.join(weighted)


METHODS = {
    "delta": Method(
        "exact sum of the weighted updates; the ranks add up", _concatenated, keeps=True
    ),
    "task_arithmetic": Method(
        "another name of delta (Ilharco et al. 2023)", _concatenated, keeps=True
    ),
    "svd": Method("the same sum cut to --rank", _truncated, reads=("rank",)),
    "average": Method(
        "weighted average of the factors A and of B, not of the updates",
        _averaged, keeps=True, one_rank=True,
    ),
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
        _concatenated, reads=("blocks", "transition"),
    ),
    "dare_ties": Method(
        "drop at random, then elect signs as ties does",
        prune=_dropped, join=elect, reads=("rank", "density", "seed"),
    ),
}  # fmt: skip
