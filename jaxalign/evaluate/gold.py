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

from jaxalign.base import open_base
from jaxalign.checksums import text_digest
from jaxalign.data import sources
from jaxalign.data.tasks import TASKS, Example, render
from jaxalign.data.transforms import transformed
from jaxalign.data.wanted import in_task_languages
from jaxalign.errors import UserError
from jaxalign.evaluate.measure import Gold
from jaxalign.settings import Config
from jaxalign.settings.data import UNJUDGED

Golds = dict[str, list[Gold]]  # language -> its rows, in the order of the data
# Solved prompts and answers by what they stand before: a direction of translations, or ANY row.
Shots = dict[str, tuple[tuple[str, str], ...]]
ANY = ""


def kind_of(config: Config) -> str:
    """The kind of task that is judged.

    Raises:
      UserError: texts, which ask nothing.
    """
    if config.judged in UNJUDGED:
        raise UserError(
            f"evaluate.kind: rows of kind {config.judged} ask nothing that a model could answer; "
            "name the kind of the rows of evaluate.data, as in evaluate.kind=choice"
        )
    return config.judged


def read_golds(config: Config, rows: int = 0) -> Golds:
    """The rows of `evaluate.data` by language, at most `rows` (or `evaluate.rows`) of each.

    Raises:
      UserError: no data, or a file that is named twice; a row that cannot be rendered, or copies
        words in another language than its own; a language that is asked for (in
        `evaluate.languages` or `evaluate.groups`) and has no rows.
    """
    settings = config.evaluate
    if not settings.data:
        raise UserError(
            "evaluate.data is empty; name files to judge by, as in evaluate.data=[test.*.jsonl]"
        )
    sources.check_once(settings.data, "evaluate.data")
    kind, golds = kind_of(config), Golds()
    ends = _ends(config) if kind == "rows" else ()
    for gold in _asked(config, settings.data, "evaluate.data", rows or settings.rows):
        _check_copied(kind, gold.example)
        example = dataclasses.replace(gold.example, ends=ends)
        golds.setdefault(gold.language, []).append(dataclasses.replace(gold, example=example))
    for name, part in settings.groups.items() if not settings.languages else ():
        _check_languages(f"evaluate.groups.{name}", part, golds, "evaluate.data")
    return golds


def _ends(config: Config) -> tuple[str, ...]:
    """The tokens that end an answer of `model.path`, as text; () where no model is named."""
    if not config.model.path:
        return ()
    base = open_base(config)
    texts = (base.tokenizer.decode([token]) for token in base.stops(base.prompts))
    return tuple(filter(None, texts))


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
        "task.columns is for training rows only: evaluated rows are read by their own column "
        "names; set evaluate.columns to rename theirs, too"
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
    records = sources.read_all(data, config.evaluate.columns, "evaluate.columns")
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
    return dataclasses.replace(record, fields={**TASKS[kind].blank, **fields})


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
    read = sources.read_all(config.task.train, config.task.columns, "task.columns")
    records = _transformed(config, read)
    rendered = [render(kind, record) for record in records]
    directed = TASKS[kind].directed
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
    if example.answered_in and TASKS[kind].copied:
        raise UserError(
            f"{example.origin}: answers of kind {kind} copy words of the row's own text, but "
            f"evaluate.transforms asks for this one in {example.answered_in!r}; remove "
            "cross_lingual_answer, or judge a kind that copies nothing, as in evaluate.kind=intent"
        )


def _check_languages(key: str, wanted: Sequence[str], have: Collection[str], named: str) -> None:
    for language in wanted:
        if language not in have:
            raise UserError(
                f"{key}: no row of {named} is in {language!r} (it has: {', '.join(sorted(have))})"
                f"{sources.nearest(language, have)}"
            )
