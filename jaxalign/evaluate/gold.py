"""The rows a model is judged on: read, rendered as in training, one list a language.

golds = read_golds(config)                     # {'en': [Gold, ...], 'de': [...]}
prompts = encode_prompts([g.example for g in golds['de']], tokenizer, ...)
with_shots(golds, solved_examples(config))     # the same questions behind solved ones
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxalign.base import open_base
from jaxalign.data import sources
from jaxalign.data.streams import in_task_languages
from jaxalign.data.tasks import Example, render
from jaxalign.data.transforms import transformed
from jaxalign.errors import UserError
from jaxalign.evaluate.measure import Gold
from jaxalign.settings import Config

Golds = dict[str, list[Gold]]  # language -> its rows, in the order of the data
# Solved prompts and answers by what they stand before: a direction of translations, or ANY row.
Shots = dict[str, tuple[tuple[str, str], ...]]
ANY = ""
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
COPIED = ("slots", "intent_slots", "ner")  # kinds whose answers are words of the row's text


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
      UserError: no data, or a file that is named twice; a row that cannot be rendered, or copies
        words in another language than its own; a language that is asked for (in
        `evaluate.languages` or `evaluate.groups`) and has no rows.
    """
    settings, kind = config.evaluate, kind_of(config)
    if not settings.data:
        raise UserError(
            "evaluate.data is empty; name files to judge by, as in evaluate.data=[test.*.jsonl]"
        )
    sources.check_once(settings.data, "evaluate.data")
    most, ends = rows or settings.rows, _ends(config) if kind == "rows" else ()
    golds: Golds = {}
    seen = set()
    for number, record in enumerate(_records(config, settings.data, settings.columns)):
        example = dataclasses.replace(render(kind, record), ends=ends)
        _check_copied(kind, example)
        language = example.language or "und"
        seen.add(language)
        if settings.languages and language not in settings.languages:
            continue
        found = golds.setdefault(language, [])
        if not most or len(found) < most:
            found.append(_gold(record, example, number, len(found)))
    _check_languages(config, seen)
    return golds


def _ends(config: Config) -> tuple[str, ...]:
    """The tokens that end an answer of `model.path`, as text; () where no model is named."""
    if not config.model.path:
        return ()
    base = open_base(config)
    texts = (base.tokenizer.decode([token]) for token in base.stops(base.prompts))
    return tuple(filter(None, texts))


def questions(config: Config, data: Sequence[str]) -> list[Gold]:
    """The rows of `data` in their order, with or without answers, for writing answers only."""
    kind = kind_of(config)
    golds = []
    seen: Counter[str] = Counter()
    for number, record in enumerate(_records(config, data, config.evaluate.columns)):
        given = {name: value for name, value in record.fields.items() if value is not None}
        unsolved = dataclasses.replace(record, fields=_fill(kind, given))
        example = render(kind, unsolved)
        golds.append(_gold(record, example, number, seen[example.language]))
        seen[example.language] += 1
    return golds


def _gold(record: sources.Record, example: Example, number: int, place: int) -> Gold:
    """A row of the data; without an `id` it goes by its `place` among those of its language."""
    given = record.fields.get("id")
    name = str(place if given is None else given)
    return Gold(example, record.fields, name, example.language or "und", number)


def _records(
    config: Config, data: Sequence[str], columns: Mapping[str, str]
) -> list[sources.Record]:
    """The rows after `evaluate.transforms`."""
    records = sources.read_all(data, columns)
    transforms = config.evaluate.transforms
    return transformed(records, transforms, "evaluate.transforms", "data", config.seed)


def _fill(kind: str, fields: Mapping[str, object]) -> dict[str, object]:
    solved = {"target", "annot_utt", "translation"} & fields.keys()
    return dict(fields) if solved else BLANK[kind] | dict(fields)


def solved_examples(config: Config) -> Shots:
    """`evaluate.shots` prompts with their answers from `task.train`, drawn by `config.seed`.

    They are in `task.languages`, as the rows of a training are: others would show the base what no
    trained system has seen. Of translations each direction has its own.

    Raises:
      UserError: no training rows to draw from, or finished rows, which hold no turns.
    """
    kind = kind_of(config)
    if not config.task.train:
        raise UserError("evaluate.shots: the solved rows come from task.train, which is empty")
    records = _records(config, config.task.train, config.task.columns)
    rendered = [render(kind, record) for record in records]
    directed = kind == "translation"
    groups: dict[str, list[Example]] = {}
    for example in in_task_languages(rendered, config.task, directed):
        groups.setdefault(example.language if directed else ANY, []).append(example)
    found = {}
    for direction, examples in groups.items():
        number = min(config.evaluate.shots, len(examples))
        chosen = random.Random(config.seed).sample(examples, number)
        for example in chosen:
            _check_turns(example)
        found[direction] = tuple((example.prompt, example.answer) for example in chosen)
    return found


def with_shots(golds: Golds, shots: Shots) -> Golds:
    """The same rows, each asked behind the solved ones.

    Raises:
      UserError: finished rows, which hold no turns; a direction without solved rows.
    """

    def shown(gold: Gold) -> Gold:
        _check_turns(gold.example)
        solved = shots.get(gold.language, shots.get(ANY))
        if solved is None:
            raise UserError(
                f"evaluate.shots: no row of task.train in task.languages translates "
                f"{gold.language} (they have: {', '.join(shots)}); add some, leave the direction "
                "out with evaluate.languages, or set evaluate.shots=0"
            )
        return dataclasses.replace(gold, example=dataclasses.replace(gold.example, shots=solved))

    return {language: [shown(gold) for gold in rows] for language, rows in golds.items()}


def _check_turns(example: Example) -> None:
    if example.finished:
        raise UserError(
            f"{example.origin}: evaluate.shots shows solved rows as turns of a conversation, and a "
            "finished row has no turns; set evaluate.shots=0"
        )


def _check_copied(kind: str, example: Example) -> None:
    """Refuses a row whose answer cannot be found in it."""
    if example.answered_in and kind in COPIED:
        raise UserError(
            f"{example.origin}: answers of kind {kind} copy words of the row's own text, but "
            f"evaluate.transforms asks for this one in {example.answered_in!r}; remove "
            "cross_lingual_answer, or judge a kind that copies nothing, as in evaluate.kind=intent"
        )


def _check_languages(config: Config, seen: set[str]) -> None:
    groups = config.evaluate.groups
    wanted = [("evaluate.languages", config.evaluate.languages)]
    if not config.evaluate.languages:
        wanted += [(f"evaluate.groups.{name}", part) for name, part in groups.items()]
    have = ", ".join(sorted(seen))
    for key, languages in wanted:
        for language in languages:
            if language not in seen:
                raise UserError(
                    f"{key}: no row of evaluate.data is in {language!r} (it has: {have})"
                    f"{sources.nearest(language, seen)}"
                )
