"""Parallel sentences: what the alignment objective compares.

A pair is two plain sentences, without chat template or instruction; each is encoded with the
tokenizer's own special tokens, as in the paper. `FORMS` lists the field names that are understood.

    fields = {"text0": "Hallo", "text1": "Hello", "lang0": "de", "lang1": "en"}
    pair = to_pair(Record(fields, origin="pairs.jsonl:1"))
    pair.language                                     # 'de-en'
    encode_pairs([pair], tokenizer, max_length=2048)  # [EncodedPair(...)]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.bounds import check_text
from jaxalign.data.batch import EncodedPair
from jaxalign.data.chat import encode_texts
from jaxalign.data.languages import direction
from jaxalign.data.sampling import derangement
from jaxalign.data.sources import Record, names, nearest
from jaxalign.errors import UserError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (source, target, language of the source, language of the target); the first form present wins
FORMS = (
    ("text0", "text1", "lang0", "lang1"),
    ("text_parallel_0", "text_parallel_1", "lang_0", "lang_1"),
    ("source", "target", "source_lang", "target_lang"),
    ("src", "tgt", "src_lang", "tgt_lang"),
)


@dataclass(frozen=True)
class Pair:
    """Two sentences that say the same."""

    source: str
    target: str
    source_language: str = ""
    target_language: str = ""
    origin: str = ""

    @property
    def languages(self) -> tuple[str, str]:
        """Of the source, of the target."""
        return self.source_language, self.target_language

    @property
    def language(self) -> str:
        """'de-en'; '' where the data names no languages."""
        return direction(self.languages)


def form_of(fields: Mapping[str, Any]) -> tuple[str, str, str, str] | None:
    """The form of which a row has both sides; half of one is a field that is called so."""
    return next((form for form in FORMS if form[0] in fields and form[1] in fields), None)


def to_pair(record: Record) -> Pair:
    """The sentence pair of a record.

    Raises:
        UserError: no known form, or a side without text; names file:line.
    """
    fields = record.fields
    sides = fields.get("translation")
    form = form_of(fields)
    if form is not None:
        source, target, *languages = (fields.get(name) for name in form)
    elif isinstance(sides, Mapping) and len(sides) == 2:
        languages = list(sides)
        source, target = sides.values()
    else:
        half = next((f for f in FORMS if f[0] in fields or f[1] in fields), FORMS[0])
        missing = half[1] if half[0] in fields else half[0]
        key = record.columns
        way_out = f" Name the columns with {key}.text0=... and {key}.text1=..." if key else ""
        raise UserError(
            f"{record.origin}: no sentence pair in this row, {missing!r} is missing (it has: "
            f"{names(fields)}){nearest(missing, fields)}{way_out}"
        )
    wrong = next((name for name in languages if name is not None and type(name) is not str), None)
    if wrong is not None:
        raise UserError(f"{record.origin}: {brief(wrong)} is not the code of a language")
    source_language, target_language = (name or "" for name in languages)
    return Pair(
        source=_sentence(record, "source", source),
        target=_sentence(record, "target", target),
        source_language=source_language,
        target_language=target_language,
        origin=record.origin,
    )


def _sentence(record: Record, side: str, text: Any) -> str:
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{record.origin}: the {side} side of this pair must be text, not "
            f"{type(text).__name__} ({brief(text)})"
        )
    if not text or not text.strip():
        raise UserError(
            f"{record.origin}: the {side} side of this pair is empty; a sentence without "
            "tokens cannot be pooled, so fill or remove the row"
        )
    check_text(f"{record.origin}: the {side} side", text)
    return text


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedPair]:
    """Both sides as tokens, cut on the right to `max_length`.

    Raises:
        UserError: a side has no token at all.
    """
    texts = [text for pair in pairs for text in (pair.source, pair.target)]
    ids, whole = encode_texts(texts, tokenizer, max_length, control="text")
    out = []
    for i, pair in enumerate(pairs):
        source, target = ids[2 * i], ids[2 * i + 1]
        if not len(source) or not len(target):
            raise UserError(
                f"{pair.origin}: one side of this pair is empty, it has no token in this "
                "tokenizer's vocabulary; remove the row"
            )
        longer = max(whole[2 * i], whole[2 * i + 1])
        out.append(
            EncodedPair(
                source,
                target,
                pair.language,
                pair.origin,
                longer,
                pair.languages,
            )
        )
    return out


def shuffle_targets(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The control run's data: every target moves to another source of the same languages.

    Amount, lengths and languages stay; only the meaning no longer agrees. What a run gains with
    these pairs is not due to alignment.

    Raises:
        UserError: fewer than two pairs.
    """
    if len(pairs) < 2:
        raise UserError("align.control=shuffled needs at least two pairs to exchange targets")
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.language, []).append(i)
    partner = derangement([np.array(g) for g in groups.values()], seed)
    return [
        dataclasses.replace(pair, target=pairs[j].target, target_language=pairs[j].target_language)
        for pair, j in zip(pairs, partner, strict=True)
    ]
