"""Which rows of the data are used, and which way round.

- {name: sample, options: {rows: 300, by: lang}}
- {name: part, options: {share: 0.8}}                                 # of the items, for training
- {name: part, options: {share: 0.8, rest: true}, splits: [valid]}    # the others
- swap
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxalign.bounds import setting
from jaxalign.data.pairs import form_of
from jaxalign.data.sources import Record, names
from jaxalign.data.transforms.options import read
from jaxalign.errors import UserError, brief


@dataclass
class Sample:
    """Options of `sample`."""

    rows: int = setting(0, "rows that are drawn", lowest=1)
    by: str = setting("", "as many of each value of this field")


def sample(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """`rows` records drawn without replacement, in file order; with `by`, as many of each value
    of this field."""
    rows = options.get("rows")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UserError(f"rows: {brief(rows)} should be a whole number, 1 or more")
    by = read(Sample, options).by
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        value = str(_field(record, by, "by")) if by else ""
        groups.setdefault(value, []).append(number)
    draw = np.random.default_rng(seed)
    chosen = (draw.permutation(group)[:rows] for group in groups.values())
    return [records[number] for number in sorted(np.concatenate([*chosen]))]


def swap(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """Sentence pairs the other way round: the source becomes the target."""
    if options:
        raise UserError(f"{next(iter(options))} is not an option; swap has none")
    return [replace(record, fields=_swapped(record)) for record in records]


def _swapped(record: Record) -> dict[str, Any]:
    """The fields of a pair with both sides exchanged, in the form in which the row is read."""
    fields, sides = record.fields, record.fields.get("translation")
    if form := form_of(fields):
        source, target, spoken, heard = form
        other = {source: target, target: source, spoken: heard, heard: spoken}
        return {other.get(name, name): value for name, value in fields.items()}
    if isinstance(sides, Mapping) and len(sides) == 2:  # the first language is the source
        return {**fields, "translation": dict(reversed([*sides.items()]))}
    raise UserError(f"{record.origin}: no sentence pair in this row (it has: {names(fields)})")


@dataclass
class Part:
    """Options of `part`."""

    of: str = setting("id", "rows with the same value of this field stay together")
    share: float = setting(0.5, "of the values", above=0, below=1)
    rest: bool = setting(False, "the other rows")
    cut: int = setting(1, "another number cuts elsewhere", lowest=0)  # 1: where runs of seed 1 cut


def part(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """The rows of a share of the items, or the rest of them; which ones depends on `cut` and on
    each row's `of`, so that translations of one item are on one side. It does not depend on the
    seed: what one run was trained on, no other one with these options is judged by.
    """
    chosen = read(Part, options)

    def inside(record: Record) -> bool:
        name = f"{chosen.cut}:{_field(record, chosen.of, 'of')}".encode("utf-8", "replace")
        place = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
        return (place < chosen.share) != chosen.rest

    return [record for record in records if inside(record)]


def _field(record: Record, name: str, option: str) -> Any:
    """The value of this field, which the option of this name says that every row has."""
    if name not in record.fields:
        raise UserError(f"{record.origin}: this row has no {name!r}; see the option {option}")
    return record.fields[name]
