"""Test rows that were also training rows: answers to them show memory, not skill.

    seen(read_golds(config), [Entrant('sft', 'runs/sft/adapter')])
    # ['sft: 16 of 400 evaluated rows are training rows, too, ... (as test.en:3).']

The check reads the record of the run that an adapter comes from. It says nothing where there is no
record, or where the training rows are gone or did not come from files.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxalign.data.example import Example
from jaxalign.data.pairs import Pair
from jaxalign.data.prompts import examples_of
from jaxalign.data.template import recorded
from jaxalign.data.wanted import read_again
from jaxalign.evaluate.entrants import Entrant
from jaxalign.evaluate.gold import Golds
from jaxalign.hf.find import locate
from jaxalign.settings import Config

Said = tuple[str, str]  # a prompt and its answer, or a sentence and its translation


class Held(NamedTuple):
    """Rows, and texts without their answers."""

    rows: frozenset[Said]
    texts: frozenset[str]


def seen(golds: Golds, entrants: Sequence[Entrant]) -> list[str]:
    """A sentence for each way in which rows of `evaluate.data` were trained on.

    Args:
      golds: the evaluated rows.
      entrants: who is asked; the check reads the runs of adapters.
    """
    runs = {one: had for one in entrants if one.kind == "adapter" and (had := _record(one))}
    if not runs:
        return []
    asked = [gold.example for rows in golds.values() for gold in rows]
    held = Held(frozenset(map(_said, asked)), frozenset(_plain(one.prompt) for one in asked))
    known: dict[str, Held] = {}  # by what is trained on: seeds and systems share it
    found: dict[str, dict[str, None]] = {}
    for entrant, had in runs.items():
        name = _named(had)
        if name not in known:
            known[name] = trained(had, held)
        for sentence in _sentences(asked, known[name]):
            found.setdefault(sentence, {})[entrant.name] = None
    return [f"{', '.join(names)}: {sentence}" for sentence, names in found.items()]


def trained(had: Config, asked: Held) -> Held:
    """What of `asked` a run of this configuration learns from; texts are those of its pairs."""
    rows: set[Said] = set()
    texts: set[str] = set()
    for part in (had.task, had.align):
        for row in read_again(had, part) if part.weight > 0 and part.train else ():
            if isinstance(row, Pair):
                sides = _plain(row.source), _plain(row.target)
                rows |= asked.rows & {sides, sides[::-1]}
                texts |= asked.texts & {*sides}
            else:
                rows |= asked.rows & {*map(_said, examples_of(row))}
    return Held(frozenset(rows), frozenset(texts))


def _sentences(asked: Sequence[Example], had: Held) -> Iterator[str]:
    rows = {place for place, one in enumerate(asked) if _said(one) in had.rows}
    texts = {place for place, one in enumerate(asked) if _plain(one.prompt) in had.texts} - rows
    for known, what in (
        (rows, "are training rows, too, answers included; leave them out of one of the two"),
        (texts, "are sentences of align.train, too"),
    ):
        if known:
            first = asked[min(known)].origin
            yield f"{len(known)} of {len(asked)} evaluated rows {what} (as {first})."


def _record(entrant: Entrant) -> Config | None:
    return recorded(locate(entrant.source))


def _named(had: Config) -> str:
    """By which runs that learn from the same rows are known; seeds change what transforms make."""
    parts = [
        (part.weight > 0, part.train, part.columns, part.languages, part.transforms)
        for part in (had.task, had.align)
    ]
    drawn = had.seed if had.task.transforms or had.align.transforms else None
    return repr((*parts, had.task.kind, had.align.rows, had.align.pivot, drawn))


def _said(example: Example) -> Said:
    return _plain(example.prompt), _plain(example.answer)


def _plain(text: str) -> str:
    """Without differences that nobody sees: of composition and of blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())
