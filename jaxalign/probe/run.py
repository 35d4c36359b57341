"""`jaxalign probe`: states of parallel text from every layer, and all that they tell.

table = probe(config, 'data/ntrex', [Probed('base'), Probed('aligned', 'runs/aligned/adapter')],
              out='report')
choose_layer(table)                # Choice(layer=14, score=0.83, ...)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxalign.base import Base, System, load_base, weights_digest
from jaxalign.data.languages import find_language
from jaxalign.errors import UserError
from jaxalign.hf.load import fingerprint
from jaxalign.multihost import is_main
from jaxalign.probe.cka import linear_cka, products
from jaxalign.probe.collapse import collapse
from jaxalign.probe.corpus import Parallel, read_parallel
from jaxalign.probe.items import Items, measure_items, read_items
from jaxalign.probe.mexa import mexa
from jaxalign.probe.neighbours import overlap
from jaxalign.probe.neurons import measure_neurons
from jaxalign.probe.retrieval import retrieval
from jaxalign.probe.states import store_states
from jaxalign.probe.table import ASKED, HEALTH, PIVOTED, SCORES, Table
from jaxalign.probe.vectors import shuffled_pairs
from jaxalign.settings import Config


@dataclass(frozen=True)
class Probed:
    """One set of weights."""

    name: str
    adapter: str = ""  # PEFT folder or hub name; empty: the bare base


def probe(
    config: Config,
    parallel: str,
    systems: Sequence[Probed],
    out: str,
    *,
    poolings: Sequence[str] = ("mean",),
    languages: Sequence[str] = (),
    rows: int = 0,
    pivot: str = "en",
    dtype: str = "float32",
    width: int | None = None,
    neurons: int = 0,
    items: str = "",
) -> Table:
    """Measures every layer of every system on parallel text.

    Args:
      config: `model.*`, `mesh.*`, `generate.adapter` and `generate.batch` are read.
      parallel: folder, file or dataset; see `read_parallel`.
      systems: the bare base and adapters.
      out: folder; the vectors lie in `out/states/SYSTEM` and are used again.
      poolings: mean, last, position, first.
      languages: keep only these.
      rows: keep only the first sentences; 0: all.
      pivot: the language that MEXA, CKA and neighbours compare with.
      dtype: of the vectors on disk, float32 or float16.
      width: principal directions kept for retrieval; None: exact.
      neurons: sentences whose feed-forward neurons are compared, too; 0: none.
      items: task items in several languages for DALI, see `read_items`; empty: none.

    Raises:
      UserError: bad text, adapters or settings.
    """
    corpora = read_parallel(parallel, languages, rows, pivot)
    have = sorted({name for corpus in corpora for name in corpus.languages})
    return measure_corpora(
        config, corpora, systems, out, poolings=poolings, pivot=find_language(pivot, have),
        dtype=dtype, width=width, neurons=neurons,
        items=read_items(items, have) if items else None,
    )  # fmt: skip


def measure_corpora(
    config: Config,
    corpora: Sequence[Parallel],
    systems: Sequence[Probed],
    out: str,
    *,
    poolings: Sequence[str] = ("mean",),
    pivot: str = "en",
    dtype: str = "float32",
    width: int | None = None,
    neurons: int = 0,
    items: Items | None = None,
) -> Table:
    """As `probe`, on text and items that are already read."""
    check_systems(systems)
    base = load_base(config)
    parts = []
    asked: list[dict[str, dict[str, np.ndarray]]] = []  # of each system: score -> language -> [L+1]
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeRemainingColumn(), disable=not is_main() or not Console().is_terminal,
    ) as bar:  # fmt: skip
        more = sum(min(neurons, len(corpus)) * len(corpus.sentences) for corpus in corpora)
        more += sum(len(options) for rows in (items or {}).values() for options in rows)
        task = bar.add_task("states", total=(_sentences(corpora) + more) * len(systems))

        def sentences(count: int) -> None:
            bar.advance(task, count)

        stored = []
        for system in systems:
            weights = base.wear(system.adapter) if system.adapter else base.bare()
            stored.append(
                _states(config, base, system, weights, corpora, Path(out), poolings, dtype,
                        sentences)
            )  # fmt: skip
            if bar.disable and is_main():  # a log, where the bar would not move
                print(f"{system.name}: {_sentences(corpora):,} sentences read", flush=True)
            asked.append(
                _asked(base, weights, corpora, pivot, neurons, items, config.generate.batch,
                       sentences)
            )  # fmt: skip
        layers = base.spec.layers + 1
        task = bar.add_task("layers", total=len(systems) * len(corpora) * len(poolings) * layers)
        for number, corpus in enumerate(corpora):
            parts.append(
                _measure(
                    corpus,
                    [[one[number][pooling] for pooling in poolings] for one in stored],
                    pivot,
                    width,
                    lambda: bar.advance(task),
                )
            )
    return _join(config.model.path, systems, tuple(poolings), pivot, corpora, parts, asked)


@dataclass(frozen=True)
class Choice:
    """A layer to align, and why."""

    layer: int
    layers: int  # of the model
    score: float  # margin retrieval there, in 0..1
    gap: float  # what it lacks of finding all

    def sentence(self) -> str:
        """For the log of a run."""
        return (
            f"align.layer=auto chose block {self.layer} of {self.layers} "
            f"({self.layer / self.layers:.0%} of the depth): parallel sentences find each other "
            f"best there, {self.score:.1%} by margin score"
        )


def choose_layer(table: Table, score: str = "margin") -> Choice:
    """The block whose outputs already retrieve best in the first system, never the embeddings.

    Liu & Niehues (2025) align the middle layer, where the base's retrieval is highest (their figure
    1a): what is nearly language-neutral is the easiest to finish.
    """
    curve = table.curve(score, 0, 0)[1:]
    if np.isnan(curve).all():
        raise UserError("no direction between two languages was measured; give parallel text")
    layer = 1 + int(np.nanargmax(curve))
    return Choice(layer, table.layers, float(curve[layer - 1]), 1 - float(curve[layer - 1]))


def _sentences(corpora: Sequence[Parallel]) -> int:
    return sum(len(corpus) * len(corpus.sentences) for corpus in corpora)


def _states(
    config: Config,
    base: Base,
    system: Probed,
    weights: System,
    corpora: Sequence[Parallel],
    out: Path,
    poolings: Sequence[str],
    dtype: str,
    report: Callable[[int], None],
) -> list[dict[str, np.ndarray]]:
    """Per corpus: pooling -> [L+1, G, N, D] on disk."""
    identity = {
        "base": fingerprint(config.model.path, config.model.revision),
        "adapter": weights_digest(system.adapter) if system.adapter else "",
        "weights": config.model.stored,
    }
    return [
        store_states(
            base,
            weights,
            corpus,
            out / "states" / system.name / ("" if len(corpora) == 1 else Path(corpus.name).stem),
            poolings,
            identity,
            dtype,
            config.generate.batch,
            report,
        )
        for corpus in corpora
    ]


def _asked(
    base: Base,
    weights: System,
    corpora: Sequence[Parallel],
    pivot: str,
    neurons: int,
    items: Items | None,
    batch: int,
    report: Callable[[int], None],
) -> dict[str, dict[str, np.ndarray]]:
    """Score -> language -> [L+1], of what was asked for beyond the states."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for corpus in corpora:
        if neurons and pivot in corpus.sentences:
            for score, rows in measure_neurons(
                base, weights, corpus, pivot, neurons, batch, report
            ).items():
                found.setdefault(score, {}).update(rows)
    if items:
        found |= measure_items(base, weights, items, pivot, batch, report)
    return found


@dataclass
class _Part:
    """One corpus: as in `Table`, but its own languages."""

    languages: tuple[str, ...]
    pairs: dict[str, np.ndarray]
    pivoted: dict[str, np.ndarray]
    health: dict[str, np.ndarray]
    warnings: list[list[str]]  # of each system


def _measure(
    corpus: Parallel,
    stored: Sequence[Sequence[np.ndarray]],  # [S][P] of [L+1, G, N, D]
    pivot: str,
    width: int | None,
    advance: Callable[[], None],
) -> _Part:
    systems, poolings = len(stored), len(stored[0])
    layers, languages = stored[0][0].shape[:2]
    names, same = corpus.languages, corpus.same(pivot)
    at = names.index(pivot) if pivot in names else None
    shape = (systems, poolings, layers)
    pairs = {score: np.full((*shape, languages, languages), np.nan) for score in SCORES}
    pivoted = {name: np.full((*shape, languages), np.nan) for name in PIVOTED}
    health = {name: np.full(shape, np.nan) for name in HEALTH}
    warnings: list[list[str]] = [[] for _ in range(systems)]
    for place in np.ndindex(*shape):
        system, pooling, layer = place
        states = np.asarray(stored[system][pooling][layer])
        found = retrieval(states, SCORES, groups=same, width=width)
        for score in SCORES:
            pairs[score][place] = found[score]
        shared = products(states)
        shape_of_states = collapse(states, shared=shared)
        for name in ("norm", "spread", "cosine", "dimension", "isoscore"):
            health[name][place] = np.mean(getattr(shape_of_states, name))
        health["sentence"][place] = shape_of_states.shares["sentence"]
        if at is not None:
            pivoted["mexa"][place] = mexa(states, at)
            pivoted["cka"][place] = linear_cka(states, shared=shared)[at]
            pivoted["neighbours"][place] = overlap(states, min(10, len(corpus) - 1))[at]
            for name in ("cka", "neighbours"):
                pivoted[name][(*place, at)] = np.nan
            other = (at + 1) % languages
            control = retrieval(shuffled_pairs(states[[at, other]]), ("cosine",), groups=None)
            health["shuffled"][place] = np.nanmean(control["cosine"])
        warnings[system] += [
            f"layer {layer}, {warning}" for warning in shape_of_states.warnings(list(names))
        ]
        advance()
    return _Part(names, pairs, pivoted, health, warnings)


def _join(
    model: str,
    systems: Sequence[Probed],
    poolings: tuple[str, ...],
    pivot: str,
    corpora: Sequence[Parallel],
    parts: Sequence[_Part],
    asked: Sequence[dict[str, dict[str, np.ndarray]]],
) -> Table:
    """One table of all corpora: a direction is measured in one of them."""
    languages = tuple(sorted({name for part in parts for name in part.languages}))
    places = [[languages.index(name) for name in part.languages] for part in parts]
    first = parts[0]

    def lay(name: str, kind: str, axes: int) -> np.ndarray:
        values = getattr(first, kind)[name]
        whole = np.full((*values.shape[:3], *[len(languages)] * axes), np.nan)
        for part, at in zip(parts, places, strict=True):
            new = getattr(part, kind)[name]
            index = (..., np.array(at)[:, None], at) if axes == 2 else (..., at)
            whole[index] = np.where(np.isnan(new), whole[index], new)
        return whole

    def spread(score: str) -> np.ndarray:
        """[S, P, L+1, G]: what was asked for has one pooling of its own, repeated for all."""
        layers = first.pairs[SCORES[0]].shape[2]
        whole = np.full((len(systems), len(poolings), layers, len(languages)), np.nan)
        for system, found in enumerate(asked):
            for language, course in found[score].items():
                whole[system, :, :, languages.index(language)] = course
        return whole

    weights = [len(corpus) for corpus in corpora]
    return Table(
        model=model,
        corpus=", ".join(corpus.name for corpus in corpora),
        systems=tuple(system.name for system in systems),
        poolings=poolings,
        languages=languages,
        pivot=pivot,
        sentences={n: len(c) for c in corpora for n in c.languages},
        pairs={score: lay(score, "pairs", 2) for score in SCORES},
        pivoted={name: lay(name, "pivoted", 1) for name in PIVOTED}
        | {name: spread(name) for name in ASKED if name in asked[0]},
        health={
            name: np.average([part.health[name] for part in parts], axis=0, weights=weights)
            for name in HEALTH
        },
        warnings={
            system.name: [text for part in parts for text in part.warnings[place]]
            for place, system in enumerate(systems)
        },
        notes=(),
    )


def check_systems(systems: Sequence[Probed]) -> None:
    """Refuses two systems of one name."""
    names = [system.name for system in systems]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two systems are called {twice!r}; write --adapter NAME=PATH")


def as_json(table: Table) -> dict:
    """Every number, JSON-ready; NaN as None."""

    def plain(value: np.ndarray) -> list:
        whole = np.round(value, 6).astype(object)
        whole[np.isnan(value)] = None
        return whole.tolist()

    found = {name: getattr(table, name) for name in (f.name for f in dataclasses.fields(table))}
    for name in ("pairs", "pivoted", "health"):
        found[name] = {key: plain(value) for key, value in found[name].items()}
    return found | {"jax": jax.__version__}
