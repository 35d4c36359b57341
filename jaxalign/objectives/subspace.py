"""What `jaxalign prepare subspace` measured, as an objective gets the option `{file: x.npz}`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Subspace:
    """What languages share and where they differ, in the states of one base."""

    file: str
    axis: np.ndarray  # float32 [D], of length 1: shared
    basis: np.ndarray  # float32 [D, r], orthonormal columns: different
    shifts: np.ndarray  # float32 [n, D]: from the pivot to each language, within the basis
    languages: tuple[str, ...]
    numbers: np.ndarray  # int32 [n]: how a batch writes them
    pivot: str
    layer: int  # -1: after the final norm
    pooling: str
    base: str  # the fingerprint
    digest: str  # of all of it but the file's name
