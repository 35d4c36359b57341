"""Words replaced by words of other languages, in slots and around them, so that they are copied.

    task.train: [train.en.jsonl, pairs.jsonl]          # the pairs give the words, and leave
    task.transforms: [{name: switch_values, options: {rate: 0.3, others: 0.3}}]

    set an alarm for nine am       datetime: nine am
    set ein alarm for çok geç      datetime: çok geç

A model that learned slots from English rows alone translates the words of a Turkish command into
English, and more so the closer alignment brings the languages: the states say what is meant, not in
which words. No English row tells that words are copied and not rendered; these rows do. They need
no translation and no dictionary: the words are any, as many as the slot had, out of sentences in
the languages of the pairs, and what is around them says which type the slot is. Words outside of
slots are replaced as well (`others`), one by one: where only slots are foreign, the model learns
that what is foreign is a slot, and copies too much.

Nearest relatives: mention replacement (Dai and Adel 2020, arXiv 2010.11683), which draws words of
the same type, and multilingual code-switching (Qin et al. 2020, arXiv 2006.06402), which needs
dictionaries. Ours is neither; no paper is followed here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from jaxalign.bounds import setting
from jaxalign.data.fields import text_of
from jaxalign.data.sources import Record
from jaxalign.data.tasks import Span, entity_spans, slot_spans
from jaxalign.data.transforms.code_switch import DENSE, pieces
from jaxalign.data.transforms.options import read
from jaxalign.data.transforms.parallel import check_known, is_parallel, items
from jaxalign.errors import UserError

# What rows of the task have: one field of each group.
TASKS = (
    (("utterance", "utt"), ("slots", "annot_utt", "target")),
    (("text",), ("entities",)),
)
SEPARATORS = (";", ":")  # of an answer's parts: words with them could not be read back
LETTERS = 2  # of a script without blanks stand for a word
STALE = ("annot_utt", "target", "char_spans", "tokens")  # say what was there before


@dataclass
class Options:
    """Options of `switch_values`."""

    rate: float = setting(0.3, "share of the slots whose words are replaced", lowest=0, highest=1)
    others: float = setting(0.3, "share of the words outside of slots", lowest=0, highest=1)
    languages: list[str] = setting([], "of the words; empty: all that the pairs have")
    pivot: str = setting("en", "the language of the rows, whose words are not drawn")


def switch_values(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """The rows that are no parallel sentences, with a share of their slots and words replaced.

    A row stays as it is if nothing in it was drawn, or if it is not certain where its slots stand:
    words that are not in the text, that are there more than once without `char_spans`, or that
    overlap those of another slot. Other rows have `slots` (`entities`) and the text anew, and lose
    the fields that said the same in another form.

    Raises:
        UserError: no row is a parallel sentence, or no language of them is left to draw from.
    """
    chosen = read(Options, options)
    parallel = [record for record in records if _gives_words(record)]
    if not parallel:
        raise UserError(
            "the words come from parallel sentences, and no row is one; list a file of pairs "
            "beside the rows of the task"
        )
    draw = _Draw(parallel, chosen, np.random.default_rng(seed))
    return [_switched(record, draw, chosen) for record in records if not _gives_words(record)]


def _gives_words(record: Record) -> bool:
    """Parallel sentences do; not rows of the task, whose other columns may be called as theirs."""
    has = {name for name, value in record.fields.items() if value is not None}
    of_task = any(all(has.intersection(group) for group in groups) for groups in TASKS)
    return is_parallel(record.fields) and not of_task


class _Draw:
    """Words of a language that is drawn anew each time."""

    def __init__(self, parallel: Sequence[Record], options: Options, random: np.random.Generator):
        texts: dict[str, list[str]] = {}
        for item in items(parallel, options.pivot):
            for language, text in item.texts.items():
                if language != options.pivot and not any(sign in text for sign in SEPARATORS):
                    texts.setdefault(language, []).append(text)
        check_known(options.languages, list(texts))
        if not texts:
            raise UserError(
                f"all parallel sentences are in {options.pivot!r}; see the option pivot"
            )
        self.texts = [texts[name] for name in options.languages or sorted(texts)]
        self.random = random

    def words(self, old: str, rate: float) -> str:
        """With this probability others, as many as the old ones are."""
        if self.random.random() >= rate:
            return old
        texts = self.texts[self.random.integers(len(self.texts))]
        text = texts[self.random.integers(len(texts))]
        parts, size = pieces(text), len(old.split()) * (LETTERS if DENSE.search(text) else 1)
        first = self.random.integers(max(len(parts) - size, 0) + 1)
        return _bare("".join(parts[first : first + size])) or old

    def each(self, text: str, rate: float) -> str:
        """Each word of a text on its own; signs stay."""
        if not rate:
            return text
        return re.sub(
            r"\S+",
            lambda word: self.words(word[0], rate) if _bare(word[0]) else word[0],
            text,
        )


def _bare(words: str) -> str:
    """Without blanks and signs at both ends."""
    sign = [unicodedata.category(letter)[0] in "PSZC" for letter in words]
    kept = [place for place, is_sign in enumerate(sign) if not is_sign]
    return words[kept[0] : kept[-1] + 1] if kept else ""


def _switched(record: Record, draw: _Draw, options: Options) -> Record:
    """The row with a share of its slots, or entities, and of the words around in other words."""
    entities = record.fields.get("entities") is not None
    names = ("text",) if entities else ("utterance", "utt")
    text, spans = text_of(record, *names), (entity_spans if entities else slot_spans)(record)
    places = _places(record, text, spans)
    if places is None:
        return record
    new, made, end = list(spans), "", len(text)
    # From the last place to the first.
    for number, (start, stop) in sorted(enumerate(places), key=lambda one: one[1], reverse=True):
        kind, old = spans[number]
        words = draw.words(old, options.rate)
        made, end = words + draw.each(text[stop:end], options.others) + made, start
        new[number] = (kind, words)
    made = draw.each(text[:end], options.others) + made
    if made == text:
        return record
    kept = {name: value for name, value in record.fields.items() if name not in STALE}
    fields = {names[0]: made, "entities" if entities else "slots": [list(span) for span in new]}
    return replace(record, fields=kept | fields)


def _places(record: Record, text: str, spans: Sequence[Span]) -> list[tuple[int, int]] | None:
    """Where the words of each slot stand in the text; None if that is not certain of them all."""
    given = record.fields.get("char_spans")
    given = given if isinstance(given, list) and len(given) == len(spans) else [None] * len(spans)
    found = []
    for (_, words), place in zip(spans, given, strict=True):
        match place:
            case [int(start), int(stop)] if start >= 0 and text[start:stop] == words:
                found.append((start, stop))
            case _ if text.count(words) == 1:
                found.append((text.index(words), text.index(words) + len(words)))
            case _:
                return None
    ordered = sorted(found)
    if any(one[1] > other[0] for one, other in pairwise(ordered)):
        return None
    return found
