"""Every number of a probe: systems x poolings x layers x languages, and what they say.

table.pairs['margin'][s, p, layer, a, b]       # share of sentences of a that find those of b
table.curve('margin', 0, 0)                    # [L+1]: mean over all directions
table.best('margin', 0, 0)                     # the layer where that is largest
table.curve(keyed('margin', 'standardised'), 0, 0)             # by states in another form
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MAIN = "margin"
SCORES = ("cosine", "csls", "margin")  # retrieval, all ordered pairs
PIVOTED = ("mexa", "cka", "neighbours")  # each language with the pivot
ASKED = ("nasca", "navca", "dali", "dali_strong")  # likewise, only where asked for
HEALTH = (
    "norm", "spread", "cosine", "contrast", "largest", "dimension", "isoscore", "sentence",
    "shuffled",
)  # fmt: skip


def keyed(score: str, form: str) -> str:
    """The key of a score of SCORES, or MEXA, by states in this form: `standardised_margin`."""
    return score if form == "raw" else f"{form}_{score}"


def mean_of(
    values: np.ndarray,
    axis: int | tuple[int, ...] | None = None,
    weights: np.ndarray | int = 1,  # whole numbers, as broadcast against the values
) -> np.ndarray:
    """The mean of what is not NaN; NaN, without a warning, where all is."""
    there = ~np.isnan(values) * weights
    number = there.sum(axis=axis)
    total = (np.where(there > 0, values, 0) * there).sum(axis=axis)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


@dataclass(frozen=True)
class Table:
    """What was measured; NaN where nothing was (a language with itself, pairs without text)."""

    model: str
    corpus: str
    systems: tuple[str, ...]  # 'base' first, then the adapters
    poolings: tuple[str, ...]  # mean, last, position, first
    languages: tuple[str, ...]
    pivot: str
    sentences: dict[str, int]  # language -> number of sentences
    pairs: dict[str, np.ndarray]  # SCORES by form -> [S, P, L+1, G, G] in 0..1, row finds column
    pivoted: dict[str, np.ndarray]  # PIVOTED (MEXA by form), ASKED -> [S, P, L+1, G] in 0..1
    health: dict[str, np.ndarray]  # HEALTH -> [S, P, L+1]: means over languages
    warnings: dict[str, list[str]] = field(default_factory=dict)  # system -> sentences
    notes: tuple[str, ...] = ()
    forms: tuple[str, ...] = ("raw",)  # of the states: raw, then others of `forms.FORMS`

    @property
    def layers(self) -> int:
        """L: blocks of the model; layer 0 is the embeddings."""
        return next(iter(self.pairs.values())).shape[2] - 1

    def chosen(self, languages: Sequence[str] | None = None) -> np.ndarray:
        """[G] bool: which languages are meant."""
        return np.array([languages is None or name in languages for name in self.languages])

    def curve(
        self, score: str, system: int, pooling: int, languages: Sequence[str] | None = None
    ) -> np.ndarray:
        """[L+1]: mean over all directions, or over those from and to these languages.

        A direction between two of them counts for both, so that the curve of a group is the mean
        of its languages' and that of all is among the groups'.
        """
        ends = self.ends(score)[system, pooling]
        return mean_of(ends[:, self.chosen(languages)], (1, 2))

    def ends(self, score: str) -> np.ndarray:
        """[S, P, L+1, G, 2 G]: for each language the directions from it, then those to it."""
        values = self.pairs[score]
        return np.concatenate([values, np.swapaxes(values, -1, -2)], axis=-1)

    def by_language(self, score: str, system: int, pooling: int, layer: int) -> np.ndarray:
        """[G]: mean over the directions from and to each language."""
        return mean_of(self.ends(score)[system, pooling, layer], 1)

    def best(self, score: str, system: int, pooling: int) -> int:
        """The layer with the highest mean over all directions; the lowest of equals."""
        return int(np.nanargmax(self.curve(score, system, pooling)))
