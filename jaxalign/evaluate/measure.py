"""One number of one language, kept as the sums it is made of.

A measure holds one row of statistics for every row of data (hits and tries, matched n-grams, ...)
and the formula from their sum to the score. So a corpus score is never a mean of means, a bootstrap
only adds up other rows, and a language can be judged in parts.

    found = Measure("intent_accuracy", parts=hits_and_tries, formula=share)   # parts [rows, 2]
    found.value                                  # 83.1
    found.formula(counts @ found.parts)          # [1000] for counts [1000, rows] of a bootstrap
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxalign.data.sources import Record
from jaxalign.data.tasks import Example


@dataclass(frozen=True)
class Gold:
    """One row to be judged against."""

    example: Example  # what was asked; its answer is the reference
    fields: Mapping[str, Any]  # the row of the data
    id: str  # the row's own id, or its number; equal ids in two languages are translations
    language: str  # 'de'; of a translation the direction, 'de-en'
    number: int = 0  # of the row in the data, all languages counted together
    content: str = ""  # digest of the row as the data has it, whatever transforms make of it

    @property
    def record(self) -> Record:
        """The row of the data and its place, as tasks read it."""
        return Record(dict(self.fields), self.example.origin)


@dataclass(frozen=True)
class Measure:
    """A score in percent (or BLEU, chrF points) as sums; higher is better."""

    name: str  # slot_f1, exact_match, intent_accuracy, bleu, chrf, entity_f1, ...
    parts: np.ndarray  # [rows, k] float64, statistics of each row
    formula: Callable[[np.ndarray], np.ndarray]  # sums [..., k] -> scores [...]

    @property
    def value(self) -> float:
        """The score over all rows."""
        return float(self.formula(self.parts.sum(axis=0)))


@dataclass(frozen=True)
class Scored:
    """One language of one system."""

    measures: tuple[Measure, ...]  # the first is the task's main score
    read: tuple[Any, ...]  # what each answer was read as, JSON-ready, in the order of the rows
    counts: Mapping[str, int] = field(default_factory=dict)  # 'ill_formed': 3, 'empty': 1, ...
    details: Mapping[str, Any] = field(default_factory=dict)  # scores of each slot type, signature
    ids: tuple[str, ...] = ()  # of the rows; equal ids in two languages are translations
    unmeasured: tuple[str, ...] = ()  # measures that say nothing of this language, and are missing
    contents: tuple[str, ...] = ()  # of the rows, digests: equal ids may be of other rows

    def __getitem__(self, name: str) -> Measure:
        return next(measure for measure in self.measures if measure.name == name)

    def of(self, rows: Sequence[Gold]) -> Scored:
        """The same, with what tells these rows from others."""
        return replace(
            self, ids=tuple(row.id for row in rows), contents=tuple(row.content for row in rows)
        )


def share(sums: np.ndarray) -> np.ndarray:
    """Percent of sums [..., (hits, tries)]; 0 where nothing was tried."""
    return 100 * _ratio(sums[..., 0], sums[..., 1])


def f1(sums: np.ndarray) -> np.ndarray:
    """Micro F1 in percent of sums [..., (right, predicted, gold)]; 0 where nothing is right.

    Harmonic mean of precision and recall in seqeval's order of operations, so that its numbers
    come out to the last digit.
    """
    precision = _ratio(sums[..., 0], sums[..., 1])
    recall = _ratio(sums[..., 0], sums[..., 2])
    return 100 * _ratio(2 * precision * recall, precision + recall)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.zeros(np.shape(over)), where=np.asarray(under) != 0)
