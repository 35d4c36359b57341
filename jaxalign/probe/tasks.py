"""Task scores and alignment: do languages that are aligned better also do better?

    scores = read_scores('runs/own/evaluation/report.json', table)   # of `jaxalign evaluate`
    found = relations(table, scores)
    found[0].system, found[0].measure, found[0].by_layer[16].pearson

As in figure 1b of Liu & Niehues (2025): a point is a language, its alignment the share of sentences
that find their translation from and to the pivot, by margin score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.checksums import check_sums
from jaxalign.data.languages import find_language
from jaxalign.errors import UserError
from jaxalign.hf.files import read_json
from jaxalign.probe.correlation import Correlation, correlate
from jaxalign.probe.table import Table, mean_of

LEAST = 3  # languages of a correlation
Scores = dict[str, dict[str, dict[str, float]]]  # system -> measure -> language -> score


@dataclass(frozen=True)
class Names:
    """What a table will name, before it is there."""

    systems: tuple[str, ...]
    languages: tuple[str, ...]
    pivot: str


@dataclass(frozen=True)
class Relation:
    """One system's scores in one measure against its alignment, layer by layer."""

    system: str
    measure: str
    languages: tuple[str, ...]  # without the pivot
    score: tuple[float, ...]  # of each language
    alignment: np.ndarray  # [L+1, languages] in 0..1
    by_layer: tuple[Correlation, ...]  # L+1


def read_scores(file: str, table: Table | Names) -> Scores:
    """The scores of the probed systems.

    Args:
      file: `report.json` of `jaxalign evaluate`, whose systems are met by name, or JSON of
        `{system: {language: score}}`, of one system also of `{language: score}`.
      table: names systems and languages.

    Raises:
      UserError: none of its systems or fewer than three of its languages were probed; several
        systems were, and it names none.
    """
    check_sums(Path(file).parent, [Path(file).name])
    content = read_json(Path(file))
    if "measures" in content:
        found = {
            system: {
                measure: {
                    name: _number(file, one["mean"]) for name, one in by_system[system].items()
                }
                for measure, by_system in (
                    (measure, parts["languages"]) for measure, parts in content["measures"].items()
                )
            }
            for system in content["systems"]
        }
    elif all(isinstance(value, Mapping) for value in content.values()):
        found = {system: {"score": _numbers(file, row)} for system, row in content.items()}
    else:
        found = {table.systems[-1]: {"score": _numbers(file, content)}}
        if len(table.systems) > 1:
            *_, last = table.systems
            raise UserError(
                f"{file} does not say which system has these scores, and these were probed: "
                f'{", ".join(table.systems)}; write {{"{last}": {{"de": 61.2, ...}}}}, or give the '
                "report.json of `jaxalign evaluate`"
            )
    known = {system: found[system] for system in table.systems if system in found}
    if not known:
        raise UserError(
            f"{file} has scores of {', '.join(found)}, but these were probed: "
            f"{', '.join(table.systems)}; give them the same names: --adapter NAME=PATH"
        )
    return {
        system: {measure: _probed(file, row, table) for measure, row in measures.items()}
        for system, measures in known.items()
    }


def relations(table: Table, scores: Scores) -> list[Relation]:
    """Alignment against score, a relation for each system and measure; of the first pooling."""
    found = []
    at = table.languages.index(table.pivot)
    for system, measures in scores.items():
        margin = table.pairs["margin"][table.systems.index(system), 0]  # [L+1, G, G]
        by = mean_of(np.stack([margin[:, :, at], margin[:, at, :]]), 0)  # [L+1, G]
        for measure, row in measures.items():
            measured = ~np.isnan(by).any(axis=0)
            languages = tuple(
                name
                for name, there in zip(table.languages, measured, strict=True)
                if there and name in row
            )
            aligned = by[:, [table.languages.index(name) for name in languages]]
            values = tuple(row[name] for name in languages)
            correlations = tuple(correlate(layer, np.array(values)) for layer in aligned)
            found.append(Relation(system, measure, languages, values, aligned, correlations))
    return found


def sentence(relation: Relation, layer: int) -> str:
    """What the relation is at this layer, in words."""
    found = relation.by_layer[layer]
    start = f"{relation.system}: {relation.measure} and retrieval with the pivot at layer {layer}"
    if found.pearson is None or found.spearman is None:
        return f"{start}: no correlation, the {' and the '.join(found.constant)} does not vary."
    assert found.pearson_p is not None and found.spearman_p is not None
    return (
        f"{start}: Pearson {found.pearson:.2f} (p {_p(found.pearson_p)}), Spearman "
        f"{found.spearman:.2f} (p {_p(found.spearman_p)}), {found.number} languages."
    )


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def _probed(file: str, row: dict[str, float], table: Table | Names) -> dict[str, float]:
    """The row by the codes of the table, without the pivot and what was not probed."""
    spelt: dict[str, float] = {}
    names: dict[str, str] = {}
    for name, score in row.items():
        language = find_language(name, table.languages)
        if name != language:  # another code of it, which its own code goes before
            if language in row:
                continue
            if language in spelt:
                raise UserError(
                    f"{file} has scores of {names[language]} and of {name}, but only {language} "
                    "was probed; give it one score, or probe them under their own codes"
                )
        spelt[language], names[language] = score, name
    kept = {name: spelt[name] for name in table.languages if name in spelt and name != table.pivot}
    if len(kept) < LEAST:
        raise UserError(
            f"{file} has scores of {', '.join(row)}, and of these only {len(kept)} were probed "
            f"besides the pivot {table.pivot!r}; a correlation needs at least {LEAST} languages"
        )
    return kept


def _numbers(file: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(file, value) for name, value in row.items()}


def _number(file: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{file}: {value!r} is not a score; give one number for each language")
    return float(value)
