"""What says the same in several languages, however the data write it.

{"id": "7", "doc": "news.12", "texts": {"en": "Hello", "de": "Hallo"}}     # one row, n languages
{"id": "7", "lang": "en", "utterance": "Hello"}                            # a row a language
{"text0": "Hallo", "text1": "Hello", "lang0": "de", "lang1": "en"}         # a sentence pair

items(records, pivot="en")[0].texts           # {'en': 'Hello', 'de': 'Hallo'}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxalign.bounds import check_text
from jaxalign.data.fields import language_of, text_of
from jaxalign.data.pairs import form_of, to_pair
from jaxalign.data.sources import Record, names, nearest
from jaxalign.errors import UserError, brief

TEXTS = ("utterance", "utt", "question", "text")
ROW = "row"  # of one language, which belongs together with others by its id
PAIR = "pair"  # belongs together with others by its text in the pivot language


@dataclass
class Item:
    """One sentence in each language."""

    origin: str
    id: str = ""
    doc: str = ""  # sentences of a document have the same; empty: one of its own
    texts: dict[str, str] = field(default_factory=dict)


def items(records: Sequence[Record], pivot: str) -> list[Item]:
    """The sentences of these rows, in the order in which they first come.

    Rows with a `lang` belong together by their `id`, pairs of one `doc` by their text in the pivot
    language. A pair is put to a sentence that lacks its other language; where all have it, such as
    a second German pair of one English text, or the same pair again, it is a sentence of its own.

    Raises:
        UserError: a row of none of these forms, or without what it belongs together by, or a
            second one of an `id` in a language, with another text.
    """
    found: dict[Any, Item] = {}
    first: dict[tuple[str, str], tuple[str, str]] = {}  # id, language -> origin, text
    times: Counter[Any] = Counter()  # that a language has come of a pair's text in the pivot
    for record in records:
        key, texts = _read(record, pivot)
        if key[0] == ROW:
            # Of two texts with one id, nothing says whose translation another row is.
            ((language, text),) = texts.items()
            origin, said = first.setdefault((key[1], language), (record.origin, text))
            if said != text:
                raise second(record.origin, key[1], language, origin)
        elif key[0] == PAIR:
            # The n-th pair of one language says the same as the n-th of another.
            came = (key, *sorted(texts))
            key, times[came] = (*key, times[came]), times[came] + 1
        item = found.setdefault(
            key, Item(record.origin, _named(record, "id"), _named(record, "doc"))
        )
        item.texts |= texts
    return list(found.values())


def by_item(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """id -> language -> row, of rows that have both.

    Raises:
        UserError: a row without an id or a language, or a second one of both.
    """
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        item, language = item_of(record), spoken(record)
        rows = found.setdefault(item, {})
        if language in rows:
            raise second(record.origin, item, language, rows[language].origin)
        rows[language] = record
    return found


def second(origin: str, item: str, language: str, first: str) -> UserError:
    """What refuses a second row of an item in a language: its translations would be the first's."""
    return UserError(
        f"{origin}: the id {brief(item)} has a row in {language!r} already ({first}); give each "
        "item an id of its own"
    )


def item_of(record: Record) -> str:
    """The id that a row shares with its translations."""
    found = _named(record, "id")
    if not found:
        raise UserError(
            f"{record.origin}: this row has no 'id', by which its translations are found (it has: "
            f"{names(record.fields)})"
        )
    return found


def _named(record: Record, field_: str) -> str:
    """A name that is text or a number; '' where there is none."""
    value = record.fields.get(field_)
    if value is None:
        return ""
    try:
        if not isinstance(value, str | int | float):
            raise ValueError
        return str(value)
    except ValueError as error:  # a number of 5,000 digits is none, either
        raise UserError(
            f"{record.origin}: {field_!r} should be text or a number, not {brief(value)}"
        ) from error


def spoken(record: Record) -> str:
    """The language of a row, which must name one."""
    language = language_of(record)
    if not language:
        raise UserError(f"{record.origin}: this row names no language in 'lang'")
    return language


def is_parallel(fields: Mapping[str, Any]) -> bool:
    """Whether a row alone says the same in several languages."""
    return "texts" in fields or "translation" in fields or form_of(fields) is not None


def check_known(wanted: Sequence[str], have: Sequence[str]) -> None:
    """Refuses languages that no row is in.

    Raises:
        UserError: naming the language, and those that there are.
    """
    for name in wanted:
        if name not in have:
            raise UserError(
                f"no row is in {name!r} (there are: {', '.join(sorted(have))}){nearest(name, have)}"
            )


def check_joined(records: Sequence[Record], joined: bool) -> None:
    """Refuses rows of several languages of which none has a translation: their ids do not match.

    Args:
        joined: whether a row has one.

    Raises:
        UserError: naming two rows.
    """
    first = records[0]
    other = next((one for one in records if spoken(one) != spoken(first)), None)
    if other is not None and not joined:
        raise UserError(
            f"no row has a translation: translations have the same 'id', and {first.origin} "
            f"({spoken(first)}) has {brief(item_of(first))}, {other.origin} ({spoken(other)}) "
            f"{brief(item_of(other))}"
        )


def _read(record: Record, pivot: str) -> tuple[tuple[Any, ...], dict[str, str]]:
    """What a row belongs together by, and its texts by language."""
    fields = record.fields
    if "texts" in fields:
        return ("texts", id(record)), _texts(record, fields["texts"])
    if "translation" in fields or form_of(fields):
        pair = to_pair(record)
        if not pair.source_language or not pair.target_language:
            raise UserError(f"{record.origin}: this pair does not name its two languages")
        texts = {pair.source_language: pair.source, pair.target_language: pair.target}
        return (PAIR, _named(record, "doc"), texts.get(pivot, id(record))), texts
    return (ROW, item_of(record)), {spoken(record): text_of(record, *TEXTS)}


def _texts(record: Record, texts: Any) -> dict[str, str]:
    if not isinstance(texts, Mapping) or not texts:
        raise UserError(f"{record.origin}: 'texts' should be a mapping from languages to texts")
    for language, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{record.origin}: the text in {language!r} is {brief(text)}")
        check_text(f"{record.origin}: the text in {language!r}", text)
    return {str(language): text for language, text in texts.items()}
