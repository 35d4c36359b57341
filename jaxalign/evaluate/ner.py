"""Entities written as JSON: F1 over (type, text), read kindly, strictly and as the paper does.

found = score_ner(golds, ['{"Results": [{"TypeName": "LOC", "Text": "Oslo"}]}'])
found["entity_f1"].value
found["valid_json"].value
found.details["types"]["LOC"]["f1"]
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.tasks import Span, entity_spans, parse_entities
from jaxalign.evaluate.measure import Gold, Measure, Scored, f1, share
from jaxalign.evaluate.slots import count_types, type_scores

PAPER_ORDER = ("LOC", "PER", "ORG")
PAPER_START = '"Results": ['


def score_ner(golds: Sequence[Gold], answers: Sequence[str]) -> Scored:
    """entity_f1 (main), entity_f1_strict, entity_f1_paper and valid_json.

    All three F1 are micro averages over the multiset of (type, text) of each row, letters as they
    are. entity_f1 reads what `parse_entities` finds, entity_f1_strict only whole valid answers,
    entity_f1_paper what the paper's reader finds. counts: invalid_json, paper_unreadable (where
    the paper's code stops with an error), empty. details: `types` of entity_f1.

    Raises:
        UserError: a row without entities.
    """
    gold = [_bag(entity_spans(row.record)) for row in golds]
    kind = [parse_entities(answer) for answer in answers]
    strict = [parse_strict(answer) for answer in answers]
    paper = [parse_paper(answer) for answer in answers]
    types: dict[str, np.ndarray] = {}
    measures = (
        _f1("entity_f1", gold, kind, types),
        _f1("entity_f1_strict", gold, strict, {}),
        _f1("entity_f1_paper", gold, paper, {}),
        Measure("valid_json", np.array([(r is not None, 1) for r in strict], float), share),
    )
    counts = {
        "invalid_json": strict.count(None),
        "paper_unreadable": paper.count(None),
        "empty": sum(not answer.strip() for answer in answers),
    }
    read = tuple([list(span) for span in spans] for spans in kind)
    return Scored(measures, read, counts, {"types": type_scores(types)})


def parse_strict(answer: str) -> list[Span] | None:
    """(type, text) of an answer that is exactly {"Results": [{"TypeName", "Text"}, ...]}, or None.

    Blanks around it and the order of the two keys are free; anything else makes it invalid.
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):  # also of digits or brackets without end
        return None
    results = value.get("Results") if isinstance(value, dict) and len(value) == 1 else None
    if not isinstance(results, list) or not all(map(_is_result, results)):
        return None
    return [(item["TypeName"], item["Text"]) for item in results]


def parse_paper(answer: str) -> list[Span] | None:
    """(type, text) as the paper's code reads them: all LOC, then all PER, then all ORG.

    Other types, a "Text" before its "TypeName" and texts without a letter are passed over; a text
    ends at its first quotation mark, escaped or not. None where that code stops with an error:
    there is no '"Results": ['.
    """
    parts = answer.strip().split(PAPER_START)
    if len(parts) == 1:
        return None
    return [
        (kind, words)
        for kind in PAPER_ORDER
        for words in re.findall(rf'"TypeName": "{kind}",\s*"Text": "([^"]+)"', parts[1])
    ]


def _is_result(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == {"TypeName", "Text"}
        and all(isinstance(value, str) for value in item.values())
    )


def _bag(spans: Sequence[Span]) -> Counter:
    return Counter((kind, words) for kind, words in spans)


def _f1(
    name: str,
    gold: Sequence[Counter],
    found: Sequence[Sequence[Span] | None],
    types: dict[str, np.ndarray],
) -> Measure:
    parts = [
        count_types(have, _bag(spans or []), types) for have, spans in zip(gold, found, strict=True)
    ]
    return Measure(name, np.array(parts, float), f1)
