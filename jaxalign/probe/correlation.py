"""Does alignment go with task scores? Correlation over languages, with p values.

found = correlate(retrieval_by_language, f1_by_language)     # dicts by language, or two arrays
found.pearson, found.pearson_p, found.spearman, found.number
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxalign.errors import UserError


@dataclass(frozen=True)
class Correlation:
    """Both correlations and their two-sided p values; None where one side is constant."""

    pearson: float | None
    pearson_p: float | None
    spearman: float | None
    spearman_p: float | None
    number: int  # languages
    constant: tuple[str, ...]  # sides without variance: alignment, score


def correlate(
    alignment: Mapping[str, float] | Sequence[float] | np.ndarray,
    score: Mapping[str, float] | Sequence[float] | np.ndarray,
) -> Correlation:
    """Pearson's and Spearman's correlation between alignment and task score over languages.

    p values are two-sided, from Student's t with n - 2 degrees of freedom (scipy.stats), and so
    only rough for a handful of languages. The paper's figure 1b is `pearson` over 35 languages.

    Args:
      alignment: a number for each language; by code, or in the order of `score`.
      score: likewise. Of two mappings the languages in both are taken.

    Raises:
      UserError: fewer than 3 languages, unequal lengths, numbers that are not finite, or a mapping
        in a list.
    """
    from scipy import stats

    x, y = _paired(alignment, score)
    constant = tuple(
        name
        for name, side in (("alignment", x), ("score", y))
        if np.ptp(side) <= 1e-12 * np.abs(side).max()
    )
    if constant:
        return Correlation(None, None, None, None, len(x), constant)
    line, order = stats.pearsonr(x, y), stats.spearmanr(x, y)
    return Correlation(
        float(line.statistic),
        float(line.pvalue),
        float(order.statistic),
        float(order.pvalue),
        len(x),
        constant,
    )


def _paired(alignment: Any, score: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(alignment, Mapping) != isinstance(score, Mapping):
        raise UserError("give alignment and score both by language code, or both as lists")
    if isinstance(alignment, Mapping):
        codes = [code for code in alignment if code in score]
        alignment, score = [alignment[code] for code in codes], [score[code] for code in codes]
    x, y = np.asarray(alignment, float), np.asarray(score, float)
    if x.ndim != 1 or x.shape != y.shape:
        raise UserError(f"one number per language on both sides, not shapes {x.shape}, {y.shape}")
    if len(x) < 3:
        raise UserError(f"a correlation needs at least 3 languages, not {len(x)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError("alignment and score must be finite: leave the pivot language out")
    return x, y
