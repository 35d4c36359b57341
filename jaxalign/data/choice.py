"""Multiple choice: a question, what may be answered, and which of it is right.

    {"question": "What is the capital of Wales?", "choices": ["Cardiff", "Bangor"], "answer": 0}
    {"prefix": "Review: so good\\nSentiment: ", "choices": ["good", "bad"], "answer": "good"}

A `prefix` is used letter by letter, without a template. The prompt does not list the choices; the
transform `lettered` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxalign.bounds import check_text
from jaxalign.data.example import Example
from jaxalign.data.fields import language_of, string_of, text_of, value_of
from jaxalign.data.sources import Record
from jaxalign.errors import UserError, brief

CHOICE_SYSTEM = "Answer the question."


def choice(record: Record) -> Example:
    """A `question` with a template, or a `prefix` without one, and the choices after it."""
    choices = choices_of(record)
    asked = "question" in record.fields or "prefix" not in record.fields
    return Example(
        prompt=text_of(record, "question") if asked else string_of(record, "prefix"),
        answer=choices[right_choice(record, choices)],
        language=language_of(record),
        system=CHOICE_SYSTEM if asked else None,
        origin=record.origin,
        choices=choices,
    )


def choices_of(record: Record) -> tuple[str, ...]:
    """The choices of a row.

    Raises:
        UserError: they are not a list of two texts or more.
    """
    found = value_of(record, "choices")
    if isinstance(found, Mapping):  # as hub data sets have them: {"text": [...], "label": [...]}
        found = found.get("text")
    if not isinstance(found, Sequence) or isinstance(found, str | bytes) or len(found) < 2:
        raise UserError(f"{record.origin}: 'choices' should be a list of two texts or more")
    for text in found:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{record.origin}: 'choices' holds {brief(text)}, which is not a text")
        check_text(f"{record.origin}: 'choices'", text)
    return tuple(found)


def right_choice(record: Record, choices: Sequence[str]) -> int:
    """The number of the right choice, from 0: `answer` is this number, or the choice's text.

    Raises:
        UserError: it is neither.
    """
    answer = value_of(record, "answer")
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    if answer in choices:
        return choices.index(answer)
    raise UserError(
        f"{record.origin}: 'answer' should be the text of a choice, or its number from 0 to "
        f"{len(choices) - 1}, not {brief(answer)}"
    )
