"""Systems compared: means over seeds and groups of languages, and whether a gain is more than luck.

The first system is the baseline. A group's score is the macro mean over its languages of corpus
scores, as papers print it, so a small test set weighs as much as a large one. Gains are tested by
paired bootstrap over rows: both systems are scored on the same resampled rows (Koehn 2004,
"Statistical Significance Tests for Machine Translation Evaluation"). That is luck of the test
rows, not luck of training: read it together with the standard deviation over seeds.

    systems = [System("fine-tuned", runs), System("aligned", other_runs)]  # one dict per seed
    found = compare(systems, {"supervised": ["en"], "transfer": ["cy", "sw"]})
    found.measures["slot_f1"].group_gains["aligned"]["transfer"]     # gain, low, high, p
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluate.comparable import (
    System,
    each_run,
    members_of,
    same_languages,
    same_measures,
    same_rows,
)
from jaxalign.evaluate.measure import Measure, share
from jaxalign.evaluate.resample import Stack, items, pools, resamples
from jaxalign.evaluate.tally import TIE, Tally, sign, tally

CONFIDENCE = 95  # percent, of every interval


@dataclass(frozen=True)
class Score:
    """A score over the seeds."""

    mean: float
    std: float | None  # over seeds, n - 1 in the denominator; None for a single seed
    seeds: list[float]  # each seed's own score
    rows: int  # rows of data it was measured on


@dataclass(frozen=True)
class Gain:
    """A system's score less the baseline's."""

    gain: float
    low: float  # of the bootstrap's interval
    high: float
    p: float  # two-sided; never 0
    rows: Tally | None = None  # rows one got right more often; None: rows are not right or wrong
    languages: Tally | None = None  # of a group


@dataclass(frozen=True)
class Comparisons:
    """One measure: system -> language or group -> number; gains have no entry for the baseline.

    A language where the measure is missing has no entry, and neither has a group of such languages
    alone.
    """

    languages: dict[str, dict[str, Score]]
    groups: dict[str, dict[str, Score]]
    language_gains: dict[str, dict[str, Gain]]
    group_gains: dict[str, dict[str, Gain]]


@dataclass(frozen=True)
class Comparison:
    """All that a report needs; `as_json` is its JSON."""

    systems: list[str]  # the first is the baseline
    seeds: dict[str, int]
    groups: dict[str, list[str]]  # name -> languages measured; the last is 'all'
    absent: dict[str, list[str]]  # languages that a group names and no system was measured in
    rows: dict[str, int]  # language -> rows
    measures: dict[str, Comparisons]  # the first is the main score
    counts: dict[str, dict[str, float]]  # system -> 'ill_formed' -> number, mean over seeds
    draws: int
    seed: int
    confidence: int = CONFIDENCE
    signatures: list[str] = field(default_factory=list)  # bleu signature: ...; comet model: ...
    notes: list[str] = field(default_factory=list)  # sentences about the rows

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


def compare(
    systems: Sequence[System],
    groups: dict[str, list[str]],
    *,
    draws: int = 1000,
    seed: int = 1,
    notes: Sequence[str] = (),
) -> Comparison:
    """Every score, and every gain over the first system with its interval and p value.

    Args:
      systems: At least one; all measured in the same languages, on the same rows in one order.
      groups: Name -> languages, in the order to print; a language may be in several. Languages
        in none form 'other'; 'all' always comes last.
      draws: Resamples of the paired bootstrap.
      seed: Of the resamples. They depend on nothing else but the ids of the rows: where languages
        are translations of the same rows, or of some of them, a draw takes the same items of all,
        so that the interval of a group knows they are not independent (see `resample`). Rows
        without ids are drawn by language.
      notes: sentences about the rows, for the report.

    Raises:
      UserError: Systems differ in languages, rows or measures, or share a name; no draws.
    """
    if draws < 1:
        raise UserError(f"draws={draws}: a bootstrap needs at least one; 1000 are usual")
    languages = same_languages(systems)
    rows = same_rows(systems, languages)
    measured = same_measures(systems, languages)
    members, absent = members_of(groups, languages)
    # [name][system] -> [languages, seeds] and [languages, draws]
    values, drawn = _all_scores(systems, languages, rows, measured, draws, seed)
    place = {language: number for number, language in enumerate(languages)}

    measures = {}
    for name, there in measured.items():
        found = Comparisons({}, {}, {}, {})
        parts = {
            group: kept
            for group, inside in members.items()
            if (kept := [language for language in inside if language in there])
        }
        for number, system in enumerate(systems):
            ours, base = values[name][number], values[name][0]
            found.languages[system.name] = {
                language: _score(ours[place[language]], rows[language]) for language in there
            }
            found.groups[system.name] = {
                group: _score(
                    ours[[place[language] for language in inside]].mean(axis=0),
                    sum(rows[language] for language in inside),
                )
                for group, inside in parts.items()
            }
            if number == 0:
                continue
            better = ours.mean(axis=1) - base.mean(axis=1)  # [languages]
            resampled = drawn[name][number] - drawn[name][0]  # [languages, draws]
            signs = {language: _row_signs(systems[0], system, name, language)
                     for language in there}  # fmt: skip
            found.language_gains[system.name] = {
                language: _gain(
                    better[place[language]], resampled[place[language]], tally(signs[language])
                )
                for language in there
            }
            found.group_gains[system.name] = {
                group: _gain(
                    better[[place[language] for language in inside]].mean(),
                    resampled[[place[language] for language in inside]].mean(axis=0),
                    tally(_joined([signs[language] for language in inside])),
                    tally(sign(better[[place[language] for language in inside]])),
                )
                for group, inside in parts.items()
            }
        measures[name] = found
    return Comparison(
        systems=[system.name for system in systems],
        seeds={system.name: len(system.runs) for system in systems},
        groups=members,
        absent=absent,
        rows=rows,
        measures=measures,
        counts={system.name: _counts(system) for system in systems},
        draws=draws,
        seed=seed,
        signatures=_signatures(systems),
        notes=list(notes),
    )


# Scores and resamples -----------------------------------------------------------------------------


def _all_scores(
    systems: Sequence[System],
    languages: Sequence[str],
    rows: dict[str, int],
    measured: dict[str, list[str]],
    draws: int,
    seed: int,
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """Measure -> per system [languages, seeds] as measured, and [languages, draws] resampled.

    A resample's score is the mean over seeds, all on the same rows. Where a measure is missing in
    a language, both are NaN.
    """

    def scores_of(system: System, name: str, lang: str) -> list[float]:
        there = lang in measured[name]
        return [run[lang][name].value if there else np.nan for run in system.runs]

    values = {
        name: [
            np.array([scores_of(system, name, lang) for lang in languages]) for system in systems
        ]
        for name in measured
    }
    if len(systems) == 1:  # nothing to pair
        return values, {}
    empty = (len(languages), draws)
    drawn = {name: [np.full(empty, np.nan) for _ in systems] for name in measured}
    stacks = {
        language: Stack.of(
            (name, number, [run[language][name] for run in system.runs])
            for name, there in measured.items()
            if language in there
            for number, system in enumerate(systems)
        )
        for language in languages
    }
    first = systems[0].runs[0]
    for pool in pools({lang: items(lang, first[lang].ids, rows[lang]) for lang in languages}):
        for block, counts in resamples(pool, draws, seed):
            for language, drawn_rows in counts.items():
                place = languages.index(language)
                for name, number, scores in stacks[language].scores(drawn_rows):
                    drawn[name][number][place, block] = scores
    return values, drawn


def _score(seeds: np.ndarray, rows: int) -> Score:
    std = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
    return Score(float(seeds.mean()), std, [float(value) for value in seeds], rows)


# Gains --------------------------------------------------------------------------------------------


def _gain(
    gain: float, resampled: np.ndarray, rows: Tally | None, languages: Tally | None = None
) -> Gain:
    """The gain with its percentile interval and p value of resampled gains [draws].

    p is twice the share of resamples on the other side of zero, resample 0 being the data's own
    (the +1), so that it is at least 2 / (draws + 1).
    """
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    beyond = min(np.sum(resampled <= TIE), np.sum(resampled >= -TIE))
    p = min(1.0, 2 * (1 + float(beyond)) / (1 + len(resampled)))
    return Gain(float(gain), float(low), float(high), p, rows, languages)


def _row_signs(base: System, system: System, name: str, language: str) -> np.ndarray | None:
    """Whose seeds got each row right more often, [rows] of -1, 0, 1.

    None where a row is not simply right or wrong: only a share with one try a row is.
    """
    means = []
    for each in (base, system):
        runs = [run[language][name] for run in each.runs]
        if not all(_right_or_wrong(measure) for measure in runs):
            return None
        means.append(np.mean([measure.parts[:, 0] for measure in runs], axis=0))
    return sign(means[1] - means[0])


def _right_or_wrong(measure: Measure) -> bool:
    parts = measure.parts
    return measure.formula is share and bool(
        np.all(parts[:, 1] == 1) and np.all(np.isin(parts[:, 0], (0, 1)))
    )


def _joined(signs: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [found for found in signs if found is not None]
    return np.concatenate(known) if len(known) == len(signs) else None


# Next to the scores -------------------------------------------------------------------------------


def _counts(system: System) -> dict[str, float]:
    """Counts over all languages, mean over seeds."""
    names = dict.fromkeys(
        name for run in system.runs for scored in run.values() for name in scored.counts
    )
    return {
        name: float(
            np.mean([sum(s.counts.get(name, 0) for s in run.values()) for run in system.runs])
        )
        for name in names
    }


def _signatures(systems: Sequence[System]) -> list[str]:
    """What scorers say of themselves in words ('bleu signature: nrefs:1|...'), each once."""
    found = {
        f"{name.replace('_', ' ')}: {text}": None
        for _, run in each_run(systems)
        for scored in run.values()
        for name, text in scored.details.items()
        if isinstance(text, str)
    }
    return list(found)
