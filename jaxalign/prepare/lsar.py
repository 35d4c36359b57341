"""The subspace in which languages differ, and the one direction that they share.

LSAR (Xie et al. 2022, "Discovering Low-rank Subspaces for Language-agnostic Multilingual
Representations") as Lens (Zhao et al. 2024, arXiv 2410.04407) uses it. M [D, n] are the mean states
of n languages:

    m̄ = M 1 / n;  M̂ = m̄ 1ᵀ + the best approximation of M - m̄ 1ᵀ of rank r
    w = M̂⁺ᵀ 1, divided by its squared length
    U [D, r] = left singular vectors of M̂ - w 1ᵀ

At rank n - 1 nothing is approximated: U spans the differences of the means and w is the foot of the
perpendicular from the origin onto their affine hull. One QR gives both, without pseudo-inverse.

    found = subspace(means, pivot=1)                 # means [n, D]
    found.axis, found.basis, found.shifts            # ŵ [D], U [D, n - 1], U Uᵀ (m_l - m_pivot)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxalign.errors import UserError

SMALLEST = 1e-7  # of the largest singular value: what a direction needs to be more than rounding


class Subspace(NamedTuple):
    """What languages share and where they differ; float64."""

    axis: np.ndarray  # [D], of length 1
    basis: np.ndarray  # [D, r], orthonormal columns
    shifts: np.ndarray  # [n, D]: from the pivot to each language, within the basis


def subspace(means: np.ndarray, pivot: int, rank: int | None = None) -> Subspace:
    """The subspace of these languages.

    Args:
      means: [n, D], one row for each language.
      pivot: the row that shifts are counted from.
      rank: r; None: n - 1.

    Raises:
      UserError: fewer than two languages, a rank that is not 1..n-1, or means that differ in fewer
        directions.
    """
    means = np.asarray(means, np.float64)
    full = len(means) - 1
    rank = full if rank is None else rank
    if full < 1:
        raise UserError("a subspace of languages needs at least two of them")
    if not 1 <= rank <= full:
        raise UserError(f"--rank: {rank} is not from 1 to {full}, one less than the languages")
    sizes = np.linalg.svd(means - means.mean(axis=0), compute_uv=False)
    there = int(np.sum(sizes > SMALLEST * max(float(np.linalg.norm(means)), 1e-300)))
    if there < rank:
        raise UserError(
            f"the means of {len(means)} languages differ in {there} directions, not in {rank}; "
            f"remove languages with the same sentences, or set --rank {max(there, 1)}"
        )
    foot, basis = _closed(means) if rank == full else _approximated(means, rank)
    length = np.linalg.norm(foot)
    if length <= SMALLEST * np.linalg.norm(means):
        raise UserError("the means of the languages surround the origin: they share no direction")
    return Subspace(foot / length, basis, (means - means[pivot]) @ basis @ basis.T)


def _closed(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    basis, _ = np.linalg.qr((means[1:] - means[0]).T)
    centre = means.mean(axis=0)
    return centre - basis @ (basis.T @ centre), basis


def _approximated(means: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    centre = means.mean(axis=0)
    left, sizes, right = np.linalg.svd((means - centre).T, full_matrices=False)
    near = centre[:, None] + (left[:, :rank] * sizes[:rank]) @ right[:rank]  # M̂ [D, n]
    foot = np.linalg.pinv(near).T @ np.ones(len(means))
    foot /= foot @ foot
    return foot, np.linalg.svd(near - foot[:, None], full_matrices=False)[0][:, :rank]
