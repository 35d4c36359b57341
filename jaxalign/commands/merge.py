"""`jaxalign merge`: adapters become one, or go into their base; weights may be searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxalign.arguments import is_setting, needed, option, words
from jaxalign.errors import UserError
from jaxalign.programs import begin


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Which adapters to merge, and how."""

    adapters: Sequence[str] = words("PEFT folders or hub names", "ADAPTER", "+", path=True)
    out: str = needed("folder to write", path=True)
    weights: str = option(
        "", "one weight for each adapter, as in 0.6,0.4 (or --weights=-1,1)", metavar="W,W"
    )
    method: str = option(
        "delta",
        "how updates are combined: delta (exact), task_arithmetic (the same), svd, average, "
        "magnitude, ties, dare, dare_ties, layer_swap",
    )
    rank: int | None = option(
        None, "rank of the result, for methods that cut it", whole=True, lowest=1
    )
    density: float | None = option(
        None, "share of entries that magnitude, ties and dare keep", number=True, above=0, highest=1
    )
    blocks: str = option(
        "", "blocks that layer_swap takes from the second adapter, as in 1..2,7,8", metavar="BLOCKS"
    )
    transition: int = option(
        0, "blocks next to these in which layer_swap takes the mean of both", metavar="N", lowest=0
    )
    seed: int | None = option(
        None, "seed of what dare drops (default 1)", whole=True, lowest=0, highest=2**32 - 1
    )
    base: str = option(
        "", "the adapters' base (default: that of the first adapter)", metavar="MODEL", path=True
    )
    into_base: str = option(
        "", "add the update to this base and write a whole model", metavar="MODEL", path=True
    )
    search: str = option(
        "",
        "choose the weights by a score of this run; key=value as in train",
        metavar="CONFIG",
        path=True,
    )
    grid: Sequence[str] = option(
        [], "values, tried where they sum to 1; or one list for each adapter", metavar="W,W"
    )
    metric: str = option("", "what the search judges by: a score of the task, or loss")
    data: Sequence[str] = option(
        [], "rows to choose weights by (default task.valid)", metavar="SOURCE", path=True
    )
    force: bool = option(False, "replace what is in --out")
    settings: Sequence[str] = ()  # of --search; they may also stand between the adapters

    def run(self) -> None:
        """Merges, and prints what was merged."""
        given = [*self.adapters, *self.settings]
        settings = [one for one in given if is_setting(one)]
        adapters = [one for one in given if one not in settings]
        existing = "replace" if self.force else "refuse"
        if self.search and (self.weights or self.base or self.into_base):
            raise UserError("--search finds the weights for the base of its CONFIG and writes an "
                            "adapter; leave out --weights, --base and --into-base")  # fmt: skip
        if not self.search and (settings or self.grid or self.metric or self.data):
            raise UserError("--grid, --metric, --data and key=value belong to --search CONFIG")
        from jaxalign.config import load
        from jaxalign.merge.check import check_read

        if self.seed is not None:  # the seed of a recipe is a number even where nothing is drawn
            check_read(self.method, "seed")
        config = load(self.search, settings).config if self.search else None
        begin()
        from jaxalign.merge.methods import Recipe
        from jaxalign.merge.run import merge, parse_numbers

        seed = 1 if self.seed is None else self.seed
        recipe = Recipe(self.method, self.rank, self.density, seed, self.blocks, self.transition)
        if config:
            from jaxalign.merge.search import search

            grids = [parse_numbers(text, "--grid") for text in self.grid or ["0,0.25,0.5,0.75,1"]]
            search(config, adapters, recipe, grids, self.out,
                   metric=self.metric, data=self.data, existing=existing)  # fmt: skip
            return
        if not self.weights and len(adapters) > 1:
            raise UserError("--weights is missing: 1,1 adds two updates, 0.5,0.5 averages them")
        merge(adapters, parse_numbers(self.weights or "1", "--weights"), recipe, self.out,
              base=self.base, into=self.into_base, existing=existing)  # fmt: skip
