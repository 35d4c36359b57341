"""`jaxalign probe`: states of parallel text from every layer, and all that they say.

table = probe(config, 'data/ntrex', [Probed('base'), Probed('aligned', 'runs/aligned/adapter')],
              out='report')
choose_layer(table)                # Choice(layer=14, score=0.83, ...)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxalign.base import Base, open_base
from jaxalign.data.languages import find_language
from jaxalign.generate import System
from jaxalign.hf.peft import weights_digest
from jaxalign.probe.choice import Choice, as_json, choose_layer
from jaxalign.probe.corpus import Parallel, read_parallel
from jaxalign.probe.items import Items, measure_items, read_items, readable
from jaxalign.probe.measure import join, measure
from jaxalign.probe.neurons import measure_neurons
from jaxalign.probe.pool import pool_note
from jaxalign.probe.preflight import Probed, check, check_systems, folder_of
from jaxalign.probe.states import cut_sentences, store_states
from jaxalign.probe.table import Table
from jaxalign.probe.tasks import Names, read_scores
from jaxalign.settings import Config
from jaxalign.terminal import bars, say

__all__ = [
    "Choice", "Probed", "as_json", "check_systems", "choose_layer", "measure_corpora", "probe",
    "weights_of",
]  # fmt: skip


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
    states_as: Sequence[str] = ("raw", "standardised"),
    scores: str = "",
) -> Table:
    """Measures every layer of every system on parallel text.

    Args:
      config: `model.*`, `mesh.*`, `generate.adapter` and `generate.batch` are read.
      parallel: folder, file or dataset; see `read_parallel`.
      systems: the bare base and adapters.
      out: folder; the vectors are in `out/states/SYSTEM` and are used again.
      poolings: of `jaxalign.probe.states.POOLINGS`.
      languages: keep only these.
      rows: keep only the first sentences; 0: all.
      pivot: the language that MEXA, CKA and neighbours compare with.
      dtype: of the vectors on disk, float32 or float16.
      width: principal directions kept for retrieval; None: exact.
      neurons: sentences whose feed-forward neurons are compared, too; 0: none.
      items: task items in several languages for DALI, see `read_items`; empty: none.
      states_as: forms in which states are compared, see `jaxalign.probe.forms`; raw is always one.
      scores: file of task scores for `read_scores`; it is checked here, before the model is loaded.

    Raises:
      UserError: bad text, adapters, files or settings; refused before any weights are loaded.
    """
    corpora = read_parallel(parallel, languages, rows, pivot)
    have = sorted({name for corpus in corpora for name in corpus.languages})
    pivot = find_language(pivot, have)
    if scores:
        read_scores(scores, Names(tuple(s.name for s in systems), tuple(have), pivot))
    return measure_corpora(
        open_base(config), corpora, systems, out, poolings=poolings, pivot=pivot, dtype=dtype,
        width=width, neurons=neurons, items=read_items(items, have) if items else None,
        states_as=states_as,
    )  # fmt: skip


def measure_corpora(
    base: Base,
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
    states_as: Sequence[str] = ("raw", "standardised"),
) -> Table:
    """As `probe`, on text and items that are already read."""
    forms = ("raw", *(form for form in states_as if form != "raw"))
    check(base, corpora, systems, out, poolings=poolings, pivot=pivot, dtype=dtype, forms=forms,
          width=width, neurons=neurons, items=items)  # fmt: skip
    items = readable(base, items) if items else None
    config = base.config
    parts = []
    asked: list[dict[str, dict[str, np.ndarray]]] = []  # of each system: score -> language -> [L+1]
    with bars(mode=config.log.progress) as bar:
        more = sum(min(neurons, len(corpus)) * len(corpus.sentences) for corpus in corpora)
        more += sum(len(options) for rows in (items or {}).values() for options in rows)
        task = bar.add_task("states", total=(_sentences(corpora) + more) * len(systems))

        def sentences(count: int) -> None:
            bar.advance(task, count)

        stored = []
        notes = [*(note for corpus in corpora for note in corpus.notes),
                 *cut_sentences(base, corpora), *(items.notes if items else ())]  # fmt: skip
        for system in systems:
            weights = base.wear(system.adapter) if system.adapter else base.bare()
            stored.append(
                _states(base, system, weights, corpora, Path(out), poolings, dtype,
                        sentences)
            )  # fmt: skip
            for corpus, states in zip(corpora, stored[-1], strict=True):
                if "mean" in states:
                    notes += pool_note(system.name, weights, corpus.languages, states["mean"][0])
            if bar.disable:  # a log, where the bar would not move
                say(f"{system.name}: {_sentences(corpora):,} sentences read")
            asked.append(
                _asked(base, weights, corpora, pivot, neurons, items, config.generate.batch,
                       sentences)
            )  # fmt: skip
        layers = base.spec.layers + 1
        task = bar.add_task("layers", total=len(systems) * len(corpora) * len(poolings) * layers)
        for number, corpus in enumerate(corpora):
            parts.append(
                measure(
                    corpus,
                    [[one[number][pooling] for pooling in poolings] for one in stored],
                    poolings,
                    pivot,
                    forms,
                    width,
                    lambda: bar.advance(task),
                )
            )
    names = [system.name for system in systems]
    return join(
        config.model.path, names, tuple(poolings), forms, pivot, corpora, parts, asked,
        tuple(notes),
    )  # fmt: skip


def weights_of(base: Base, adapter: str = "") -> dict[str, str]:
    """What the states of a text depend on besides it; `adapter` as in `Probed`."""
    config = base.config
    found = {
        "base": base.fingerprint,
        "adapter": weights_digest(adapter) if adapter else "",
        "weights": config.model.stored,
    }
    # Weights in bfloat16 are rounded again where an adapter is added to them.
    return found | ({"generate.adapter": config.generate.adapter} if adapter else {})


def _sentences(corpora: Sequence[Parallel]) -> int:
    return sum(len(corpus) * len(corpus.sentences) for corpus in corpora)


def _states(
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
    identity = weights_of(base, system.adapter)
    return [
        store_states(
            base,
            weights,
            corpus,
            out / "states" / system.name / ("" if len(corpora) == 1 else folder_of(corpus.name)),
            poolings,
            identity,
            dtype,
            base.config.generate.batch,
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
    sums: dict[tuple[str, str], np.ndarray] = {}  # by score and language, over the corpora
    counts: Counter[tuple[str, str]] = Counter()
    for corpus in corpora:
        if neurons and pivot in corpus.sentences:
            size = min(neurons, len(corpus))
            measured = measure_neurons(base, weights, corpus, pivot, neurons, batch, report)
            for score, rows in measured.items():
                for language, course in rows.items():
                    place = (score, language)
                    sums[place] = sums.get(place, 0) + size * course
                    counts[place] += size
    found: dict[str, dict[str, np.ndarray]] = {}
    for (score, language), total in sums.items():
        found.setdefault(score, {})[language] = total / counts[score, language]
    if items:
        found |= measure_items(base, weights, items, pivot, batch, report)
    return found
