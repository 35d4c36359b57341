"""`jaxalign compare`: trains what is missing, measures each system, reports.

    compare(read_study('configs/compare_methods.yaml'))

Trials are done seed by seed, so that a comparison that was stopped has all systems with fewer
seeds, and each is measured as soon as it is trained; mixtures follow the last of their parts.
Several processes may work at one comparison: each takes trials that no other one holds. The folder
holds all that is needed to go on, on another machine too: what was measured before runs in
`prepared`, runs in `runs`, answers in `answers`, states in `states`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from jaxalign.compare import report
from jaxalign.compare.draw import draw
from jaxalign.compare.measure import answers, shape
from jaxalign.compare.share import claim, each
from jaxalign.compare.study import Study
from jaxalign.compare.trial import (
    Bases,
    Diverged,
    Outcome,
    Trial,
    check_length,
    check_prepared,
    check_report,
    cost,
    finished,
    mix,
    mixed,
    outcome,
    prepare,
    train,
)
from jaxalign.errors import UserError
from jaxalign.evaluate.comparable import System, check_groups, check_rows, same_languages
from jaxalign.evaluate.compare import Comparison
from jaxalign.evaluate.compare import compare as compared
from jaxalign.evaluate.draw import draw as draw_gains
from jaxalign.evaluate.entrants import Entrant
from jaxalign.evaluate.gold import kind_of, read_golds
from jaxalign.evaluate.measure import Scored
from jaxalign.evaluate.report import PICTURE
from jaxalign.evaluate.report import write as write_scores
from jaxalign.evaluate.scorers import rehearse
from jaxalign.evaluate.seen import seen
from jaxalign.hf.peft import load_peft
from jaxalign.probe.corpus import read_parallel
from jaxalign.programs import shared_programs
from jaxalign.settings import AUTO
from jaxalign.terminal import console, say

# What a trial says: evaluation -> language -> scores; and score -> layers of its states.
Measured = tuple[dict[str, dict[str, Scored]], dict[str, Any]]


def compare(study: Study, missing: str = "train", only: Sequence[str] = ()) -> report.Found:
    """Trains, measures and reports.

    Args:
      missing: `train` what is not there yet, or `skip` it and report what is there.
      only: systems to train and report; empty: all. The baseline is always reported.

    Returns:
      What report.json holds.

    Raises:
      UserError: anything in the settings, the data or the base that cannot work; several
        processes; nothing to report.
      SystemExit: training was stopped on request; the same command goes on.
    """
    if jax.process_count() > 1:
        raise UserError(
            "jaxalign compare runs in one process; train each system with jaxalign train on all "
            "of them, and compare the adapters with jaxalign evaluate"
        )
    _check_names(study, only)
    check_data(study, only)
    with shared_programs():
        return _compare(study, missing, only)


def _compare(study: Study, missing: str, only: Sequence[str]) -> report.Found:
    bases, started = Bases(), time.monotonic()
    names = _taking_part(study, only)
    for of in itertools.product(names, study.seeds, study.choice.candidates):
        check_length(study, Trial(*of))
    if missing == "train":
        with claim(study, "prepared", wait=True):
            for name in names:
                prepare(study, name, bases)
    else:
        for name in names:
            check_prepared(study, name, bases)
    best, chosen = _choose(study, names, bases, missing)

    mixtures = [name for name in study.mixtures if not only or name in only]
    for name, seed in itertools.product(mixtures, study.seeds):
        if parts := _made_of(study, name, seed, best):
            mixed(study, name, parts)  # one that was edited is found before anything is trained

    def one(trial: Trial) -> tuple[Outcome, Measured]:
        done = train(study, trial, bases) if missing == "train" else outcome(study, trial)
        found = done, _measure(study, done, bases)
        if missing == "train":
            _mix_what_is_due(study, mixtures, trial, best, bases)
        return found

    trials = [Trial(name, seed, best[name]) for seed in study.seeds for name in names]
    done = each(study, _to_do(study, trials, missing), one)
    outcomes: dict[str, list[Outcome]] = {}
    for trial, (said, _) in done.items():
        outcomes.setdefault(trial.system, []).append(said)
    measured = {trial: scores for trial, (_, scores) in done.items()}
    for name in mixtures:
        systems = study.mixtures[name].systems
        for seed in study.seeds:
            parts = [
                one for part in systems for one in outcomes.get(part, ()) if one.trial.seed == seed
            ]
            if len(parts) == len(systems):
                with claim(study, Trial(name, seed).place("").as_posix(), wait=True):
                    merged = mix(study, name, parts)
                    measured[merged.trial] = _measure(study, merged, bases)
                outcomes.setdefault(name, []).append(merged)
    outcomes, left_out = common(outcomes)
    left_out += [
        f"{name}: left out, as no seed of it is finished yet."
        for name in (*names, *mixtures) if name not in outcomes
    ]  # fmt: skip
    with claim(study, "report", wait=True):
        found = _found(study, outcomes, measured, chosen, bases, left_out)
        _write(study, found, time.monotonic() - started)
    return found


def _to_do(study: Study, trials: Sequence[Trial], missing: str) -> list[Trial]:
    if missing == "train":  # which compares their settings and rows
        return list(trials)
    found = [trial for trial in trials if finished(study, trial)]
    for trial in found:
        check_report(study, trial)
    return found


def check_data(study: Study, only: Sequence[str] = ()) -> None:
    """Reads what systems are measured on, before any is trained.

    Each system has settings of its own, so the data may be others; equal ones are read once.

    Raises:
      UserError: data of an evaluation or parallel text that cannot be used; systems that would not
        answer the same rows.
    """
    known: dict[str, dict[str, Scored]] = {}

    def rows_of(name: str, words: Sequence[str]) -> dict[str, Scored]:
        config = study.systems[name][-1].config(words)
        read_from = repr((config.evaluate, kind_of(config), config.seed))
        if read_from not in known:
            golds = read_golds(config)
            rehearse(kind_of(config), golds, config.evaluate.options)
            known[read_from] = {lang: Scored((), ()).of(rows) for lang, rows in golds.items()}
        return known[read_from]

    names = _taking_part(study, only)
    for evaluation, words in study.evaluations.items():
        check_groups(study.base.config(words).evaluate.groups)
        systems = [System(name, [rows_of(name, words)]) for name in names]
        try:
            check_rows(systems, same_languages(systems))
        except UserError as error:
            raise UserError(f"{study.file}: evaluations.{evaluation}: {error}") from error
    if len(study.choice.candidates) > 1:  # each system is judged by itself
        first = next(iter(study.evaluations.values()))
        for name in names:
            rows_of(name, [*first, *study.choice.words])
    if texts := study.texts:
        for corpus in read_parallel(texts.parallel, texts.languages, texts.rows):
            for note in corpus.notes:
                say(note)


def common(outcomes: dict[str, list[Outcome]]) -> tuple[dict[str, list[Outcome]], list[str]]:
    """The outcomes of the seeds that all systems have, and sentences about the others.

    Otherwise a system with one seed would be compared with the mean of three.

    Raises:
      UserError: no seed is common to all.
    """
    seeds = {name: {one.trial.seed for one in many} for name, many in outcomes.items()}
    shared = set.intersection(*seeds.values()) if seeds else set()
    if seeds and not shared:
        raise UserError(
            "the systems have no seed in common yet; report some of them with --only NAME,NAME"
        )
    more = {name: sorted(own - shared) for name, own in seeds.items() if own - shared}
    sentences = [
        f"{name}: seeds {', '.join(map(str, own))} are left out, as others do not have them yet."
        for name, own in more.items()
    ]
    return {
        name: [one for one in many if one.trial.seed in shared] for name, many in outcomes.items()
    }, sentences


def _check_names(study: Study, only: Sequence[str]) -> None:
    for name in only:
        if name not in study.names:
            raise UserError(f"--only: {name!r} is not a system of {study.file}; it has "
                            f"{', '.join(study.names)}")  # fmt: skip


def _taking_part(study: Study, only: Sequence[str]) -> list[str]:
    """The systems that are trained: those that are asked for, their parts and the baseline."""
    return [
        name for name in study.systems
        if not only or name in only or name == study.names[0] or _serves(study, name, only)
    ]  # fmt: skip


def _serves(study: Study, name: str, only: Sequence[str]) -> bool:
    """Whether a system is a part of a mixture that is asked for."""
    return any(name in study.mixtures[one].systems for one in only if one in study.mixtures)


def _choose(
    study: Study, names: Sequence[str], bases: Bases, missing: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, float]]]:
    """Each system's candidate of the grid that is best on the validation rows, and the scores."""
    candidates = study.choice.candidates
    if len(candidates) == 1:
        return dict.fromkeys(names, candidates[0]), {}
    evaluation = next(iter(study.evaluations))

    def judge(trial: Trial) -> float | None:
        try:
            done = train(study, trial, bases) if missing == "train" else outcome(study, trial)
        except Diverged as error:
            say(f"{error}; it is not chosen")
            return None
        rows = answers(study, done, evaluation, bases, study.choice.words, root="choice")
        return float(np.mean([scored.measures[0].value for scored in rows.values()]))

    trials = [Trial(name, study.seeds[0], one) for name in names for one in candidates]
    scores = each(study, _to_do(study, trials, missing), judge, "choosing: ")
    best: dict[str, tuple[str, ...]] = {}
    chosen: dict[str, dict[str, float]] = {}
    for name in names:
        known = {
            trial.candidate: score for trial, score in scores.items()
            if trial.system == name and score is not None
        }  # fmt: skip
        best[name] = max(known, key=known.__getitem__, default=candidates[0])
        if known:
            chosen[name] = {",".join(one): score for one, score in known.items()}
    return best, chosen


def _mix_what_is_due(
    study: Study, mixtures: Sequence[str], trial: Trial, best: dict[str, tuple[str, ...]],
    bases: Bases,
) -> None:  # fmt: skip
    """The mixtures of which this trial was the last part: a comparison that is stopped has them."""
    for name in mixtures:
        if trial.system not in study.mixtures[name].systems:
            continue
        parts = _made_of(study, name, trial.seed, best)
        if not parts or mixed(study, name, parts):
            continue
        with claim(study, Trial(name, trial.seed).place("").as_posix(), wait=False) as mine:
            if mine:
                _measure(study, mix(study, name, parts), bases)


def _made_of(
    study: Study, name: str, seed: int, best: dict[str, tuple[str, ...]]
) -> list[Outcome]:  # fmt: skip
    """What a mixture is made of; [] while a part of it is not finished."""
    trials = [Trial(part, seed, best[part]) for part in study.mixtures[name].systems]
    if not all(finished(study, one) for one in trials):
        return []
    return [outcome(study, one) for one in trials]


def _measure(study: Study, done: Outcome, bases: Bases) -> Measured:
    """Scores and states of a finished trial; its answers and states are on disk then."""
    scores = {one: answers(study, done, one, bases) for one in study.evaluations}
    return scores, shape(study, done, bases)


def _found(
    study: Study, outcomes: dict[str, list[Outcome]], measured: dict[Trial, Measured],
    chosen: dict[str, dict[str, float]], bases: Bases, left_out: list[str],
) -> report.Found:  # fmt: skip
    systems = [name for name in study.names if name in outcomes]
    if not systems:
        raise UserError(f"{study.output}: no system is trained yet; leave out --report")
    comparisons: dict[str, Comparison] = {}
    for evaluation in study.evaluations:
        runs = [
            System(name, [measured[one.trial][0][evaluation] for one in outcomes[name]])
            for name in systems
        ]
        config = study.base.config(study.evaluations[evaluation])
        entrants = [Entrant(name, one.adapter) for name in systems for one in outcomes[name]]
        comparisons[evaluation] = compared(
            runs, report.groups_of(config.evaluate.groups), draws=config.evaluate.draws,
            seed=config.seed, notes=seen(read_golds(config), entrants),
        )  # fmt: skip
    first, *others = comparisons.values()
    more = dict.fromkeys(note for one in others for note in one.notes if note not in first.notes)
    layer = study.base.config().align.layer
    said = study.texts.layer if study.texts else None
    return report.Found(
        title=study.file.stem.replace("_", " "),
        comparisons=comparisons,
        facts={
            name: [_facts(one, measured[one.trial][1], bases) for one in outcomes[name]]
            for name in systems
        },
        chosen=chosen,
        base=shape(study, None, bases),
        layer=said if said is not None else None if layer == AUTO else layer,
        notes=[*left_out, *more],
    )


def _facts(one: Outcome, layers: dict[str, Any], bases: Bases) -> report.Facts:
    spec = bases.under(one.config).spec
    _, adapter = load_peft(one.adapter, spec)
    return report.Facts(
        seed=one.trial.seed,
        candidate=one.trial.candidate,
        parameters=one.parameters or adapter.count(spec),
        layer=one.layer,
        layers=layers,
        **cost(one.outputs),
    )


def _write(study: Study, found: report.Found, seconds: float) -> None:
    folder = Path(study.output)
    for evaluation, comparison in found.comparisons.items():
        pictures = {PICTURE: partial(draw_gains, comparison)} if len(found.facts) > 1 else {}
        write_scores(comparison, folder / "scores" / evaluation, evaluation, pictures)
    paths = report.write(found, folder, draw if len(found.facts) > 1 else None)
    screen = console()
    for title, (head, rows) in report.tables(found).items():
        shown = Table(title=f"{found.title}: {title}", title_justify="left")
        for number, name in enumerate(head):
            shown.add_column(name, justify="right" if number else "left")
        for row in rows:
            shown.add_row(*row)
        screen.print(shown)
    for sentence in report.sentences(found):
        say(sentence)
    say(f"written: {', '.join(map(str, paths))}; {timedelta(seconds=round(seconds))}")
