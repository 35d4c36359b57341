"""What a finished trial is worth: its answers scored, its states compared, its cost.

scores = answers(study, outcome, 'intents', bases)       # language -> Scored
states = shape(study, outcome, bases)                    # score -> [L+1], kept on disk
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from jaxalign.checksums import read_sealed, seal
from jaxalign.compare.study import Study
from jaxalign.compare.trial import Bases, Outcome
from jaxalign.evaluate.entrants import Entrant
from jaxalign.evaluate.measure import Scored
from jaxalign.evaluate.run import scored
from jaxalign.paths import whole_file
from jaxalign.probe.corpus import read_parallel
from jaxalign.probe.preflight import folder_of
from jaxalign.probe.run import Probed, measure_corpora, weights_of
from jaxalign.probe.states import corpus_tokens, token_digest
from jaxalign.probe.table import keyed
from jaxalign.settings import Config

STATES = "standardised"
FOUND = ("csls", keyed("csls", STATES))  # retrieval, by raw states and by standardised ones
SHAPE = ("spread", "dimension", "isoscore")  # whether states have collapsed


def answers(
    study: Study,
    outcome: Outcome,
    evaluation: str,
    bases: Bases,
    words: tuple[str, ...] = (),
    root: str = "answers",
) -> dict[str, Scored]:
    """The scores of a trial by language; what is answered already is read again.

    Args:
      words: settings over the evaluation's.
      root: folder of the answers in the output.
    """
    config = asked(study, outcome, (*study.evaluations[evaluation], *words))
    place = outcome.trial.place(Path(study.output, root, evaluation))
    entrant = Entrant("answers", outcome.adapter)
    return scored(config, [entrant], str(place), bases.under(config))["answers"][0]


def asked(study: Study, outcome: Outcome, words: tuple[str, ...]) -> Config:
    """The settings by which a trial answers: its own, and those of the evaluation over them."""
    as_trained, own = outcome.speaker, outcome.config
    stage = study.systems[as_trained.system][-1]
    return stage.config([*as_trained.candidate, *words, f"output={json.dumps(own.output)}"])


def shape(study: Study, outcome: Outcome | None, bases: Bases) -> dict[str, Any]:
    """Retrieval and collapse of every layer of a trial, or of the bare base; {} without text.

    Returns:
      `csls`, `standardised_csls`: share of sentences that find their translation, mean over all
      directions; `spread`, `dimension`, `isoscore` as in `probe.collapse.Collapse`; each [L+1].
    """
    texts = study.texts
    if texts is None:
        return {}
    corpora = read_parallel(texts.parallel, texts.languages, texts.rows)
    config = outcome.config if outcome else study.base.config()
    base = bases.under(config)
    name = outcome.trial.place("").as_posix() if outcome else "base"
    adapter = outcome.adapter if outcome else ""
    file = Path(study.output, "states", f"{name}.json")
    identity = {
        **weights_of(base, adapter),
        "tokens": [token_digest(corpus_tokens(base, corpus)) for corpus in corpora],
        "pooling": texts.pooling,
    }
    if (known := read_sealed(file)) and known["of"] == identity:
        return known["layers"]
    vectors = file.with_suffix(".vectors")
    table = measure_corpora(
        base, corpora, [Probed(folder_of(name), adapter)], str(vectors),
        poolings=(texts.pooling,), pivot=_pivot(corpora), states_as=(STATES,),
    )  # fmt: skip
    layers: dict[str, Any] = {score: table.curve(score, 0, 0).tolist() for score in FOUND}
    layers |= {score: table.health[score][0, 0].tolist() for score in SHAPE}
    with whole_file(file) as new:
        new.write_text(json.dumps(seal({"of": identity, "layers": layers}), indent=1) + "\n")
    shutil.rmtree(vectors, ignore_errors=True)
    return layers


def _pivot(corpora: list[Any]) -> str:
    have = {language for corpus in corpora for language in corpus.languages}
    return "en" if "en" in have else min(have)
