"""Mixed-language text (Chua et al. 2024, "Crosslingual knowledge barriers", arXiv 2406.16135).

A model goes on with language modelling on English text of which units are replaced by their
translations, each in a language drawn at random: whole documents, sentences, or windows of words
within a sentence. Rows that come out are of kind `text`: every token is trained.

    transforms: [{name: code_switch, options: {unit: window, languages: [en, fr, de, es, it]}}]
    task.kind: text

Units of one document follow one another in one row, a sentence a line. `rate` is the share of units
that draw a language at all; the others stay in the pivot language, so that `rate: 0` is the corpus
in the pivot language, byte for byte (the control of the paper). Drawing is uniform over those of
`languages` that have the unit, the pivot too where it is listed.

Released code (google-research/crosslingual-knowledge-barriers): units `document`, `sentence`,
`sentence8words`, each translated by an online service, the windows as well. Ours: a window of a
parallel sentence is a proportional cut of it, as no translation of the window is there. It begins
and ends at words (characters in scripts without blanks) at the window's share of the sentence, so
word order can move a word into a neighbour; a cut without a word leaves the pivot's window.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxalign.bounds import setting
from jaxalign.data.sources import Record
from jaxalign.data.transforms.options import read
from jaxalign.data.transforms.parallel import Item, check_known, items

MIXED = "mixed"  # the language of a row that has several
DENSE = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


@dataclass
class Options:
    """Options of `code_switch`."""

    unit: str = setting("sentence", "what is replaced", choices=("document", "sentence", "window"))
    window: int = setting(8, "words of a window", lowest=1)
    languages: list[str] = setting([], "that are drawn; empty: all that the rows have")
    rate: float = setting(1.0, "share of the units that draw a language", lowest=0, highest=1)
    pivot: str = setting("en", "the language of the corpus")


def code_switch(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """A row for each document, with `text`, its `lang`, and the `languages` of its units.

    Raises:
        UserError: rows that are not parallel (`parallel.py`), or languages that none is in.
    """
    chosen = read(Options, options)
    found = [item for item in items(records, chosen.pivot) if chosen.pivot in item.texts]
    have = list(dict.fromkeys(language for item in found for language in item.texts))
    check_known([chosen.pivot, *chosen.languages], have)
    draw = _Draw(chosen, chosen.languages or have, np.random.default_rng(seed))
    documents: dict[str, list[Item]] = {}
    for number, item in enumerate(found):
        documents.setdefault(item.doc or f"\0{number}", []).append(item)
    return [_document(sentences, chosen, draw) for sentences in documents.values()]


def pieces(text: str) -> list[str]:
    """Words with the blanks behind them, or characters; together they are the text."""
    if DENSE.search(text):
        return list(text)
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    return [text[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True)]


def windows(text: str, size: int) -> list[str]:
    """The text in windows of so many words."""
    words = pieces(text)
    return ["".join(words[at : at + size]) for at in range(0, len(words), size)]


def cut(text: str, number: int, window: int, words: int) -> str:
    """Of a translation, the share that window `number` has of a sentence of so many words."""
    parts = pieces(text)
    first, last = (min(end * window, words) * len(parts) // words for end in (number, number + 1))
    return "".join(parts[first:last])


class _Draw:
    """The language of one unit after the other."""

    def __init__(self, options: Options, languages: Sequence[str], random: np.random.Generator):
        self.rate, self.pivot, self.languages = options.rate, options.pivot, languages
        self.random = random

    def language(self, have: Collection[str]) -> str:
        """Of those that the unit has."""
        can = [name for name in self.languages if name in have]
        switches, number = self.random.random() < self.rate, self.random.random()
        return can[int(number * len(can))] if switches and can else self.pivot


def _document(sentences: Sequence[Item], options: Options, draw: _Draw) -> Record:
    """The row of a document."""
    spoken: list[str] = []
    if options.unit == "document":
        common = set.intersection(*(set(sentence.texts) for sentence in sentences))
        spoken = [draw.language(common)]
        lines = [sentence.texts[spoken[0]] for sentence in sentences]
    elif options.unit == "sentence":
        spoken = [draw.language(sentence.texts) for sentence in sentences]
        lines = [one.texts[name] for one, name in zip(sentences, spoken, strict=True)]
    else:
        lines = [_windows(sentence, options, draw, spoken) for sentence in sentences]
    languages = set(spoken)
    return Record(
        {"text": "\n".join(lines), "lang": languages.pop() if len(languages) == 1 else MIXED,
         "languages": spoken, "id": sentences[0].doc or sentences[0].id},
        sentences[0].origin,
    )  # fmt: skip


def _windows(sentence: Item, options: Options, draw: _Draw, spoken: list[str]) -> str:
    """A sentence with its windows replaced; their languages are put into `spoken`."""
    own = sentence.texts[options.pivot]
    parts, words = windows(own, options.window), len(pieces(own))
    for number, part in enumerate(parts):
        language = draw.language(sentence.texts)
        if language != options.pivot:
            other = cut(sentence.texts[language], number, options.window, words).strip()
            # The blanks between windows are the pivot's.
            parts[number] = other + part[len(part.rstrip()) :] if other else part
            language = language if other else options.pivot
        spoken.append(language)
    return "".join(parts)
