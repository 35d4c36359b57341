"""Tasks: a record becomes a prompt and an answer, and an answer becomes a structure again.

`TASKS` has one row per kind, with all that is said of it but its scorer, which `evaluate` knows
(`evaluate/scorers.py`). The answers are plain text a model can write:

    slots         datetime: tomorrow; location: New York        (None where there are none)
    intent        intent: weather/find
    intent_slots  intent: weather/find; datetime: tomorrow      (the intent first, then the slots)
    ner           {"Results": [{"TypeName": "LOC", "Text": "Tampa Bay"}]}
    choice        the text of the right choice
    text          the text: there is no prompt, every token is trained

    example = TASKS["slots"].render(record)
    example.answer                              # 'datetime: tomorrow'
    TASKS["slots"].parse(example.answer)        # [('datetime', 'tomorrow')]
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxalign.bounds import check_text
from jaxalign.data.annotated import whole_annotated
from jaxalign.data.choice import choice
from jaxalign.data.example import Example as Example
from jaxalign.data.fields import language_of, string_of, text_of, value_of
from jaxalign.data.fusion import fuse
from jaxalign.data.languages import language_name
from jaxalign.data.sources import Record
from jaxalign.errors import UserError, brief

INTENT = "intent"
NOTHING = "None"  # the answer of a row without slots
BETWEEN = "; "  # the parts of an answer

Span = tuple[str, str]  # (type, words)


class Command(NamedTuple):
    """What an intent_slots answer says."""

    intent: str  # '' where the answer names none
    slots: list[Span]


@dataclass(frozen=True)
class Task:
    """One kind of task."""

    words: str  # what a model card calls it
    render: Callable[[Record], Example]
    parse: Callable[[str], Any]
    blank: Mapping[str, object]  # the fields of an answer, for a row that is asked without one
    asked: str | None  # the field that a prompt of the command line fills; None: it is not enough
    copied: bool = False  # whether answers are words of the row's own text
    directed: bool = False  # whether a row's language is the direction of a translation, 'de-en'


SLOTS_SYSTEM = (
    "Find the slots in the user's command. Write each one as type: words, with the words copied "
    "from the command, and put a semicolon between them. Write None if there are none."
)
INTENT_SYSTEM = "Say what the user's command intends. Write intent: and its name."
INTENT_SLOTS_SYSTEM = (
    "Say what the user's command intends, then find its slots. Write intent: and its name first, "
    "then each slot as type: words, with the words copied from the command, and put a semicolon "
    "between all parts."
)
TRANSLATION_SYSTEM = (
    "Translate the user's text from {source_language} into {target_language}. "
    "Write the translation only."
)
NER_SYSTEM = (
    "Find the names of persons (PER), organisations (ORG) and places (LOC) in the user's text. "
    'Answer in JSON: {"Results": [{"TypeName": "LOC", "Text": "words from the text"}]}, '
    "with an empty list if there are none."
)


# Rendering ---------------------------------------------------------------------------------------


def _rows(record: Record) -> Example:
    return Example(
        prompt="" if record.fields.get("prefix") is None else string_of(record, "prefix"),
        answer=string_of(record, "text"),
        language=language_of(record),
        origin=record.origin,
    )


def _span(record: Record, item: Any) -> Span:
    """(type, words) of [type, words, ...] or of a dict with a type and words in it."""
    if isinstance(item, Mapping):
        kind = item.get("type", item.get("label", item.get("TypeName")))
        words = item.get("text", item.get("words", item.get("Text")))
    elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
        kind, words = (*item, None, None)[:2]
    else:  # 'ab' is two letters, not a type and its words
        kind, words = None, None
    if not isinstance(kind, str) or not isinstance(words, str):
        raise UserError(f"{record.origin}: {brief(item)} is not a [type, words] pair")
    for text in (kind, words):
        check_text(record.origin, text)
    if not kind.strip() or not words.strip():
        raise UserError(
            f"{record.origin}: {brief(item)} has no {'words' if kind.strip() else 'type'}; fill it "
            "or remove it"
        )
    return kind, words


def _spans(record: Record, items: Any) -> list[Span]:
    """Spans of a list of them, or of a dict of columns, as hub and TFDS sequences come."""
    if isinstance(items, Mapping):
        columns = list(items.values())
        if not all(isinstance(column, list | tuple) for column in columns) or (
            len({len(column) for column in columns}) > 1
        ):
            raise UserError(
                f"{record.origin}: {brief(items)} is neither a list of [type, words] nor columns "
                "of equal length"
            )
        items = [dict(zip(items, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise UserError(f"{record.origin}: {brief(items)} is not a list of [type, words] pairs")
    return [_span(record, item) for item in items]


def slot_spans(record: Record) -> list[Span]:
    """The (type, words) of a row: its `slots`, its `annot_utt` or its ready `target`.

    Without blanks around either, as `parse_slots` reads them from an answer.

    Raises:
        UserError: none of them is there, or it is not what it should be.
    """
    fields = record.fields
    if fields.get("slots") is not None:
        return [(kind.strip(), words.strip()) for kind, words in _spans(record, fields["slots"])]
    if fields.get("annot_utt") is not None:
        parts = (part.partition(":") for part in _annotations(record))
        return [(kind.strip(), words.strip()) for kind, _, words in parts]
    return parse_slots(string_of(record, "target"))


def _annotations(record: Record) -> list[str]:
    return whole_annotated(text_of(record, "annot_utt"), record.origin)


def entity_spans(record: Record) -> list[Span]:
    """The (type, text) of a row's `entities`.

    Raises:
        UserError: there are none, or one is not [type, text, ...].
    """
    return _spans(record, value_of(record, "entities"))


def format_slots(spans: Sequence[Span]) -> str:
    """'type: words; type: words', or 'None'."""
    return BETWEEN.join(f"{kind}: {words}" for kind, words in spans) or NOTHING


def _answer(record: Record, spans: Sequence[Span]) -> str:
    """`format_slots` of a row's slots, which `parse_slots` gives back."""
    answer = format_slots(spans)
    if parse_slots(answer) != list(spans):
        lost = next(span for span in spans if parse_slots(format_slots([span])) != [span])
        raise UserError(
            f"{record.origin}: the slot {brief(list(lost))} cannot be read back from an answer, "
            f"where {BETWEEN!r} ends its words and the first ': ' its type, so that no answer "
            "could be right; name its type without them, and make two slots of such words or "
            "change them in the row's text, too"
        )
    return answer


def _slots(record: Record) -> Example:
    # A ready target is taken as it is, so that any wording of one's own survives.
    target = record.fields.get("target")
    if target is None and record.fields.get("slots") is None and "annot_utt" in record.fields:
        # Not by way of spans: the paper keeps the blanks of an annotation as they are.
        target = BETWEEN.join(_annotations(record)) or NOTHING
    elif target is not None:
        target = string_of(record, "target")
    return Example(
        prompt=text_of(record, "utterance", "utt"),
        answer=target if target is not None else _answer(record, slot_spans(record)),
        language=language_of(record),
        system=SLOTS_SYSTEM,
        origin=record.origin,
    )


def _intent(record: Record, spans: Sequence[Span] = (), system: str = INTENT_SYSTEM) -> Example:
    return Example(
        prompt=text_of(record, "utterance", "utt"),
        answer=_answer(record, [(INTENT, _intent_name(record)), *spans]),
        language=language_of(record),
        system=system,
        origin=record.origin,
    )


def _intent_name(record: Record) -> str:
    name = value_of(record, "intent")
    # A class without a name is a number.
    name = str(name) if type(name) is int else text_of(record, "intent")
    if BETWEEN in name:
        raise UserError(
            f"{record.origin}: the intent {brief(name)} contains {BETWEEN!r}, which ends it in an "
            "answer, so that no answer could be right; give it another name"
        )
    return name.strip()


def _intent_slots(record: Record) -> Example:
    spans, target = slot_spans(record), record.fields.get("target")
    read_from = record.fields.get("slots"), record.fields.get("annot_utt")
    if read_from == (None, None) and isinstance(target, str):
        # What a model writes is read leniently; of a row's own answer no part may be lost.
        lost = next((part for part in _parts(target) if ": " not in part), None)
        if lost is not None:
            raise UserError(
                f"{record.origin}: {brief(lost)} of 'target' is not 'type: words' and would be "
                "lost; write 'type: words; type: words' or None"
            )
    return _intent(record, spans, INTENT_SLOTS_SYSTEM)


def _translation(record: Record) -> Example:
    sides = record.fields.get("translation")
    if isinstance(sides, Mapping) and len(sides) == 2 and "src" not in record.fields:
        source, target = sides  # the order of the data: {"cs": ..., "en": ...} is cs -> en
        fields = {"src": sides[source], "tgt": sides[target], "src_lang": source}
        fields |= {"tgt_lang": target, **record.fields}
        record = dataclasses.replace(record, fields=fields)
    source, target = (text_of(record, key) for key in ("src_lang", "tgt_lang"))
    return Example(
        prompt=text_of(record, "src"),
        answer=string_of(record, "tgt"),
        language=f"{source}-{target}",
        system=TRANSLATION_SYSTEM,
        names={
            "source_language": language_name(source),
            "target_language": language_name(target),
        },
        origin=record.origin,
    )


def _ner(record: Record) -> Example:
    spans = entity_spans(record)
    return Example(
        prompt=text_of(record, "text"),
        answer=format_entities(spans),
        language=language_of(record),
        system=NER_SYSTEM,
        origin=record.origin,
    )


def _plain_text(record: Record) -> Example:
    """A text without a question; every token of it is predicted."""
    return Example("", string_of(record, "text"), language_of(record), origin=record.origin)


def format_entities(spans: Sequence[Span]) -> str:
    """The paper's JSON: {"Results": [{"TypeName": "LOC", "Text": "..."}]}."""
    results = [{"TypeName": kind, "Text": words} for kind, words in spans]
    return json.dumps({"Results": results}, ensure_ascii=False)


# Parsing -----------------------------------------------------------------------------------------


def parse_slots(answer: str) -> list[Span]:
    """(type, words) of each part of 'type: words; type: words'; 'None' (any case) has none.

    Parts are separated by '; ' and a type ends at its first ': '; a part without one is dropped,
    as a model may write anything.
    """
    parts = (part.partition(": ") for part in _parts(answer))
    return [(kind.strip(), words.strip()) for kind, colon, words in parts if colon]


def _parts(answer: str) -> list[str]:
    answer = answer.strip()
    return [] if answer.lower() == NOTHING.lower() else answer.split(BETWEEN)


def parse_intent_slots(answer: str) -> Command:
    """The intent, which must be the first part, and the slots behind it.

    Only the first part, well-formed or not, can be the intent, so a slot type that is called
    `intent` stays a slot.
    """
    first, _, slots = answer.strip().partition(BETWEEN)
    kind, colon, name = first.partition(": ")
    if colon and kind.strip() == INTENT:
        return Command(name.strip(), parse_slots(slots))
    return Command("", parse_slots(answer))


def parse_entities(answer: str) -> list[Span]:
    """(type, text) of each result, read as kindly as can be without guessing.

    Text around the JSON is passed over. Where no whole {"Results": [...]} is found, as in an answer
    that was cut off, every complete {"TypeName": ..., "Text": ...} counts.
    """
    found = list(_objects(answer))
    for value in found:
        if isinstance(value.get("Results"), list):
            return [span for item in value["Results"] for span in _entity(item)]
    return [span for value in found for span in _entity(value)]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost complete JSON objects in a text, from left to right."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # also of digits or brackets without end
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def _entity(item: Any) -> list[Span]:
    """[(type, text)] of a result, or [] of anything else."""
    if not isinstance(item, Mapping):
        return []
    kind, words = item.get("TypeName"), item.get("Text")
    return [(kind, words)] if isinstance(kind, str) and isinstance(words, str) else []


TASKS: dict[str, Task] = {
    "rows": Task(
        "rows with prompts of their own", _rows, str.strip, blank={"text": "-"}, asked="prefix"
    ),
    "slots": Task(
        "slot filling", _slots, parse_slots, blank={"slots": []}, asked="utterance", copied=True
    ),
    "intent": Task(
        "intent classification",
        _intent,
        parse_intent_slots,
        blank={"intent": "-"},
        asked="utterance",
    ),
    "intent_slots": Task(
        "intents and slots",
        _intent_slots,
        parse_intent_slots,
        blank={"intent": "-", "slots": []},
        asked="utterance",
        copied=True,
    ),
    "translation": Task(
        "translation", _translation, str.strip, blank={"tgt": "-"}, asked=None, directed=True
    ),
    "ner": Task(
        "named entities as JSON",
        _ner,
        parse_entities,
        blank={"entities": []},
        asked="text",
        copied=True,
    ),
    "choice": Task("multiple choice", choice, str.strip, blank={"answer": 0}, asked=None),
    "text": Task("texts, every token of them", _plain_text, str.strip, blank={}, asked=None),
}


def render(kind: str, record: Record) -> Example:
    """The example of a record, checked: an answer without a letter teaches nothing.

    Raises:
        UserError: a field is missing, or the answer is empty; names file:line.
    """
    example = TASKS[kind].render(record)
    if record.companion is not None:
        other = TASKS[kind].render(record.companion.record)
        example = fuse(example, other, record.companion)
    if not example.answer.strip():
        raise UserError(
            f"{record.origin}: the answer is empty, so no token of this row would be trained; "
            "fill it or remove the row"
        )
    return example
