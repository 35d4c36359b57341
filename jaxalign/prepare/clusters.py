"""Groups of languages, and the language in the middle of each.

Average linkage on cosine distances; the medoid of a cluster is the language with the least summed
distance to the others of it. Meta-X_NLG (Maurya & Desarkar 2022, arXiv 2203.10250) trains on such
middle languages and names three of them for a task; how its clusters were made, and from which
vectors, is not in its code. Theirs are typological; ours are mean states of the base, or a file.

    found = cluster(vectors, 3)                      # vectors [n, D]
    found[0].members, found[0].medoid                # (0, 2, 5), 2
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxalign.errors import UserError


class Cluster(NamedTuple):
    """Some rows, and the one in their middle."""

    members: tuple[int, ...]  # increasing
    medoid: int
    distance: float  # of the medoid to the others, in the mean


def cosine_distances(vectors: np.ndarray) -> np.ndarray:
    """[n, n]: 1 - cosine.

    Raises:
      UserError: a vector of length 0.
    """
    vectors = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise UserError("a language has a vector of length 0, which has no direction")
    unit = vectors / lengths
    return np.clip(1 - unit @ unit.T, 0.0, 2.0)


def cluster(vectors: np.ndarray, number: int) -> list[Cluster]:
    """So many clusters of vectors [n, D], the largest first.

    Raises:
      UserError: more clusters than vectors, or a vector without direction.
    """
    distances = cosine_distances(vectors)
    if not 1 <= number <= len(distances):
        raise UserError(f"--number: {number} is not from 1 to {len(distances)}, the languages")
    groups = [[row] for row in range(len(distances))]
    while len(groups) > number:
        apart = [
            (float(distances[np.ix_(groups[i], groups[j])].mean()), i, j)
            for j in range(len(groups))
            for i in range(j)
        ]
        _, first, second = min(apart)
        groups[first] += groups.pop(second)
    found = []
    for group in map(sorted, groups):
        summed = distances[np.ix_(group, group)].sum(axis=1)
        middle = int(np.argmin(summed))
        others = max(len(group) - 1, 1)
        found.append(Cluster(tuple(group), group[middle], float(summed[middle] / others)))
    return sorted(found, key=lambda one: (-len(one.members), one.members))
