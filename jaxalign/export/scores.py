"""The scores of an evaluation, for the model card: only where they are of the exported weights.

scores_of(source)          # a table, or None
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.checksums import check_sums
from jaxalign.errors import UserError
from jaxalign.evaluate.report import label
from jaxalign.export.source import Source
from jaxalign.generate.decoding import Decoding
from jaxalign.hf.card import Scores
from jaxalign.hf.find import holds_weights
from jaxalign.hf.peft import load_peft, weights_digest


def scores_of(source: Source) -> Scores | None:
    """The evaluation in the run's folder, if it is of these weights; group means of each measure.

    `jaxalign evaluate` notes in its report which adapter wrote the answers, on which base.
    """
    home = source.home
    if home is None or source.adapter is None:
        return None
    folder = home / "evaluation"
    try:
        check_sums(folder, ["report.json"])
        report = json.loads((folder / "report.json").read_text("utf-8"))
        own = _own_system(source, home, report)
        return _score_table(report, own) if own else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None  # no evaluation, one of another version, or one that was damaged since


def _own_system(source: Source, home: Path, report: dict[str, Any]) -> str:
    """Which system of the evaluation is what is exported, and nothing else; '' where none is."""
    ours = home / "adapter"
    written, adapter = load_peft(ours, source.spec)
    same = adapter == source.adapter and all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(source.weights), strict=True)
    )
    if not same:
        return ""
    wanted = {"adapter_weights": weights_digest(str(ours)), "base": _base_of(source)}
    for name in report["systems"]:
        # Scores of several seeds are means, so not of these weights.
        made_by = report["made_by"][name]
        if len(made_by) == 1 and made_by[0].items() >= wanted.items():
            return name
    return ""


def _base_of(source: Source) -> str:
    """The base's fingerprint; its weights are not downloaded for a card."""
    if holds_weights(source.folder):
        return source.opened.fingerprint
    return source.saved.meta["base"] if source.saved else ""


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
    (made_by,) = report["made_by"][own]
    notes = [
        f"**{own}** is this adapter, on its base in {made_by['dtype']}; means over languages are "
        f"macro means. {_rows_of(report)}."
    ]
    if any(seeds > 1 for seeds in report["seeds"].values()):
        notes.append("±: standard deviation over seeds.")
    notes += report.get("signatures", ())
    return Scores(head, tuple(rows), tuple(notes), asdict(Decoding.of(made_by)))


def _rows_of(report: dict[str, Any]) -> str:
    """Of how many rows the scores are: an evaluation may have read some of a test file alone."""
    least, most = min(report["rows"].values()), max(report["rows"].values())
    return f"Rows of each language: {least:,}" + (f" to {most:,}" if most > least else "")
