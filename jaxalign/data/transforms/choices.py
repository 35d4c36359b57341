"""Multiple choice out of other rows, and in other forms.

    - {name: choices, options: {question: utterance, answer: intent, number: 4}}
    - {name: mixup, options: {languages: [en, fr, de, es, it]}}
    - lettered

`choices` draws wrong answers from those of other rows, the same for all translations of an item.
`mixup` is the mixed-language multiple choice of Chua et al. 2024 (arXiv 2406.16135): for each item
one permutation of the languages over the question and its options, so that no two share one;
`what` has the other forms of their code, in which only these parts are translated. `lettered` lists
the choices in the question as A, B, C, ..., which then are the choices.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxalign.bounds import setting
from jaxalign.data.choice import choices_of, right_choice
from jaxalign.data.fields import text_of, value_of
from jaxalign.data.sources import Record
from jaxalign.data.transforms.options import read
from jaxalign.data.transforms.parallel import by_item, check_known
from jaxalign.errors import UserError

LETTERS = string.ascii_uppercase
# What is translated -> places of a row: 0 is the question, n + 1 is choice n.
WHAT: dict[str, Callable[[int, int], set[int]]] = {
    "all": lambda number, right: set(range(number + 1)),
    "question": lambda number, right: {0},
    "options": lambda number, right: set(range(1, number + 1)),
    "right": lambda number, right: {right + 1},
    "right_question": lambda number, right: {0, right + 1},
    "wrong": lambda number, right: set(range(1, number + 1)) - {right + 1},
}


@dataclass
class Choices:
    """Options of `choices`."""

    question: str = setting("utterance", "the field that asks")
    answer: str = setting("intent", "the field with the right answer")
    number: int = setting(4, "choices of a row", lowest=2)
    form: str = setting("{}", "how an answer is written: `intent: {}`")


@dataclass
class Mixup:
    """Options of `mixup`."""

    languages: list[str] = setting([], "one more than choices, or more; empty: all")
    what: str = setting("all", "what is not in the pivot language", choices=tuple(WHAT))
    pivot: str = setting("en", "the language of what is not translated")


@dataclass
class Lettered:
    """Options of `lettered`."""

    ask: str = setting("Answer:", "the last line of the question")


def choices(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """Rows of kind `choice` out of rows with a field that can be guessed.

    Raises:
        UserError: a row without these fields, fewer different answers than choices.
    """
    chosen = read(Choices, options)
    answers = [str(value_of(record, chosen.answer)) for record in records]
    known = sorted(set(answers))
    if len(known) < chosen.number:
        raise UserError(f"number: {chosen.number} choices, but only {len(known)} different answers")
    found = []
    for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
        # Translations of an item have its id, and so the same choices.
        name = f"{record.fields.get('id', number)}\0{answer}"
        random = np.random.default_rng([seed, *name.encode("utf-8", "replace")])
        others = random.permutation([other for other in known if other != answer])
        places = [answer, *others[: chosen.number - 1].tolist()]
        listed = [places[at] for at in random.permutation(chosen.number)]
        fields = {
            "question": text_of(record, chosen.question),
            "choices": [chosen.form.replace("{}", text) for text in listed],
            "answer": listed.index(answer),
        }
        kept = {key: record.fields[key] for key in ("id", "lang", "language", "locale")
                if key in record.fields}  # fmt: skip
        found.append(Record(kept | fields, record.origin))
    return found


def mixup(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """A row for each item that has all languages, its parts in different ones.

    Raises:
        UserError: rows that are not of kind `choice` or not parallel, more parts than languages,
            an item whose right choice is not at one place in all languages.
    """
    chosen = read(Mixup, options)
    known = by_item(records)
    have = list(dict.fromkeys(name for rows in known.values() for name in rows))
    check_known([chosen.pivot, *chosen.languages], have)
    languages = chosen.languages or have
    random, found = np.random.default_rng(seed), []
    for item, rows in known.items():
        if not {chosen.pivot, *languages} <= rows.keys():
            continue
        parts = {name: _parts(rows[name]) for name in {chosen.pivot, *languages}}
        own = rows[chosen.pivot]
        right = right_choice(own, parts[chosen.pivot][1:])
        count = len(parts[chosen.pivot])
        order = [languages[at] for at in random.permutation(len(languages))]
        if chosen.what != "all":  # what is translated is in none of the pivot's
            order = [name for name in order if name != chosen.pivot]
        moved = sorted(WHAT[chosen.what](count - 1, right))
        if len(order) < len(moved) or any(len(part) != count for part in parts.values()):
            raise UserError(
                f"{own.origin}: {len(moved)} parts of this row would be in different languages; "
                f"{len(order)} languages are given, and each needs as many choices"
            )
        for name, (_, *listed) in parts.items():
            if (other := right_choice(rows[name], listed)) != right:
                raise UserError(
                    f"{rows[name].origin}: choice {other} (counted from 0) is right in {name!r}, "
                    f"but choice {right} in {chosen.pivot!r} ({own.origin}); list the choices of "
                    "an item in one order in all languages"
                )
        spoken = [chosen.pivot] * count
        for place, name in zip(moved, order, strict=False):
            spoken[place] = name
        texts = [parts[name][place] for place, name in enumerate(spoken)]
        fields = {"id": item, "lang": "mixup", "question": texts[0], "choices": texts[1:],
                  "answer": right, "languages": spoken}  # fmt: skip
        found.append(Record(fields, own.origin))
    return found


def lettered(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """The choices in the question, as A, B, C, ...; the letters are the choices.

    Raises:
        UserError: rows that are not of kind `choice`, more choices than letters.
    """
    ask = read(Lettered, options).ask
    found = []
    for record in records:
        given = choices_of(record)
        if len(given) > len(LETTERS):
            raise UserError(f"{record.origin}: {len(given)} choices, but {len(LETTERS)} letters")
        field = "question" if "question" in record.fields else "prefix"
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, given, strict=False)]
        fields = {
            field: "\n".join([text_of(record, field), *lines, ask]),
            "choices": list(LETTERS[: len(given)]),
            "answer": right_choice(record, given),
        }
        found.append(replace(record, fields=record.fields | fields))
    return found


def _parts(record: Record) -> tuple[str, ...]:
    """The question and the choices."""
    return text_of(record, "question"), *choices_of(record)
