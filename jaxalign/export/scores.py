"""The scores of an evaluation, for the model card: only where they are of the exported weights.

scores_of(source)          # a table, or None
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.checksums import check_sums
from jaxalign.errors import UserError
from jaxalign.evaluate.report import label
from jaxalign.export.source import Source
from jaxalign.hf.card import Scores
from jaxalign.hf.peft import load_peft, weights_digest


def scores_of(source: Source) -> Scores | None:
    """The evaluation in the run's folder, if it is of these weights; group means of each measure.

    `jaxalign evaluate` notes with its answers which adapter wrote them.
    """
    home = source.home
    if home is None or source.adapter is None:
        return None
    folder = home / "evaluation"
    try:
        check_sums(folder, ["report.json"])
        report = json.loads((folder / "report.json").read_text("utf-8"))
        own = _own_system(source, home, folder, report["systems"])
        return _score_table(report, own) if own else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None  # no evaluation, one of another version, or one that was damaged since


def _own_system(source: Source, home: Path, folder: Path, systems: Sequence[str]) -> str:
    """Which system of the evaluation is what is exported; '' where none is."""
    ours = home / "adapter"
    written, adapter = load_peft(ours, source.spec)
    same = adapter == source.adapter and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(source.weights), strict=True)
    )
    if not same:
        return ""
    digest = weights_digest(str(ours))
    for answers in sorted(folder.glob("*/answers.jsonl")):
        with answers.open(encoding="utf-8") as file:
            made_by = json.loads(file.readline())["made_by"]
        name = re.sub(r"_\d+$", "", answers.parent.name)
        if made_by.get("adapter_weights") == digest:
            return next((s for s in (answers.parent.name, name) if s in systems), "")
    return ""


def _score_table(report: dict[str, Any], own: str) -> Scores:
    systems = [own, *(name for name in report["systems"] if name != own)]
    head = ("", "languages", *(f"**{name}**" if name == own else name for name in systems))
    rows = []
    for measure, found in report["measures"].items():
        for group, languages in report["groups"].items():
            cells = []
            for system in systems:
                score = found["groups"][system][group]
                spread = "" if score["std"] is None else f" ± {score['std']:.1f}"
                cells.append(f"{score['mean']:.1f}{spread}")
            rows.append((f"{label(measure)}, {group}", " ".join(languages), *cells))
    notes = [f"**{own}** is this adapter; means over languages are macro means."]
    if any(seeds > 1 for seeds in report["seeds"].values()):
        notes.append("±: standard deviation over seeds.")
    return Scores(head, tuple(rows), (*notes, *report.get("signatures", ())))
