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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data.languages import CHINESE, base_language
from jaxalign.data.sources import Record
from jaxalign.data.tasks import (
    ANNOTATED,
    INTENT,
    NOTHING,
    Span,
    parse_intent_slots,
    parse_slots,
    slot_spans,
)
from jaxalign.errors import UserError, missing_extra
from jaxalign.evaluate.measure import Gold, Measure, Scored, f1, share

OUTSIDE = "Other"
BY_CHARACTER = {"ja", *CHINESE}
RULES = ("paper", "mended")


class Tagged(NamedTuple):
    """A command in tokens; in the paper's reading the labels may be more or fewer."""

    tokens: list[str]
    labels: list[str]


def score_slots(golds: Sequence[Gold], answers: Sequence[str], *, rules: str = "paper") -> Scored:
    """slot_f1 (main), exact_match (all tags right) and span_f1.

    span_f1 compares (type, case-folded words) as a multiset, whether or not the command has them.
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
    slot_f1, exact, span_f1 = found.measures
    # Both parts of a row hold 0 or 1, so the smaller one says whether both are right.
    whole = replace(exact, parts=np.minimum(exact.parts, accuracy.parts))
    read = [
        {INTENT: intent, "slots": slots} for intent, slots in zip(intents, found.read, strict=True)
    ]
    error = {"exact_match_stderr": _standard_error(whole.value, len(golds))}
    return replace(
        found,
        measures=(slot_f1, whole, span_f1, accuracy),
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


def tag_command(gold: Gold, rules: str = "paper") -> Tagged:
    """The tokens of a command and their labels, 'Other' outside of slots.

    MASSIVE rows (`utt`, `annot_utt`) are read as the paper's code does. Other rows get them from
    `char_spans`, or from searching the words from left to right; there a token also ends where a
    slot begins or ends.
    """
    by_character = _by_character(gold)
    annotated = gold.fields.get("annot_utt")
    if annotated is None or gold.fields.get("slots") is not None:
        return _tag_places(gold.example.prompt, _places(gold)[0], by_character, rules)
    if rules == "mended":
        command, places = _unbracket(annotated)
        return _tag_places(command, places, by_character, rules)
    if by_character:
        return _tag_characters(annotated.split())
    return Tagged(gold.example.prompt.split(), _label_words(annotated.split()))


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
            wanted = [token for chunk in words.split() for token in _characters(chunk)]
        starts = find_words(command.tokens, wanted)
        lost += not starts
        for start in starts:
            labels[start : start + len(wanted)] = [label] * len(wanted)
    return labels[:size], lost


# Reading rows ------------------------------------------------------------------------------------


def _by_character(gold: Gold) -> bool:
    return base_language(gold.language) in BY_CHARACTER


def _characters(chunk: str) -> list[str]:
    return [chunk] if chunk.isascii() else list(chunk)


def _label_words(annotated: Sequence[str]) -> list[str]:
    """The labels of the words between '[type', ':' and 'words]' chunks."""
    labels, label, chunks = [], OUTSIDE, iter(annotated)
    for chunk in chunks:
        if chunk.startswith("["):
            label = chunk.lstrip("[")
            next(chunks, None)  # the colon
            continue
        labels.append(label)
        if chunk.endswith("]"):
            label = OUTSIDE
    return labels


def _tag_characters(annotated: Sequence[str]) -> Tagged:
    """Characters, or ASCII chunks as a whole: those do not end a slot, so its label goes on."""
    tagged = Tagged([], [])
    label, colon = OUTSIDE, False
    for chunk in annotated:
        if chunk.startswith("["):
            label, colon = chunk.lstrip("["), True
        elif chunk == ":" and colon:
            colon = False
        elif chunk.isascii():
            _append(tagged, [chunk.rstrip("]")], label)
        else:
            *pieces, rest = chunk.split("]")
            for piece in pieces:
                _append(tagged, piece, label)
                label = OUTSIDE
            _append(tagged, rest, label)
    return tagged


def _append(tagged: Tagged, tokens: Iterable[str], label: str) -> None:
    before = len(tagged.tokens)
    tagged.tokens.extend(tokens)
    tagged.labels.extend([label] * (len(tagged.tokens) - before))


def _unbracket(annotated: str) -> tuple[str, list[tuple[int, int, str]]]:
    """The command without its brackets, and the places of its slots."""
    command, places, last = "", [], 0
    for match in ANNOTATED.finditer(annotated):
        label, _, words = match[1].partition(":")
        command += annotated[last : match.start()]
        places.append((len(command), len(command) + len(words.strip()), label.strip()))
        command, last = command + words.strip(), match.end()
    return command + annotated[last:], places


def _places(gold: Gold) -> tuple[list[tuple[int, int, str]], int]:
    """(start, end, label) of each slot in the command, in order; how many were not found."""
    spans = _gold_spans(gold)
    given = gold.fields.get("char_spans")
    if given is not None and len(given) == len(spans):
        places = [(int(s), int(e), label) for (s, e), (label, _) in zip(given, spans, strict=True)]
        return sorted(places), 0
    command, places, at = gold.example.prompt, [], 0
    for label, words in spans:
        start = command.find(words, at)
        start = command.find(words) if start < 0 else start
        if words and start >= 0:
            at = start + len(words)
            places.append((start, at, label))
    return sorted(places), len(spans) - len(places)


def _tag_places(
    command: str, places: Sequence[tuple[int, int, str]], by_character: bool, rules: str
) -> Tagged:
    """Tokens of the command, cut at the slots' ends, with the labels of the slots."""
    tagged, at, outside = Tagged([], []), 0, OUTSIDE
    for start, end, label in [*places, (len(command), len(command), OUTSIDE)]:
        chunks: list[str] = []
        for text, name in ((command[at:start], outside), (command[max(at, start) : end], label)):
            chunks = text.split()
            for chunk in chunks:
                _append(tagged, _characters(chunk) if by_character else [chunk], name)
        leaks = by_character and rules == "paper" and chunks and chunks[-1].isascii()
        outside = label if leaks else OUTSIDE
        at = max(at, end)
    return tagged


def _gold_spans(gold: Gold) -> list[Span]:
    return slot_spans(Record(dict(gold.fields), gold.example.origin))


# Scoring -----------------------------------------------------------------------------------------


def _score(golds: Sequence[Gold], texts: Sequence[str], rules: str) -> Scored:
    if rules not in RULES:
        raise UserError(f"rules must be one of {', '.join(RULES)}, not {rules!r}")
    counts: Counter[str] = Counter(
        ill_formed=0, ill_formed_rows=0, empty=_empty(texts), not_found=0, gold_not_found=0
    )
    tags, exact, spans, read, places = [], [], [], [], 0
    types: dict[str, np.ndarray] = {}
    for gold, text in zip(golds, texts, strict=True):
        command = tag_command(gold, rules)
        parts, broken = read_parts(text, rules)
        found, lost = predict_labels(command, parts, _by_character(gold), rules)
        counts.update(ill_formed=broken, ill_formed_rows=int(broken > 0), not_found=lost)
        if gold.fields.get("annot_utt") is None:
            counts.update(gold_not_found=_places(gold)[1])
        tags.append(count_types(_entities(command.labels), _entities(found), types))
        exact.append((found == command.labels, 1))
        said = parse_slots(text)
        spans.append(_overlap(_folded(_gold_spans(gold)), _folded(said)))
        read.append([list(span) for span in said])
        places += len(command.labels)
    slot_f1 = Measure("slot_f1", np.array(tags, float), f1)
    exact_match = Measure("exact_match", np.array(exact, float), share)
    span_f1 = Measure("span_f1", np.array(spans, float), f1)
    details: dict[str, Any] = {
        "types": type_scores(types),
        "rules": rules,
        # The paper's code divides by tokens, not by entities: too small, kept to compare.
        "slot_f1_stderr": _standard_error(slot_f1.value, places),
        "exact_match_stderr": _standard_error(exact_match.value, len(golds)),
    }
    return Scored((slot_f1, exact_match, span_f1), tuple(read), dict(counts), details)


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
