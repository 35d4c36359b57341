"""What a search for weights has found: every candidate with its scores, and the best of them.

found.candidates[found.best].weights
found.of_group(candidate, 'all')                # the mean of the metric over these languages
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluate.comparable import ALL
from jaxalign.merge.grid import Mix, free

LOSS = "loss"
Scores = dict[str, dict[str, float]]  # measure -> language -> value


@dataclass(frozen=True)
class Candidate:
    """One choice of weights and how it scored."""

    weights: Mix
    scores: Scores


@dataclass(frozen=True)
class Search:
    """All that was tried; `as_json` is its JSON."""

    adapters: list[str]
    method: str
    metric: str
    groups: dict[str, list[str]]  # name -> languages; the last is 'all'
    candidates: list[Candidate]

    def of_group(self, candidate: Candidate, group: str) -> float:
        """The metric's mean over a group's languages."""
        found = candidate.scores[self.metric]
        return float(np.mean([found[language] for language in self.groups[group]]))

    @property
    def best(self) -> int:
        """The candidate with the best mean over all languages; the first of equals.

        Raises:
          UserError: no candidate has a finite one.
        """
        values = np.array([self.of_group(candidate, ALL) for candidate in self.candidates])
        if not np.isfinite(values).any():
            raise UserError(
                f"--search: {self.metric} is not finite with any of the weights; choose smaller "
                "ones (--grid)"
            )
        values = np.where(np.isfinite(values), -values if self.metric == LOSS else values, -np.inf)
        return int(np.argmax(values))

    @property
    def free(self) -> list[int]:
        """The adapters whose weights distinguish the candidates."""
        return free([candidate.weights for candidate in self.candidates])

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return dataclasses.asdict(self) | {"best": self.best}
