"""Finished rows: an answer is right when it is the reference, blanks around both aside.

The reference is the row's text up to its end token (`Example.ends`), where answers end, too.

found = score_rows(golds, ["yes", "no "])
found["exact_match"].value
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.evaluate.measure import Gold, Measure, Scored, share


def score_rows(golds: Sequence[Gold], answers: Sequence[str]) -> Scored:
    """exact_match; counts: empty."""
    read = tuple(answer.strip() for answer in answers)
    hits = [
        (gold.example.reference.strip() == answer, 1)
        for gold, answer in zip(golds, read, strict=True)
    ]
    measure = Measure("exact_match", np.array(hits, float), share)
    return Scored((measure,), read, {"empty": read.count("")})
