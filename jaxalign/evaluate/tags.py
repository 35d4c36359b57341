"""A command in tokens with the labels of its slots, as the paper's code cuts it or mended.

tag_command(gold)                    # Tagged(tokens=['wake', 'me', 'at', 'nine'], labels=[...])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from unicodedata import category

from jaxalign.data.annotated import ANNOTATED
from jaxalign.data.fields import text_of
from jaxalign.data.languages import CHINESE, base_language
from jaxalign.data.tasks import Span, slot_spans
from jaxalign.errors import UserError
from jaxalign.evaluate.measure import Gold

OUTSIDE = "Other"
BY_CHARACTER = {"ja", *CHINESE}


class Tagged(NamedTuple):
    """A command in tokens; in the paper's reading the labels may be more or fewer."""

    tokens: list[str]
    labels: list[str]


def tag_command(gold: Gold, rules: str = "paper") -> Tagged:
    """The tokens of a command and their labels, 'Other' outside of slots.

    MASSIVE rows (`utt`, `annot_utt`) are read as the paper's code does. Other rows get them from
    `char_spans`, or from searching the words from left to right, first those that are no part of
    other words; there a token also ends where a slot begins or ends.
    """
    by_character = is_by_character(gold)
    annotated = gold.fields.get("annot_utt")
    if annotated is None or gold.fields.get("slots") is not None:
        return _tag_places(command_of(gold), places_of(gold)[0], by_character, rules)
    if rules == "mended":
        command, places = _unbracket(annotated)
        return _tag_places(command, places, by_character, rules)
    if by_character:
        return _tag_characters(annotated.split())
    return Tagged(command_of(gold).split(), _label_words(annotated.split()))


def command_of(gold: Gold) -> str:
    """The row's own text, in which words are searched: its prompt may hold another row's, too."""
    return text_of(gold.record, "utterance", "utt")


def is_by_character(gold: Gold) -> bool:
    """Whether this row's language is compared by character."""
    return base_language(gold.language) in BY_CHARACTER


def characters(chunk: str) -> list[str]:
    """Tokens of a chunk: its characters, or the whole of ASCII."""
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


def places_of(gold: Gold) -> tuple[list[tuple[int, int, str]], int]:
    """(start, end, label) of each slot in the command, in order; how many were not found."""
    spans = gold_spans(gold)
    given = gold.fields.get("char_spans")
    if given is not None:
        return _given_places(gold, given, spans), 0
    command, places, at = command_of(gold), [], 0
    for label, words in spans:
        starts = _starts(command, words, is_by_character(gold))
        if starts:
            start = next((start for start in starts if start >= at), starts[0])
            at = start + len(words)
            places.append((start, at, label))
    return sorted(places), len(spans) - len(places)


def _starts(command: str, words: str, by_character: bool) -> list[int]:
    """Where the words begin; those within other words, as '1' in '10', only if there are no others.

    Of a language that is compared by character all: nothing there says where a word ends.
    """
    every = [m.start() for m in re.finditer(f"(?={re.escape(words)})", command)] if words else []
    whole = [at for at in every if not _within(command, at, at + len(words))]
    return every if by_character else whole or every


def _within(command: str, *places: int) -> bool:
    """Whether one of these places has letters or digits, or marks of them, on both of its sides."""
    sides = (command[at - 1 : at + 1] for at in places if 0 < at < len(command))
    return any(all(one.isalnum() or category(one)[0] == "M" for one in side) for side in sides)


def _given_places(gold: Gold, given: Any, spans: Sequence[Span]) -> list[tuple[int, int, str]]:
    """The places that a row itself names, at which its slots' words must stand."""
    command, places = command_of(gold), []
    pairs = given if isinstance(given, list) else []
    for pair, (label, words) in zip(pairs, spans, strict=False):
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair)
        if whole and pair[0] >= 0 and command[pair[0] : pair[1]].strip() == words:
            places.append((pair[0], pair[1], label))
    if len(places) != len(spans) or len(pairs) != len(spans):
        raise UserError(
            f"{gold.example.origin}: 'char_spans' must give, for each slot in order, the start "
            "and end of its words in the utterance; correct it, or remove it to have the words "
            "searched for"
        )
    return sorted(places)


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
                _append(tagged, characters(chunk) if by_character else [chunk], name)
        leaks = by_character and rules == "paper" and chunks and chunks[-1].isascii()
        outside = label if leaks else OUTSIDE
        at = max(at, end)
    return tagged


def gold_spans(gold: Gold) -> list[Span]:
    """(type, words) of the row's slots."""
    return slot_spans(gold.record)
