"""The fields of a row as a task needs them: there, of the right kind, not empty.

text_of(record, "utterance", "utt")      # the first of them that the row has
language_of(record)                      # 'de'; '' where the row names none
"""

from __future__ import annotations

from typing import Any

from jaxalign.bounds import check_text
from jaxalign.data.sources import Record, names, nearest
from jaxalign.errors import UserError, brief


def value_of(record: Record, *either: str) -> Any:
    """The first of these fields that the record has."""
    for name in either:
        if record.fields.get(name) is not None:
            return record.fields[name]
    way_out = f" Name the column with {record.columns}.{either[0]}=..." if record.columns else ""
    raise UserError(
        f"{record.origin}: this row has no {either[0]!r} (it has: {names(record.fields)})"
        f"{nearest(either[0], record.fields)}{way_out}"
    )


def string_of(record: Record, *either: str) -> str:
    """The first of these fields, which must be text."""
    value = value_of(record, *either)
    if not isinstance(value, str):
        raise UserError(
            f"{record.origin}: {either[0]!r} must be text, not {type(value).__name__} "
            f"({brief(value)})"
        )
    check_text(f"{record.origin}: {either[0]!r}", value)
    return value


def text_of(record: Record, *either: str) -> str:
    """The first of these fields, which must be text with something in it."""
    value = string_of(record, *either)
    if not value.strip():
        raise UserError(f"{record.origin}: {either[0]!r} is empty; fill it or remove the row")
    return value


def language_of(record: Record) -> str:
    """The language that a row names in `lang`, `language` or `locale`; '' where it names none."""
    name = next((n for n in ("lang", "language", "locale") if record.fields.get(n)), None)
    return text_of(record, name) if name else ""
