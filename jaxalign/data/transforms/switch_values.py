"""Words of slots and entities replaced by words of other languages, so that they must be copied.

    task.train: [train.en.jsonl, pairs.jsonl]          # the pairs give the words, and leave
    task.transforms: [{name: switch_values, options: {rate: 0.3}}]

    set an alarm for nine am       datetime: nine am
    set an alarm for çok geç       datetime: çok geç

A model that learned slots from English rows alone translates the words of a Turkish command into
English, and more so the closer alignment brings the languages: the states say what is meant, not in
which words. No English row tells that words are copied and not rendered; these rows do. They need
no translation and no dictionary: the words are any, as many as the slot had, out of sentences in
the languages of the pairs, and what is around them says which type the slot is.

Nearest relatives: mention replacement (Dai and Adel 2020, arXiv 2010.11683), which draws words of
the same type, and multilingual code-switching (Qin et al. 2020, arXiv 2006.06402), which needs
dictionaries. Ours is neither; no paper is followed here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxalign.bounds import setting
from jaxalign.data.fields import text_of
from jaxalign.data.pairs import FORMS
from jaxalign.data.sources import Record
from jaxalign.data.tasks import Span, entity_spans, slot_spans
from jaxalign.data.transforms.code_switch import DENSE, pieces
from jaxalign.data.transforms.options import read
from jaxalign.data.transforms.parallel import check_known, items
from jaxalign.errors import UserError

PARALLEL = ("texts", "translation", *(form[0] for form in FORMS))
SEPARATORS = (";", ":")  # of an answer's parts: words with them could not be read back
LETTERS = 2  # of a script without blanks stand for a word
STALE = ("annot_utt", "target", "char_spans", "tokens")  # say what was there before


@dataclass
class Options:
    """Options of `switch_values`."""

    rate: float = setting(0.3, "share of the slots whose words are replaced", lowest=0, highest=1)
    languages: list[str] = setting([], "of the words; empty: all that the pairs have")
    pivot: str = setting("en", "the language of the rows, whose words are not drawn")


def switch_values(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """The rows that are not parallel sentences, in which a share of the slots has other words.

    A slot whose words are not in the text, or more than once and without `char_spans`, stays as it
    is. Rows of which nothing was replaced stay as they are; the others have `slots` (`entities`)
    and the text anew, and lose the fields that said the same in another form.

    Raises:
        UserError: no row is a parallel sentence, or no language of them is left to draw from.
    """
    chosen = read(Options, options)
    parallel = [record for record in records if _is_parallel(record)]
    if not parallel:
        raise UserError(
            "no row is a parallel sentence, whose words are drawn; list a file of pairs beside the "
            "rows of the task"
        )
    draw = _Draw(parallel, chosen, np.random.default_rng(seed))
    return [_switched(record, draw) for record in records if not _is_parallel(record)]


def _is_parallel(record: Record) -> bool:
    return any(name in record.fields for name in PARALLEL)


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
        self.rate, self.random = options.rate, random

    def words(self, old: str) -> str:
        """As many words as the old ones are, or those."""
        if self.random.random() >= self.rate:
            return old
        texts = self.texts[self.random.integers(len(self.texts))]
        text = texts[self.random.integers(len(texts))]
        parts, size = pieces(text), len(old.split()) * (LETTERS if DENSE.search(text) else 1)
        first = self.random.integers(max(len(parts) - size, 0) + 1)
        return _bare("".join(parts[first : first + size])) or old


def _bare(words: str) -> str:
    """Without blanks and signs at both ends."""
    sign = [unicodedata.category(letter)[0] in "PSZC" for letter in words]
    kept = [place for place, is_sign in enumerate(sign) if not is_sign]
    return words[kept[0] : kept[-1] + 1] if kept else ""


def _switched(record: Record, draw: _Draw) -> Record:
    """The row with a share of its slots, or entities, in other words."""
    entities = record.fields.get("entities") is not None
    names = ("text",) if entities else ("utterance", "utt")
    text, spans = text_of(record, *names), (entity_spans if entities else slot_spans)(record)
    found, new = _places(record, text, spans), list(spans)
    end = len(text)
    # From the last place to the first, so that those to come stay where they are.
    for number in sorted(found, key=lambda one: found[one], reverse=True):
        start, stop = found[number]
        if stop > end:  # within another, or across its border
            continue
        kind, old = spans[number]
        words = draw.words(old)
        text, end = text[:start] + words + text[stop:], start
        new[number] = (kind, words)
    if new == spans:
        return record
    kept = {name: value for name, value in record.fields.items() if name not in STALE}
    fields = {names[0]: text, "entities" if entities else "slots": [list(span) for span in new]}
    return replace(record, fields=kept | fields)


def _places(record: Record, text: str, spans: Sequence[Span]) -> dict[int, tuple[int, int]]:
    """Slot -> where its words stand in the text, of those of which that is certain."""
    given = record.fields.get("char_spans")
    given = given if isinstance(given, list) and len(given) == len(spans) else [None] * len(spans)
    found = {}
    for number, ((_, words), place) in enumerate(zip(spans, given, strict=True)):
        match place:
            case [int(start), int(stop)] if start >= 0 and text[start:stop] == words:
                found[number] = (start, stop)
            case _ if text.count(words) == 1:
                found[number] = (text.index(words), text.index(words) + len(words))
    return found
