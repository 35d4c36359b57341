"""What merging does to single matrices: prune an update, join several, make one low-rank.

Pure NumPy, one module at a time. An update is [in, out]; its factors are a [in, R] and b [R, out].

    kept = trim(update, 0.2)                          # the 20 % of largest magnitude
    joined = elect([0.5 * kept, 0.5 * other])         # TIES
    low = truncate(joined, 16)                        # low.a @ low.b, low.lost / low.whole
    low = truncate_product(a, b, 16)                  # the same of a @ b, which is never formed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_STRIP = 1024  # rows that are in float64 at a time


@dataclass(frozen=True)
class LowRank:
    """The best approximation of an update by factors, and what it leaves out."""

    a: np.ndarray  # [in, r]
    b: np.ndarray  # [r, out]
    lost: float = 0.0  # squared Frobenius norm of what is missing
    whole: float = 0.0  # squared Frobenius norm of the update


def trim(update: np.ndarray, density: float) -> np.ndarray:
    """The update with all but the largest magnitudes set to zero.

    Yadav et al. 2023, "TIES-Merging", algorithm 1, step 1, within one module.

    Args:
      update: [in, out].
      density: share that is kept, rounded down to whole entries.
    """
    keep = int(density * update.size)
    if keep == update.size:
        return update
    kept = np.zeros_like(update)
    smallest = update.size - keep  # how many go
    largest = np.argpartition(np.abs(update), smallest - 1, axis=None)[smallest:]
    kept.flat[largest] = update.flat[largest]
    return kept


def drop(update: np.ndarray, density: float, dice: np.random.Generator) -> np.ndarray:
    """The update with entries dropped at random and the others divided by the share kept.

    DARE of Yu et al. 2024, "Language Models are Super Mario", with their drop rate p = 1 - density:
    the expected value is the update itself.

    Args:
      update: [in, out].
      density: probability that an entry is kept.
      dice: where the choice comes from.
    """
    kept = dice.random(update.shape, np.float32) < density
    return np.where(kept, update / update.dtype.type(density), 0)


def add(updates: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of weighted updates: task arithmetic (Ilharco et al. 2023, section 2)."""
    return np.sum(updates, axis=0)


def elect(updates: Sequence[np.ndarray]) -> np.ndarray:
    """Entry by entry, the mean of those weighted updates whose sign is that of their sum.

    Yadav et al. 2023, algorithm 1, steps 2 and 3. The weights take part in the vote (the paper has
    none), so an update of weight 0 counts as absent and a negative weight votes for the opposite.
    """
    sign = np.sign(np.sum(updates, axis=0))
    total, count = np.zeros_like(updates[0]), np.zeros(updates[0].shape, np.int32)
    for update in updates:
        agrees = (np.sign(update) == sign) & (sign != 0)
        total += np.where(agrees, update, 0)
        count += agrees
    return total / np.maximum(count, 1).astype(total.dtype)


def truncate_product(a: np.ndarray, b: np.ndarray, rank: int) -> LowRank:
    """The best rank-`rank` approximation of a @ b by QR of both factors.

    With a = Qa Ra and bᵀ = Qb Rb, the singular values of a b are those of the small Ra Rbᵀ, so
    cost and memory are those of the factors. The error is that of the discarded singular values,
    the least possible (Eckart & Young 1936).

    Args:
      a: [in, R] float64.
      b: [R, out] float64.
      rank: at most so many columns come back.
    """
    left, small_left = np.linalg.qr(a)
    right, small_right = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(small_left @ small_right.T)
    root = np.sqrt(s[:rank])
    return LowRank(
        left @ (u[:, : len(root)] * root),
        (root[:, None] * vt[: len(root)]) @ right.T,
        float(np.sum(s[rank:] ** 2)),
        float(np.sum(s**2)),
    )


def truncate(update: np.ndarray, rank: int) -> LowRank:
    """The best rank-`rank` approximation of a whole update; its error is measured, not estimated.

    The leading singular vectors of the short side are eigenvectors of its Gram matrix, in float64;
    projecting on them is the truncated singular value decomposition (Eckart & Young 1936).

    Args:
      update: [in, out].
      rank: at most so many columns come back.
    """
    from scipy.linalg import eigh

    tall = update if update.shape[0] >= update.shape[1] else update.T
    size = tall.shape[1]
    gram = np.zeros((size, size))
    for strip in _strips(tall):
        gram += strip.T @ strip
    rank = min(rank, size)
    _, vectors = eigh(gram, subset_by_index=[size - rank, size - 1])
    vectors = vectors[:, ::-1]  # [short, rank], largest first
    shadows = np.concatenate([strip @ vectors for strip in _strips(tall)])  # [long, rank]
    lost = 0.0
    for number, strip in enumerate(_strips(tall)):
        rows = shadows[number * _STRIP : number * _STRIP + len(strip)]
        lost += float(np.sum((strip - rows @ vectors.T) ** 2))
    # Both factors get the root of the singular values, so that neither is tiny.
    root = np.sqrt(np.linalg.norm(shadows, axis=0))
    root[root == 0] = 1
    long, short = shadows / root, vectors * root
    a, b = (long, short.T) if tall is update else (short, long.T)
    return LowRank(a, b, lost, float(np.trace(gram)))


def _strips(matrix: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(matrix), _STRIP):
        yield matrix[start : start + _STRIP].astype(np.float64)
