"""The rows a model is judged on: read, rendered as in training, one list a language.

golds = read_golds(config)                     # {'en': [Gold, ...], 'de': [...]}
prompts = encode_prompts([g.example for g in golds['de']], tokenizer, ...)
with_shots(golds, solved_examples(config))     # the same questions behind solved ones
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from jaxalign.checksums import text_digest
from jaxalign.data import sources
from jaxalign.data.streams import in_task_languages
from jaxalign.data.tasks import Example, render
from jaxalign.data.transforms import transformed
from jaxalign.errors import UserError
from jaxalign.evaluate.measure import Gold
from jaxalign.settings import Config

Golds = dict[str, list[Gold]]  # language -> its rows, in the order of the data
# What a row without an answer is rendered with, where only the question is wanted.
BLANK: dict[str, dict[str, object]] = {
    "rows": {"text": "-"},
    "slots": {"slots": []},
    "intent": {"intent": "-"},
    "intent_slots": {"intent": "-", "slots": []},
    "translation": {"tgt": "-"},
    "ner": {"entities": []},
    "choice": {"answer": 0},
}


def kind_of(config: Config) -> str:
    """The kind of task that is judged.

    Raises:
      UserError: texts, which ask nothing.
    """
    kind = config.task.kind if config.evaluate.kind == "task" else config.evaluate.kind
    if kind == "text":
        raise UserError(
            "evaluate.kind: rows of kind text ask nothing that a model could answer; name the kind "
            "of the rows of evaluate.data, as in evaluate.kind=choice"
        )
    return kind


def read_golds(config: Config, rows: int = 0) -> Golds:
    """The rows of `evaluate.data` by language, at most `rows` (or `evaluate.rows`) of each.

    Raises:
      UserError: no data, or a file that is named twice; a row that cannot be rendered; a language
        that is asked for (in `evaluate.languages` or `evaluate.groups`) and has no rows.
    """
    settings = config.evaluate
    if not settings.data:
        raise UserError(
            "evaluate.data is empty; name files to judge by, as in evaluate.data=[test.*.jsonl]"
        )
    sources.check_once(settings.data, "evaluate.data")
    golds: Golds = {}
    for gold in _asked(config, settings.data, "evaluate.data", rows or settings.rows):
        golds.setdefault(gold.language, []).append(gold)
    for name, part in settings.groups.items() if not settings.languages else ():
        _check_languages(f"evaluate.groups.{name}", part, golds, "evaluate.data")
    return golds


def questions(config: Config, data: Sequence[str]) -> list[Gold]:
    """The rows of `data` in their order, with or without answers, for writing answers only.

    They are at most `evaluate.rows` of each language, in `evaluate.languages`.

    Raises:
      UserError: a row that cannot be rendered, a language of `evaluate.languages` without rows.
    """
    return _asked(config, data, ", ".join(data), config.evaluate.rows, _unsolved)


def columns_note(config: Config) -> str:
    """A sentence where training renames columns and evaluation does not; else nothing."""
    if not config.task.columns or config.evaluate.columns:
        return ""
    return (
        "task.columns is for training rows only: the rows that are asked here are read by their "
        "own column names; set evaluate.columns if theirs are to be renamed, too"
    )


def _asked(
    config: Config,
    data: Sequence[str],
    named: str,
    most: int,
    given: Callable[[str, sources.Record], sources.Record] = lambda kind, record: record,
) -> list[Gold]:
    """The rows of `data`, at most so many of each language, in the languages that are asked for.

    Args:
      named: how a sentence calls the data.
      most: 0: all.
      given: of the kind and a record, what is rendered.
    """
    kind, wanted = kind_of(config), config.evaluate.languages
    records = sources.read_all(data, config.evaluate.columns)
    contents = {record.origin: _content(record) for record in records}
    golds = []
    seen: Counter[str] = Counter()
    for number, record in enumerate(_transformed(config, records)):
        example = render(kind, given(kind, record))
        language = example.language or "und"
        place = seen[language]
        seen[language] += 1
        if (wanted and language not in wanted) or (most and place >= most):
            continue
        own = record.fields.get("id")
        name = str(place if own is None else own)
        content = contents.get(record.origin) or _content(record)
        golds.append(Gold(example, record.fields, name, language, number, content))
    _check_languages("evaluate.languages", wanted, seen, named)
    return golds


def _content(record: sources.Record) -> str:
    """A digest of a row; of what is not JSON, and so neither asked nor an answer, the place alone.

    Taken before transforms: systems may ask the same row in other ways.
    """
    return text_digest(json.dumps(record.fields, sort_keys=True, default=lambda value: None))


def _transformed(config: Config, records: list[sources.Record]) -> list[sources.Record]:
    """The rows after `evaluate.transforms`."""
    transforms = config.evaluate.transforms
    return transformed(records, transforms, "evaluate.transforms", "data", config.seed)


def _unsolved(kind: str, record: sources.Record) -> sources.Record:
    """The row with an answer that it may lack."""
    fields = {name: value for name, value in record.fields.items() if value is not None}
    solved = {"target", "annot_utt", "translation"} & fields.keys()
    return dataclasses.replace(record, fields=fields if solved else BLANK[kind] | fields)


def solved_examples(config: Config) -> tuple[tuple[str, str], ...]:
    """`evaluate.shots` prompts with their answers from `task.train`, drawn by `config.seed`.

    They are in `task.languages`, as the rows of a training are: others would show the base what no
    trained system has seen.

    Raises:
      UserError: no training rows to draw from, or finished rows, which hold no turns.
    """
    kind = kind_of(config)
    if not config.task.train:
        raise UserError("evaluate.shots: the solved rows come from task.train, which is empty")
    records = _transformed(config, sources.read_all(config.task.train, config.task.columns))
    rendered = [render(kind, record) for record in records]
    examples = in_task_languages(rendered, config.task, kind == "translation")
    chosen = random.Random(config.seed).sample(examples, min(config.evaluate.shots, len(examples)))
    if any(example.finished for example in chosen):
        raise UserError("evaluate.shots: finished rows (kind rows) cannot stand before a prompt")
    return tuple((example.prompt, example.answer) for example in chosen)


def with_shots(golds: Golds, shots: tuple[tuple[str, str], ...]) -> Golds:
    """The same rows, each asked behind the solved ones."""

    def shown(example: Example) -> Example:
        return dataclasses.replace(example, shots=shots)

    return {
        language: [dataclasses.replace(gold, example=shown(gold.example)) for gold in rows]
        for language, rows in golds.items()
    }


def _check_languages(key: str, wanted: Sequence[str], have: Collection[str], named: str) -> None:
    for language in wanted:
        if language not in have:
            raise UserError(
                f"{key}: no row of {named} is in {language!r} (it has: {', '.join(sorted(have))})"
                f"{sources.nearest(language, have)}"
            )
