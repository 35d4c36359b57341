"""Question translation (Zhang et al. 2024, "Getting More from Less", arXiv 2405.13816).

A model learns to translate the inputs of a task from its languages into the one that it knows best.
It sees no answer: what it learns of the task it can only learn from the inputs. The rows that come
out are of kind `translation` and hold nothing but two texts and their languages.

    transforms: [{name: question_translation, options: {directions: [x-en]}}]
    task.kind: translation

Released code (Shimao-Zhang/LLM-Multilingual-Learner): runs of LLaMA-Factory on files of 10,000
questions for each language, also between other languages (sw2zh, hi2zh). The wording of the
instruction is not in the repository; here it is that of the kind `translation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxalign.bounds import setting
from jaxalign.data.languages import split_direction
from jaxalign.data.sources import Record
from jaxalign.data.transforms.options import read
from jaxalign.data.transforms.parallel import check_known, items
from jaxalign.errors import UserError

ANY = "x"  # in a direction: each language but the other side's


@dataclass
class Options:
    """Options of `question_translation`."""

    directions: list[str] = setting([], "`de-en`; `x-en`: from all others; empty: into the pivot")
    pivot: str = setting("en", "the language by whose text pairs belong together")


def question_translation(
    records: Sequence[Record], options: Mapping[str, Any], seed: int
) -> list[Record]:
    """Translation rows between the inputs of parallel rows (`parallel.py`), without their answers.

    Raises:
        UserError: rows that are not parallel, or a direction that no row has.
    """
    chosen = read(Options, options)
    wanted = [_sides(name) for name in chosen.directions or [f"{ANY}-{chosen.pivot}"]]
    found = items(records, chosen.pivot)
    have = list(dict.fromkeys(language for item in found for language in item.texts))
    check_known([name for sides in wanted for name in sides if name != ANY], have)
    return [
        Record(
            {"src": item.texts[source], "tgt": item.texts[target], "src_lang": source,
             "tgt_lang": target},
            item.origin,
        )
        for item in found
        for source, target in dict.fromkeys(_pairs(wanted, list(item.texts)))
    ]  # fmt: skip


def _sides(direction: str) -> tuple[str, str]:
    for start, end in ((ANY + "-", ""), ("", "-" + ANY)):
        if direction.startswith(start) and direction.endswith(end):
            rest = direction[len(start) : len(direction) - len(end)]
            return (ANY, rest) if start else (rest, ANY)
    source, target = split_direction(direction)
    if not target:
        raise UserError(f"directions: {direction!r} should be two languages, as in de-en or x-en")
    return source, target


def _pairs(wanted: Sequence[tuple[str, str]], have: Sequence[str]) -> Iterator[tuple[str, str]]:
    for source, target in wanted:
        for language in have:
            one = language if source == ANY else source
            other = language if target == ANY else target
            if one != other and one in have and other in have:
                yield one, other
