"""Slot filling and intents: the paper's F1 over tags, and one that needs no tags.

The answer's words are searched in the command, the words found become BIO tags, and seqeval's
entities of both are compared. With `rules="paper"` (the default) everything is as in the paper's
evaluation, so that its numbers can be compared with:

- every place where the words occur gets the label, later parts over earlier ones; neighbours of
  one label become one entity; case is ignored in the words, not in the label;
- a part must hold ': ' exactly once, else it is ill-formed and says nothing;
- Japanese and Chinese are compared by character. Chunks of ASCII are one token of the command but
  single characters of the answer, so they are never found, and a slot that ends in one leaks its
  label into the words behind it. Gold answers do not score 100: on xSID 77 in ja and zh.

`rules="mended"` drops the last two points. Either way nothing is left out: an empty or broken
answer is an answer without slots.

    found = score_slots(golds, ["datetime: tomorrow; location: New York", "None"])
    found["slot_f1"].value
    found.details["types"]["datetime"]["f1"]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxalign.data.tasks import (
    INTENT,
    NOTHING,
    Span,
    parse_intent_slots,
    parse_slots,
)
from jaxalign.errors import UserError, missing_extra
from jaxalign.evaluate.measure import Gold, Measure, Scored, f1, share
from jaxalign.evaluate.tags import (
    OUTSIDE,
    Tagged,
    characters,
    command_of,
    gold_spans,
    is_by_character,
    places_of,
)
from jaxalign.evaluate.tags import tag_command as tag_command

RULES = ("paper", "mended")


def score_slots(golds: Sequence[Gold], answers: Sequence[str], *, rules: str = "paper") -> Scored:
    """slot_f1 (main), exact_match (all tags right), span_f1, type_f1 and copied.

    span_f1 compares (type, case-folded words) as a multiset, whether or not the command has them.
    type_f1 compares which types a row has, whatever their words. copied is the share of the
    answered slots whose words stand in the command: an answer in another language has none.
    counts: ill_formed (parts), ill_formed_rows, empty (answers), not_found (phrases that are not
    in the command), gold_not_found. details: `types` with precision, recall, f1 (percent) and gold
    (entities) of each slot type, and the standard errors of the paper's code, in percent.

    Raises:
        UserError: unknown rules; seqeval is not installed; a row without slots.
    """
    return _score(golds, answers, rules)


def score_intent_slots(
    golds: Sequence[Gold], answers: Sequence[str], *, rules: str = "paper"
) -> Scored:
    """As `score_slots` behind the intent, then intent_accuracy; exact_match needs both right.

    counts: also no_intent (answers that do not begin with one).

    Raises:
        UserError: as `score_slots`; a row without an intent.
    """
    said = [_split_intent(answer) for answer in answers]
    found = _score(golds, [text for _, text in said], rules)
    intents = [intent for intent, _ in said]
    accuracy = _intent_accuracy(golds, intents)
    slot_f1, exact, *others = found.measures
    # Both parts of a row hold 0 or 1, so the smaller one says whether both are right.
    whole = replace(exact, parts=np.minimum(exact.parts, accuracy.parts))
    read = [
        {INTENT: intent, "slots": slots} for intent, slots in zip(intents, found.read, strict=True)
    ]
    error = {"exact_match_stderr": _standard_error(whole.value, len(golds))}
    return replace(
        found,
        measures=(slot_f1, whole, *others, accuracy),
        read=tuple(read),
        counts={**found.counts, "no_intent": intents.count(""), "empty": _empty(answers)},
        details={**found.details, **error},
    )


def score_intent(golds: Sequence[Gold], answers: Sequence[str]) -> Scored:
    """intent_accuracy; counts: no_intent (answers that do not begin with one), empty.

    Raises:
        UserError: a row without an intent.
    """
    found = [parse_intent_slots(answer).intent for answer in answers]
    counts = {"no_intent": found.count(""), "empty": _empty(answers)}
    return Scored((_intent_accuracy(golds, found),), tuple(found), counts)


def find_words(tokens: Sequence[str], words: Sequence[str]) -> list[int]:
    """Where the words begin in the tokens, case ignored; no words are nowhere."""
    wanted = [word.lower() for word in words]
    lowered = [token.lower() for token in tokens]
    return [
        start
        for start in range(len(lowered))
        if wanted and lowered[start : start + len(wanted)] == wanted
    ]


def to_bio(labels: Sequence[str]) -> list[str]:
    """BIO tags of runs of labels: ['time', 'time', 'Other'] -> ['B-time', 'I-time', 'O']."""
    before = [OUTSIDE, *labels]
    return [
        "O" if label == OUTSIDE else f"{'I' if label == last else 'B'}-{label}"
        for last, label in zip(before, labels, strict=False)
    ]


# Reading answers ---------------------------------------------------------------------------------


def _split_intent(answer: str) -> tuple[str, str]:
    """The intent of an answer, '' where it names none, and the text of its slots."""
    intent = parse_intent_slots(answer).intent
    if not intent:
        return "", answer
    return intent, answer.strip().partition("; ")[2].strip() or NOTHING


def read_parts(text: str, rules: str = "paper") -> tuple[list[Span], int]:
    """(label, words) of an answer's parts, and how many parts are ill-formed."""
    text = text.strip()
    if text.lower() == NOTHING.lower():
        return [], 0
    parts = text.split("; ")
    # 'time: 5: 30' says nothing in the paper; mended, the first ': ' ends the type.
    split = [part.split(": ", maxsplit=1 if rules == "mended" else -1) for part in parts]
    fine = [(part[0], part[1]) for part in split if len(part) == 2]
    return fine, len(parts) - len(fine)


def predict_labels(
    command: Tagged, spans: Sequence[Span], by_character: bool, rules: str = "paper"
) -> tuple[list[str], int]:
    """The label of each token after searching the spans' words, and how many were not found."""
    size, lost = len(command.labels), 0
    labels = [OUTSIDE] * size
    for label, words in spans:
        if not by_character:
            wanted = words.split()
        elif rules == "paper":
            wanted = list(words)
        else:
            wanted = [token for chunk in words.split() for token in characters(chunk)]
        starts = find_words(command.tokens, wanted)
        lost += not starts
        for start in starts:
            labels[start : start + len(wanted)] = [label] * len(wanted)
    return labels[:size], lost


# Scoring -----------------------------------------------------------------------------------------


def _score(golds: Sequence[Gold], texts: Sequence[str], rules: str) -> Scored:
    if rules not in RULES:
        raise UserError(f"rules must be one of {', '.join(RULES)}, not {rules!r}")
    counts: Counter[str] = Counter(
        ill_formed=0, ill_formed_rows=0, empty=_empty(texts), not_found=0, gold_not_found=0
    )
    tags, exact, spans, kinds, copied, read, places = [], [], [], [], [], [], 0
    types: dict[str, np.ndarray] = {}
    for gold, text in zip(golds, texts, strict=True):
        command = tag_command(gold, rules)
        parts, broken = read_parts(text, rules)
        found, lost = predict_labels(command, parts, is_by_character(gold), rules)
        counts.update(ill_formed=broken, ill_formed_rows=int(broken > 0), not_found=lost)
        if gold.fields.get("annot_utt") is None:
            counts.update(gold_not_found=places_of(gold)[1])
        tags.append(count_types(_entities(command.labels), _entities(found), types))
        exact.append((found == command.labels, 1))
        said = parse_slots(text)
        right, answered = _folded(gold_spans(gold)), _folded(said)
        spans.append(_overlap(right, answered))
        kinds.append(_overlap(_kinds(right), _kinds(answered)))
        copied.append(_copied(command_of(gold).casefold(), answered))
        read.append([list(span) for span in said])
        places += len(command.labels)
    slot_f1 = Measure("slot_f1", np.array(tags, float), f1)
    exact_match = Measure("exact_match", np.array(exact, float), share)
    others = (
        Measure("span_f1", np.array(spans, float), f1),
        Measure("type_f1", np.array(kinds, float), f1),
        Measure("copied", np.array(copied, float), share),
    )
    details: dict[str, Any] = {
        "types": type_scores(types),
        "rules": rules,
        # The paper's code divides by tokens, not by entities: too small, kept to compare.
        "slot_f1_stderr": _standard_error(slot_f1.value, places),
        "exact_match_stderr": _standard_error(exact_match.value, len(golds)),
    }
    return Scored((slot_f1, exact_match, *others), tuple(read), dict(counts), details)


def _entities(labels: Sequence[str]) -> Counter:
    """seqeval's (type, first, last) of a row."""
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError:
        raise missing_extra("seqeval", "eval") from None
    return Counter(set(get_entities(to_bio(labels))))


def count_types(
    gold: Counter, found: Counter, types: dict[str, np.ndarray]
) -> tuple[int, int, int]:
    """(right, predicted, gold) of a row's (type, ...) items; adds them to `types` by type."""
    for column, items in enumerate((gold & found, found, gold)):
        for item, number in items.items():
            types.setdefault(item[0], np.zeros(3))[column] += number
    return _overlap(gold, found)


def _overlap(gold: Counter, found: Counter) -> tuple[int, int, int]:
    return (gold & found).total(), found.total(), gold.total()


def _folded(spans: Sequence[Span]) -> Counter:
    return Counter((kind, words.casefold()) for kind, words in spans)


def _kinds(spans: Counter) -> Counter:
    return Counter({kind for kind, _ in spans})


def _copied(command: str, spans: Counter) -> tuple[int, int]:
    """How many different spans have words of the command, and how many there are."""
    return sum(words in command for _, words in spans), len(spans)


def type_scores(types: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """precision, recall and f1 in percent, and gold, of each type's (right, predicted, gold)."""
    return {
        kind: {
            "precision": float(share(sums[[0, 1]])),
            "recall": float(share(sums[[0, 2]])),
            "f1": float(f1(sums)),
            "gold": int(sums[2]),
        }
        for kind, sums in sorted(types.items())
    }


def _standard_error(percent: float, tries: int) -> float:
    ratio = percent / 100
    return 100 * math.sqrt(ratio * (1 - ratio) / tries) if tries else 0.0


def _intent(gold: Gold) -> str:
    name = gold.fields.get(INTENT)
    if name is None:
        raise UserError(f"{gold.example.origin}: this row has no {INTENT!r} to judge against")
    return str(name).strip()


def _intent_accuracy(golds: Sequence[Gold], found: Sequence[str]) -> Measure:
    hits = [(_intent(gold) == name, 1) for gold, name in zip(golds, found, strict=True)]
    return Measure("intent_accuracy", np.array(hits, float), share)


def _empty(answers: Sequence[str]) -> int:
    return sum(not answer.strip() for answer in answers)
