"""Which projections of which blocks a low-rank adapter changes, and by which rank and alpha.

One table, (target, block) -> (rank, alpha), which everything else is derived from. Few adapters
need it written out: one rank and alpha for some targets in some blocks, and the exceptions.

    ranks = Ranks.parse(spec, r=8, targets=['q', 'v'], layers='1..16')
    ranks.cell('q', 3), ranks.scale_of('q', 3)       # (8, 16.0), 2.0
    Ranks.of_table(ranks.table(32), 32) == ranks
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np

from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS


@dataclass(frozen=True, order=True)
class Part:
    """One projection of one block whose rank or alpha is its own; rank 0: it has no adapter."""

    target: str
    block: int  # counted from 1
    r: int
    alpha: float


@dataclass(frozen=True)
class Ranks:
    """The facts of a low-rank adapter, without its weights."""

    dora: ClassVar[bool] = False  # whether lengths of columns are trained, too

    r: int = 8  # the largest rank: R of the stacked factors
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(TARGETS)
    layers: tuple[int, ...] = ()  # adapted blocks, counted from 1; empty: all
    rank_stabilised: bool = False
    parts: tuple[Part, ...] = ()  # the projections that differ from r and alpha

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023), where no part says otherwise."""
        return self._scale(self.r, self.alpha)

    def cell(self, target: str, block: int) -> tuple[int, float]:
        """(rank, alpha) of one block's projection, blocks from 1; (0, 0) where nothing changes."""
        if target not in self.targets or (self.layers and block not in self.layers):
            return 0, 0.0
        return self._parts.get((target, block), (self.r, self.alpha))

    def rank_of(self, target: str, block: int) -> int:
        """The rank in a cell."""
        return self.cell(target, block)[0]

    def alpha_of(self, target: str, block: int) -> float:
        """The alpha in a cell."""
        return self.cell(target, block)[1]

    def scale_of(self, target: str, block: int) -> float:
        """What multiplies A B in one block's projection; 0 where it has no adapter."""
        r, alpha = self.cell(target, block)
        return self._scale(r, alpha) if r else 0.0

    def table(self, blocks: int) -> dict[tuple[str, int], tuple[int, float]]:
        """(target, block) -> (rank, alpha) of everything adapted in a model of so many blocks."""
        found = {
            (target, block): self.cell(target, block)
            for target in self.targets
            for block in self.layers or range(1, blocks + 1)
        }
        return {place: own for place, own in found.items() if own[0]}

    @property
    def even(self) -> bool:
        """Whether one number scales every adapter."""
        return all(self._scale(part.r, part.alpha) == self.scale for part in self.parts if part.r)

    def scales(self, target: str, blocks: int) -> np.ndarray:
        """[L] float32: `scale_of` in every block."""
        return np.array([self.scale_of(target, b + 1) for b in range(blocks)], np.float32)

    @classmethod
    def of_table(
        cls,
        table: Mapping[tuple[str, int], tuple[int, float]],
        blocks: int,
        *,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
    ) -> Self:
        """The adapter with these ranks and alphas: `table` turned round, one spelling for each.

        Args:
          table: (target, block) -> (rank, alpha); not empty.
          blocks: of the model.
        """
        r = max(rank for rank, _ in table.values())
        alphas = Counter(alpha for rank, alpha in table.values() if rank == r)
        alpha = alphas.most_common(1)[0][0]
        targets = tuple(name for name in TARGETS if any(name == target for target, _ in table))
        layers = tuple(sorted({block for _, block in table}))
        parts = (
            Part(target, block, *table.get((target, block), (0, 0.0)))
            for target in targets
            for block in layers
            if table.get((target, block)) != (r, alpha)
        )
        every = len(layers) == blocks
        return cls(
            r=r,
            alpha=alpha,
            dropout=dropout,
            targets=targets,
            layers=() if every else layers,
            rank_stabilised=rank_stabilised,
            parts=tuple(parts),
        )

    @classmethod
    def parse(
        cls,
        spec: ModelSpec,
        *,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[str] = tuple(TARGETS),
        layers: str = "all",
        scaling: str = "standard",
        ranks: Mapping[str, int] | None = None,
        alphas: Mapping[str, float] | None = None,
    ) -> Self:
        """The adapter that the configuration's words describe.

        Raises:
          UserError: a target that matches no projection, a layer past the model, a rank below 1.
        """
        names = tuple(name.removesuffix("_proj") for name in targets)
        unknown = [name for name in names if name not in TARGETS]
        if unknown or not names:
            raise UserError(
                f"lora.targets: {', '.join(unknown) or 'the empty list'} matches no projection of "
                f"this model; choose among {', '.join(TARGETS)}"
            )
        own_ranks = _of_targets("lora.ranks", ranks or {}, names)
        own_alphas = _of_targets("lora.alphas", alphas or {}, names)
        for key, rank in (("lora.r", r), *((f"lora.ranks.{n}", x) for n, x in own_ranks.items())):
            if rank < 1:
                raise UserError(f"{key}: {rank} is not a rank; use 1 or more (the paper's is 8)")
        chosen = parse_layers(layers, spec.layers)
        table = {
            (name, block): (own_ranks.get(name, r), float(own_alphas.get(name, alpha)))
            for name in names
            for block in chosen or range(1, spec.layers + 1)
        }
        return cls.of_table(
            table,
            spec.layers,
            dropout=float(dropout),
            rank_stabilised=scaling == "rank_stabilised",
        )

    @cached_property
    def _parts(self) -> dict[tuple[str, int], tuple[int, float]]:
        return {(part.target, part.block): (part.r, part.alpha) for part in self.parts}

    def _scale(self, r: int, alpha: float) -> float:
        return alpha / (math.sqrt(r) if self.rank_stabilised else r)


def parse_layers(text: str, total: int, key: str = "lora.layers") -> tuple[int, ...]:
    """`all` -> (), `1..16` -> (1, ..., 16), `3,5` -> (3, 5); blocks are counted from 1.

    Every block named one by one is `all`, too, so that equal adapters compare equal.
    """
    if text == "all":
        return ()
    try:
        spans = []
        for part in str(text).split(","):
            first, dots, last = part.partition("..")
            spans.append(range(int(first), int(last if dots else first) + 1))
    except ValueError as error:
        raise UserError(f"{key}: cannot read {text!r}; write all, 1..16 or 3,5,8") from error
    layers = [layer for span in spans for layer in span]
    wrong = [layer for layer in layers if not 1 <= layer <= total]
    if wrong or not all(spans):
        raise UserError(
            f"{key}: {text!r} names block {wrong[0] if wrong else 'none'}, but the model has "
            f"blocks 1 to {total}"
        )
    return () if len(set(layers)) == total else tuple(sorted(set(layers)))


def _of_targets(key: str, given: Mapping, targets: Sequence[str]) -> dict:
    """What a setting says of each target, under our names."""
    found = {name.removesuffix("_proj"): value for name, value in given.items()}
    for name in found:
        if name not in targets:
            raise UserError(
                f"{key}: {name} is not trained; choose among lora.targets ({', '.join(targets)})"
            )
    return found


def block_range(layers: Sequence[int]) -> str:
    """'1 to 16' of consecutive numbers, else '1, 5, 9'; '' of none."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
