"""What the demo measures: who finds whom in each layer, and which commands are understood.

rows = read_rows(assets, 'test', LANGUAGES)             # {'de': {'test-0': row}}
retrieval(base, base.bare(), rows)                      # {'de': [layer 0, ..., layer L]}
scores(base, base.wear(adapter), rows)                  # {'intent_accuracy': {'de': 41.2}}
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jaxalign.base import Base, decoding_of
from jaxalign.data.files import text_lines
from jaxalign.data.sources import Record
from jaxalign.data.tasks import render
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.scorers import SCORERS
from jaxalign.generate import System
from jaxalign.probe.retrieval import retrieval as retrieve
from jaxalign.probe.states import pooled_states

BATCH = 125
Rows = dict[str, dict[str, dict]]  # language -> id -> row


def read_rows(assets: Path, split: str, languages: tuple[str, ...]) -> Rows:
    """The rows of one split, by language and by the id that translations share."""
    found: Rows = {}
    for language in languages:
        lines = text_lines(assets / "data" / f"{split}.{language}.jsonl")
        rows = [json.loads(line) for line in lines]
        found[language] = {row["id"]: row for row in rows}
    return found


def retrieval(base: Base, system: System, rows: Rows) -> dict[str, list[float]]:
    """Top-1 retrieval between each language and English by cosine, mean of both ways, per layer.

    Returns:
      Language -> share of sentences that find their translation, layer 0 (embeddings) to L.
    """
    flat = [(language, key) for language, part in rows.items() for key in part]
    texts = [rows[language][key]["utterance"] for language, key in flat]
    states = pooled_states(base, system, texts, batch_size=BATCH)["mean"]  # [L+1, rows, D]
    place = {name: at for at, name in enumerate(flat)}
    found = {}
    for language in rows:
        if language == "en":
            continue
        shared = sorted(rows["en"].keys() & rows[language].keys())
        sides = [[place[one, key] for key in shared] for one in (language, "en")]
        shares = [retrieve(layer[np.array(sides)], ("cosine",))["cosine"] for layer in states]
        found[language] = [float(np.nanmean(share)) for share in shares]
    return found


def scores(base: Base, system: System, rows: Rows) -> dict[str, dict[str, float]]:
    """The measures of the configured task on greedily generated answers, by language, percent."""
    kind = base.config.task.kind
    golds = {
        language: [
            Gold(render(kind, Record(row, f"{language}:{key}")), row, key, language)
            for key, row in part.items()
        ]
        for language, part in rows.items()
    }
    asked = [gold.example for part in golds.values() for gold in part]
    prompts, _ = base.encode(asked, system.prompts, system.decoder.adapter)
    answers = iter(base.decode(system.write(prompts, decoding_of(base.config), BATCH)))
    found: dict[str, dict[str, float]] = {}
    for language, part in golds.items():
        scored = SCORERS[kind](part, [next(answers) for _ in part])
        for measure in scored.measures:
            found.setdefault(measure.name, {})[language] = measure.value
    return found
