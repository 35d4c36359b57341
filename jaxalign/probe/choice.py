"""The layer to align: where parallel sentences find each other best, and by which states.

choose_layer(table)                          # Choice(layer=14, score=0.83, ...), by raw states
choose_for_training(table, "raw")            # the same, unless massive activations hide the rest
bests(table, 0, 0)                           # {'raw': {'margin': (11, 0.37), ...}, ...}
as_json(table)                               # every number, and these choices
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxalign.errors import UserError
from jaxalign.probe.collapse import FLAT, MASSIVE
from jaxalign.probe.table import MAIN, SCORES, Table, keyed, mean_of

NEARLY = 0.9  # of the best block's score: as good, for a choice
WORDS = {MAIN: "margin score", "csls": "CSLS"}  # for a sentence
MANY = 0.5  # of the blocks: then the raw curve compares blocks that say something with others


@dataclass(frozen=True)
class Choice:
    """A layer to align, and why."""

    layer: int
    layers: int  # of the model
    score: float  # retrieval there, in 0..1, by the score that `judging` names
    gap: float  # what it lacks of finding all
    form: str = "raw"  # the states by which it was chosen
    note: str = ""  # why not by raw states, and what follows

    def sentence(self) -> str:
        """For the log of a run."""
        of = "" if self.form == "raw" else f" of {self.form} states"
        return (
            f"align.layer=auto chose block {self.layer} of {self.layers} "
            f"({self.layer / self.layers:.0%} of the depth): parallel sentences find each other "
            f"best there, {self.score:.1%} by {WORDS[judging(self.form)]}{of}{self.note}"
        )


def judging(form: str) -> str:
    """The score that compares blocks by these states.

    The ratio margin, the paper's, divides by the mean cosine of neighbours. Of states about their
    mean this is near 0 or below it where sentences are few, and the ratio says nothing (Gemma 3
    270M, 16 sentences: 62 % by the margin, 98 % by CSLS); the difference, CSLS, has no such place.
    """
    return MAIN if form == "raw" else "csls"


def choose_layer(table: Table, score: str = "", form: str = "raw") -> Choice:
    """The block whose outputs already retrieve best in the first system, never the embeddings.

    Liu & Niehues (2025) align the middle layer, where the base's retrieval is highest (their figure
    1a): what is nearly language-neutral is the easiest to finish.

    Args:
      table: the first pooling is looked at.
      score: cosine, csls or margin; empty: as `judging` says.
      form: of the states, one of `table.forms`.

    Raises:
      UserError: no direction was measured.
    """
    curve = table.curve(keyed(score or judging(form), form), 0, 0)[1:]
    if np.isnan(curve).all():
        raise UserError("no direction between two languages was measured; give parallel text")
    layer = 1 + int(np.nanargmax(curve))
    found = float(curve[layer - 1])
    return Choice(layer, table.layers, found, 1 - found, form)


def choose_for_training(table: Table, states: str = "raw") -> Choice:
    """The block for a run that aligns `states` (`align.states`).

    By those states; where the run aligns raw ones and massive activations dominate these in half
    of the blocks, by standardised states all the same: the raw curve then peaks where they happen
    to be small (Qwen2.5-Coder 0.5B: in block 1 of 24). The curve of standardised states is flat
    over many blocks (Gemma 3 270M: 75 to 81 % from block 4 to 11), where the highest is a matter of
    chance: of the blocks around it that find 90 % as many, the middle one is taken.

    Raises:
      UserError: no block finds anything.
    """
    raw = choose_layer(table)
    form = states if states in table.forms else "raw"
    note = ""
    where = hidden(table, 0, 0)[1:]
    if form == "raw" and "standardised" in table.forms and where.mean() >= MANY:
        form = "standardised"
        note = (
            f"; by raw states, which massive activations dominate in {where.sum()} blocks, it "
            f"would be block {raw.layer} with {raw.score:.1%}, and a loss on raw states may hardly "
            "move: set align.states=standardised"
        )
    best = choose_layer(table, form=form)
    if best.score == 0:
        raise UserError(
            "align.layer=auto: no block of the base finds a single translation; name a layer (the "
            "paper aligns the middle one)"
        )
    if form == "raw":
        return best
    curve = table.curve(keyed(judging(form), form), 0, 0)
    first, last = _plateau(curve, best.layer)
    layer = (first + last + 1) // 2
    if first < last:
        note = f" (the middle of blocks {first} to {last}, which find nearly as many){note}"
    found = float(curve[layer])
    return Choice(layer, table.layers, found, 1 - found, form, note)


def _plateau(curve: np.ndarray, best: int) -> tuple[int, int]:
    """First and last of the blocks around the best one that find nearly as many."""
    enough = NEARLY * curve[best]
    first = last = best
    while first > 1 and curve[first - 1] >= enough:
        first -= 1
    while last < len(curve) - 1 and curve[last + 1] >= enough:
        last += 1
    return first, last


def hidden(table: Table, system: int, pooling: int) -> np.ndarray:
    """[L+1] bool: layers whose raw cosines say little, on average over the languages.

    One dimension carries most of the energy, or cosines of different sentences hardly differ.
    """
    largest, contrast, cosine = (
        table.health[name][system, pooling] for name in ("largest", "contrast", "cosine")
    )
    return ((largest > MASSIVE) & (cosine > MASSIVE)) | (contrast < FLAT)


def bests(table: Table, system: int, pooling: int) -> dict[str, dict[str, tuple[int, float]]]:
    """Form of the states -> score -> (block, value there), of the block where it is highest.

    Retrieval is the mean over all directions, MEXA over the languages with the pivot; what was not
    measured is left out.
    """
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for form in table.forms:
        curves = {score: table.curve(keyed(score, form), system, pooling) for score in SCORES}
        curves["mexa"] = mean_of(table.pivoted[keyed("mexa", form)][system, pooling], 1)
        for score, curve in curves.items():
            if not np.isnan(curve[1:]).all():
                layer = 1 + int(np.nanargmax(curve[1:]))
                found.setdefault(form, {})[score] = (layer, float(curve[layer]))
    return found


def as_json(table: Table) -> dict[str, Any]:
    """Every number, JSON-ready; NaN as None. `best`: system -> pooling -> `bests`."""

    def plain(value: np.ndarray) -> list:
        whole = np.round(value, 6).astype(object)
        whole[np.isnan(value)] = None
        return whole.tolist()

    found = {name: getattr(table, name) for name in (f.name for f in dataclasses.fields(table))}
    for name in ("pairs", "pivoted", "health"):
        found[name] = {key: plain(value) for key, value in found[name].items()}
    best = {
        system: {
            pooling: {
                form: {score: {"layer": at, "value": round(value, 6)} for score, (at, value) in row}
                for form, row in ((form, row.items()) for form, row in bests(table, s, p).items())
            }
            for p, pooling in enumerate(table.poolings)
        }
        for s, system in enumerate(table.systems)
    }
    return found | {"best": best, "jax": jax.__version__}
