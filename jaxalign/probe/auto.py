"""`align.layer=auto`: a probe of the base on the run's own pairs says which layer to align.

choice = choose(open_base(config))
choice.sentence()       # align.layer=auto chose block 14 of 32 (44% of the depth): ...
"""

from __future__ import annotations

import tempfile

from jaxalign.base import Base
from jaxalign.data.wanted import wanted_pairs
from jaxalign.errors import UserError
from jaxalign.probe.choice import Choice, choose_for_training
from jaxalign.probe.corpus import Parallel
from jaxalign.probe.run import Probed, measure_corpora
from jaxalign.settings import Config
from jaxalign.train.record import chosen_layer

FEWEST, MOST = 32, 200  # pairs of two languages: fewer say nothing, more say nothing new


def settle(base: Base, output: str) -> tuple[int, str]:
    """What `align.layer=auto` stands for, with a sentence: what the run in `output` chose before,
    or what a probe says."""
    known = chosen_layer(output)
    if known is not None:
        return known, f"align.layer=auto: block {known}, as this run chose before"
    choice = choose(base)
    return choice.layer, choice.sentence()


def choose(base: Base) -> Choice:
    """The layer at which the bare base retrieves the sentences of `align.train` best.

    These are the pairs that the run trains, behind `align.transforms` and in `align.languages`. Up
    to 200 pairs of each pair of languages; the mean over the pairs of languages and both
    directions of top-1 retrieval (by the score of `judging`), states pooled as `align.pooling` and
    compared as `align.states`. Where raw states are dominated by massive activations, standardised
    ones are asked; the choice says so.

    Raises:
      UserError: no pair of languages has enough pairs, or no block finds anything.
    """
    config = base.config
    corpora = _corpora(config)
    with tempfile.TemporaryDirectory() as folder:
        table = measure_corpora(
            base,
            corpora,
            [Probed("base")],
            folder,
            poolings=(config.align.pooling,),
            pivot="",
            states_as=tuple(dict.fromkeys(("standardised", config.align.states))),
        )
    return choose_for_training(table, config.align.states)


def _corpora(config: Config) -> list[Parallel]:
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    # In another order than `align.control=shuffled` trains them: it would hide every translation.
    for pair in wanted_pairs(config)[0]:
        # Sides are distinguished even where the data names no languages.
        names = (pair.source_language or "source", pair.target_language or "target")
        rows = found.setdefault(names, [])
        if len(rows) < MOST:
            rows.append((pair.source, pair.target))
    corpora = [
        Parallel({a: [s for s, _ in rows], b: [t for _, t in rows]}, f"{a}-{b}")
        for (a, b), rows in found.items()
        if len(rows) >= FEWEST and a != b
    ]
    if not corpora:
        most = max((len(rows) for rows in found.values()), default=0)
        raise UserError(
            f"align.layer=auto needs {FEWEST} pairs of two languages; after align.transforms and "
            f"align.languages, align.train has {most}; name a layer (the paper aligns the middle "
            "one)"
        )
    return corpora
