"""The numbers of a probe from stored states: every layer, pooling, system and form of the states.

part = measure(corpus, stored, pivot='en', forms=('raw', 'standardised'))     # one corpus
table = join(model, systems, poolings, forms, pivot, corpora, [part, ...], asked)   # of all
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.probe.alarms import Alarms, merged
from jaxalign.probe.cka import linear_cka, products
from jaxalign.probe.collapse import collapse
from jaxalign.probe.corpus import Parallel
from jaxalign.probe.forms import formed
from jaxalign.probe.mexa import mexa
from jaxalign.probe.neighbours import overlap
from jaxalign.probe.retrieval import retrieval
from jaxalign.probe.table import ASKED, HEALTH, PIVOTED, SCORES, Table, keyed, mean_of
from jaxalign.probe.vectors import shuffled_pairs

SHAPE = ("norm", "spread", "cosine", "dimension", "isoscore", "largest", "contrast")


@dataclass
class Part:
    """One corpus: as in `Table`, but its own languages."""

    languages: tuple[str, ...]
    pairs: dict[str, np.ndarray]
    pivoted: dict[str, np.ndarray]
    health: dict[str, np.ndarray]
    alarms: dict[tuple[int, int], Alarms]  # by system and pooling


def measure(
    corpus: Parallel,
    stored: Sequence[Sequence[np.ndarray]],
    poolings: Sequence[str],
    pivot: str,
    forms: Sequence[str],
    width: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Part:
    """Everything about one corpus.

    Args:
      corpus: the sentences.
      stored: of each system and pooling [L+1, G, N, D], languages in the order of the corpus.
      poolings: their names.
      pivot: language of MEXA, CKA and neighbours, where the corpus has it.
      forms: of the states, see `jaxalign.probe.forms`; retrieval and MEXA are measured in each.
      width: principal directions kept for retrieval; None: exact.
      advance: called after every layer.

    Raises:
      UserError: a state is not finite.
    """
    layers, languages = stored[0][0].shape[:2]
    names = corpus.languages
    same = np.stack([corpus.same(name) for name in corpus.told_by(pivot)])  # [1, N] or [G, N]
    at = names.index(pivot) if pivot in names else None
    shape = (len(stored), len(poolings), layers)
    scores = [keyed(score, form) for form in forms for score in SCORES]
    pairs = {score: np.full((*shape, languages, languages), np.nan) for score in scores}
    mexas = [keyed("mexa", form) for form in forms]
    pivoted = {name: np.full((*shape, languages), np.nan) for name in (*mexas, *PIVOTED)}
    health = {name: np.full(shape, np.nan) for name in HEALTH}
    alarms = {
        place: Alarms(names, poolings[place[1]] if len(poolings) > 1 else "")
        for place in np.ndindex(*shape[:2])
    }
    for place in np.ndindex(*shape):
        system, pooling, layer = place
        states = np.asarray(stored[system][pooling][layer])
        for form in forms:
            seen = formed(states, form)
            for score, share in retrieval(seen, SCORES, groups=same, width=width).items():
                pairs[keyed(score, form)][place] = share
            if at is not None:
                pivoted[keyed("mexa", form)][place] = mexa(seen, at)
        shared = products(states)
        found = collapse(states, shared=shared)
        for name in SHAPE:
            health[name][place] = np.mean(getattr(found, name))
        health["sentence"][place] = found.shares["sentence"]
        if at is not None:
            pivoted["cka"][place] = linear_cka(states, shared=shared)[at]
            pivoted["neighbours"][place] = overlap(states, min(10, len(corpus) - 1))[at]
            for name in ("cka", "neighbours"):
                pivoted[name][(*place, at)] = np.nan
            other = (at + 1) % languages
            control = retrieval(shuffled_pairs(states[[at, other]]), ("cosine",), groups=None)
            health["shuffled"][place] = np.nanmean(control["cosine"])
        alarms[system, pooling].add(layer, found)
        advance()
    return Part(names, pairs, pivoted, health, alarms)


def join(
    model: str,
    systems: Sequence[str],
    poolings: tuple[str, ...],
    forms: tuple[str, ...],
    pivot: str,
    corpora: Sequence[Parallel],
    parts: Sequence[Part],
    asked: Sequence[dict[str, dict[str, np.ndarray]]],
    notes: tuple[str, ...] = (),
) -> Table:
    """One table of all corpora.

    Its `sentences` are those of all corpora that a language is in; every number is the mean over
    the corpora that have it, by their sentences.
    """
    languages = tuple(sorted({name for part in parts for name in part.languages}))
    places = [[languages.index(name) for name in part.languages] for part in parts]
    first = parts[0]

    def lay(name: str, kind: str, axes: int) -> np.ndarray:
        values = getattr(first, kind)[name]
        total = np.zeros((*values.shape[:3], *[len(languages)] * axes))
        number = np.zeros_like(total)
        for part, at, corpus in zip(parts, places, corpora, strict=True):
            new = getattr(part, kind)[name]
            index = (..., np.array(at)[:, None], at) if axes == 2 else (..., at)
            total[index] += np.nan_to_num(new) * len(corpus)
            number[index] += ~np.isnan(new) * len(corpus)
        return np.where(number > 0, total / np.maximum(number, 1), np.nan)

    def spread(score: str) -> np.ndarray:
        """[S, P, L+1, G]: what was asked for has one pooling of its own, repeated for all."""
        layers = first.pairs[SCORES[0]].shape[2]
        whole = np.full((len(systems), len(poolings), layers, len(languages)), np.nan)
        for system, found in enumerate(asked):
            for language, course in found[score].items():
                whole[system, :, :, languages.index(language)] = course
        return whole

    weights = np.array([len(corpus) for corpus in corpora])[:, None, None, None]
    return Table(
        model=model,
        corpus=", ".join(corpus.name for corpus in corpora),
        systems=tuple(systems),
        poolings=poolings,
        languages=languages,
        pivot=pivot,
        sentences={n: sum(len(c) for c in corpora if n in c.sentences) for n in languages},
        pairs={score: lay(score, "pairs", 2) for score in first.pairs},
        pivoted={name: lay(name, "pivoted", 1) for name in first.pivoted}
        | {name: spread(name) for name in ASKED if name in asked[0]},
        health={
            # A corpus without the pivot has no control: the mean is over the others.
            name: mean_of(np.stack([part.health[name] for part in parts]), 0, weights)
            for name in HEALTH
        },
        warnings={
            name: [
                line
                for pooling in range(len(poolings))
                for line in merged([part.alarms[system, pooling] for part in parts]).lines()
            ]
            for system, name in enumerate(systems)
        },
        notes=notes,
        forms=forms,
    )
