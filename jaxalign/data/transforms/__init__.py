"""Transforms: records in, records out, between the files and the task.

    transforms:
      - swap                                        # a name of TRANSFORMS
      - {name: sample, options: {rows: 300, by: lang}}
      - {name: my_data:switch, splits: [train, valid]}      # one's own, module:function

A transform is a function of (records, options, seed). It is applied to the training rows, and to
validation rows only where `splits` says so; those of `evaluate.transforms` to the rows that a model
is judged by. `origin` of a record stays the place in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxalign.data.sources import Record
from jaxalign.data.transforms.choices import choices, lettered, mixup
from jaxalign.data.transforms.code_switch import code_switch
from jaxalign.data.transforms.companions import bilingual_prompt, cross_lingual_answer
from jaxalign.data.transforms.question_translation import question_translation
from jaxalign.data.transforms.rows import part, sample, swap
from jaxalign.data.transforms.switch_values import switch_values
from jaxalign.errors import UserError, brief, first_line
from jaxalign.named import find

Transform = Callable[[Sequence[Record], Mapping[str, Any], int], list[Record]]
KEYS = ("name", "options", "splits")
SPLITS = ("train", "valid")


TRANSFORMS: dict[str, Transform] = {
    "sample": sample,
    "part": part,
    "swap": swap,
    "question_translation": question_translation,
    "code_switch": code_switch,
    "switch_values": switch_values,
    "bilingual_prompt": bilingual_prompt,
    "cross_lingual_answer": cross_lingual_answer,
    "choices": choices,
    "mixup": mixup,
    "lettered": lettered,
}


def transformed(
    records: list[Record], transforms: Sequence[Any], key: str, split: str, seed: int
) -> list[Record]:
    """The records after all transforms of this split.

    Args:
        transforms: names, or dicts of `name`, `options` and `splits`.
        key: the setting that lists them, for sentences.
        split: train, valid, or data, to which all of them apply.
        seed: of the run; the same records for the same seed.

    Raises:
        UserError: an unknown transform or key, one that fails, one that leaves no record, one
            that changes records which have a companion.
    """
    for number, entry in enumerate(transforms):
        where = f"{key}[{number}]"
        name, options, splits = _read(entry, where, KEYS if split in SPLITS else KEYS[:2])
        try:
            transform = find(name, TRANSFORMS, "transform")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if split in SPLITS and split not in splits:
            continue
        before = records
        try:
            records = list(transform(before, options, seed))
        except UserError as error:
            raise UserError(f"{where} ({name}): {error}") from error
        except Exception as error:  # one of somebody's own may fail in any way
            raise UserError(f"{where}: {name} fails: {first_line(error)}") from error
        if not all(isinstance(record, Record) for record in records):
            raise UserError(f"{where}: {name} returns something else than records")
        _check_companions(before, records, f"{where}: {name}")
        if not records:
            raise UserError(f"{where}: {name} leaves no row of {key.partition('.')[0]}.{split}")
    return records


def _check_companions(before: Sequence[Record], after: Sequence[Record], where: str) -> None:
    """Refuses to change one half of two rows that will be one.

    The other half, in the companion, would stay as it was; a new record has lost it.
    """
    joined: dict[str, list[Record]] = {}
    for record in before:
        if record.companion is not None:
            joined.setdefault(record.origin, []).append(record)
    alone = {record.origin for record in before if record.companion is None} if joined else set()
    for record in after if joined else ():
        were = [] if record.origin in alone else joined.get(record.origin, [])
        same = [r for r in were if r.companion is record.companion and r.fields == record.fields]
        if were and not same:
            raise UserError(
                f"{where} changes a row that another transform has joined with one of another "
                f"language ({record.origin}); put it in front of that transform"
            )


def _read(
    entry: Any, where: str, keys: Sequence[str]
) -> tuple[str, Mapping[str, Any], Sequence[str]]:
    """Name, options and splits of an entry of the list, which may have these keys."""
    entry = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise UserError(f"{where}: {brief(entry)} should be a name, or a dict of {', '.join(keys)}")
    unknown = next((one for one in entry if one not in keys), None)
    options, splits = entry.get("options") or {}, entry.get("splits") or SPLITS[:1]
    if unknown is not None or not isinstance(options, Mapping):
        raise UserError(f"{where}: {brief(unknown or options)} is not one of {', '.join(keys)}")
    if not isinstance(splits, list | tuple) or any(one not in SPLITS for one in splits):
        raise UserError(f"{where}.splits: {brief(splits)} should be a list of {', '.join(SPLITS)}")
    return entry["name"], options, splits
