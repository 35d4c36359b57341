"""Who won how often, and the exact sign test.

tally(sign(np.array([0.5, 0.0, -1.0])))      # Tally(wins=1, losses=1, ties=1, p=1.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

TIE = 1e-9  # scores nearer than this are equal: sums in another order differ in the last digit


@dataclass(frozen=True)
class Tally:
    """How often the system is better and worse than the baseline, and the exact sign test."""

    wins: int
    losses: int
    ties: int
    p: float  # two-sided, ties left out


def sign(differences: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 of each difference."""
    return np.sign(differences) * (np.abs(differences) > TIE)


def tally(signs: np.ndarray | None) -> Tally | None:
    """Counts and p value of signs [any]; None where rows are not simply right or wrong."""
    if signs is None:
        return None
    wins, losses = int(np.sum(signs > 0)), int(np.sum(signs < 0))
    return Tally(wins, losses, len(signs) - wins - losses, sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p value that a fair coin falls at least as far from even; 1 for no throws."""
    throws = wins + losses
    # Logarithms, as 2^-throws is nothing in floats from about a thousand rows on.
    even = throws * math.log(2) - math.lgamma(throws + 1)
    tail = math.fsum(
        math.exp(-even - math.lgamma(k + 1) - math.lgamma(throws - k + 1))
        for k in range(min(wins, losses) + 1)
    )
    return min(1.0, 2 * tail)
