"""Transforms: records in, records out, between the files and the task.

    transforms:
      - swap                                        # a name of TRANSFORMS
      - {name: sample, options: {rows: 300, by: language}}
      - {name: my_data:switch, splits: [train, valid]}      # one's own, module:function

A transform is a function of (records, options, seed). It is applied to the training rows, and to
validation rows only where `splits` says so. `origin` of a record stays the place in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxalign.data.pairs import FORMS
from jaxalign.data.sources import Record
from jaxalign.errors import UserError, brief, first_line
from jaxalign.named import find

Transform = Callable[[Sequence[Record], Mapping[str, Any], int], list[Record]]
KEYS = ("name", "options", "splits")
SPLITS = ("train", "valid")


def sample(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """`rows` records drawn without replacement, in file order; with `by`, as many of each value
    of this field."""
    rows = options.get("rows")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UserError(f"rows: {brief(rows)} should be a whole number, 1 or more")
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        value = str(record.fields.get(options["by"], "")) if "by" in options else ""
        groups.setdefault(value, []).append(number)
    draw = np.random.default_rng(seed)
    chosen = (draw.permutation(group)[:rows] for group in groups.values())
    return [records[number] for number in sorted(np.concatenate([*chosen]))]


def swap(records: Sequence[Record], options: Mapping[str, Any], seed: int) -> list[Record]:
    """Sentence pairs the other way round: the source becomes the target."""
    return [replace(record, fields=_swapped(record.fields)) for record in records]


TRANSFORMS: dict[str, Transform] = {"sample": sample, "swap": swap}


def transformed(
    records: list[Record], transforms: Sequence[Any], key: str, split: str, seed: int
) -> list[Record]:
    """The records after all transforms of this split.

    Args:
        transforms: names, or dicts of `name`, `options` and `splits`.
        key: the setting that lists them, for sentences.
        seed: of the run; the same records for the same seed.

    Raises:
        UserError: an unknown transform or key, one that fails, one that leaves no record.
    """
    for number, entry in enumerate(transforms):
        where = f"{key}[{number}]"
        name, options, splits = _read(entry, where)
        try:
            transform = find(name, TRANSFORMS, "transform")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if split not in splits:
            continue
        try:
            records = list(transform(records, options, seed))
        except UserError as error:
            raise UserError(f"{where} ({name}): {error}") from error
        except Exception as error:  # one of somebody's own may fail in any way
            raise UserError(f"{where}: {name} fails: {first_line(error)}") from error
        if not all(isinstance(record, Record) for record in records):
            raise UserError(f"{where}: {name} returns something else than records")
        if not records:
            raise UserError(f"{where}: {name} leaves no row of {key.partition('.')[0]}.{split}")
    return records


def _read(entry: Any, where: str) -> tuple[str, Mapping[str, Any], Sequence[str]]:
    """Name, options and splits of an entry of the list."""
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise UserError(f"{where}: {brief(entry)} should be a name, or a dict of {', '.join(KEYS)}")
    unknown = next((one for one in entry if one not in KEYS), None)
    options, splits = entry.get("options") or {}, entry.get("splits") or SPLITS[:1]
    if unknown is not None or not isinstance(options, Mapping):
        raise UserError(f"{where}: {brief(unknown or options)} is not one of {', '.join(KEYS)}")
    if isinstance(splits, str) or not set(splits) <= set(SPLITS):
        raise UserError(f"{where}.splits: {brief(splits)} should be a list of {', '.join(SPLITS)}")
    return entry["name"], options, splits


def _swapped(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a pair with both sides exchanged, in whatever form they are."""
    other: dict[str, str] = {}
    for source, target, spoken, heard in FORMS:
        other |= {source: target, target: source, spoken: heard, heard: spoken}
    return {other.get(name, name): value for name, value in fields.items()}
