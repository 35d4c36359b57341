"""Weights to try: a line or simplex of weights that sum to 1, or every combination.

combinations([[0, 0.5, 1]], 2)             # (0, 1), (0.5, 0.5), (1, 0)
combinations([[1], [0, 0.5, 1]], 2)        # (1, 0), (1, 0.5), (1, 1)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from jaxalign.errors import UserError

Mix = tuple[float, ...]  # a weight for each adapter


def combinations(grids: Sequence[Sequence[float]], adapters: int) -> list[Mix]:
    """The weights that grids describe, in order, each once.

    One grid for several adapters gives the combinations of its values that sum to 1; a grid for
    each gives all their combinations.

    Raises:
      UserError: another number of grids, a value that is not finite, no combination that sums to 1.
    """
    if not all(math.isfinite(value) for grid in grids for value in grid):
        raise UserError(
            "--grid: a value is not a number to weigh by; write as in 0,0.25,0.5,0.75,1"
        )
    if len(grids) == adapters:
        found = list(itertools.product(*grids))
    elif len(grids) == 1:
        every = itertools.product(grids[0], repeat=adapters)
        found = [weights for weights in every if abs(sum(weights) - 1) < 1e-6]
        if not found:
            raise UserError(
                f"--grid: no {adapters} of {', '.join(f'{v:g}' for v in grids[0])} sum to 1; add "
                "such values, or give one --grid for each adapter"
            )
    else:
        raise UserError(
            f"--grid: given {len(grids)} times for {adapters} adapters; give it once (weights sum "
            "to 1) or once for each adapter (all combinations)"
        )
    return [tuple(map(float, weights)) for weights in dict.fromkeys(found)]


def free(candidates: Sequence[Mix]) -> list[int]:
    """The adapters whose weight alone distinguishes all candidates: one where they form a line."""
    varied = [
        place
        for place in range(len(candidates[0]))
        if len({weights[place] for weights in candidates}) > 1
    ]
    for place in varied:
        if len({weights[place] for weights in candidates}) == len(candidates):
            return [place]
    return varied
