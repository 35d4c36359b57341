"""Task items in several languages: is each answer nearest to its own translation, layer by layer?

    items = read_items('belebele.jsonl', ['cy', 'en'])
    items['cy'][0]                                 # a text for each option, with the premise
    found = measure_items(base, system, items, pivot='en')
    found['dali']['cy'][16]                        # share of items aligned after block 16

DALI (Ravisankar et al. 2025, arXiv 2504.09378) asks this of the very items that a model is tested
on: rows of `id`, `lang`, `premise` and `options`, the same ids in every language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxalign.base import Base
from jaxalign.data import sources
from jaxalign.data.languages import find_language
from jaxalign.errors import UserError
from jaxalign.generate import System
from jaxalign.probe.dali import dali
from jaxalign.probe.states import pooled_states

VARIANTS = {"dali": "plain", "dali_strong": "strong"}
Items = dict[str, list[list[str]]]  # language -> items -> texts of premise and option


def read_items(source: str, languages: Sequence[str]) -> Items:
    """The items that all probed languages have, in one order.

    Args:
      source: file, glob or dataset of rows `{"id", "lang", "premise", "options": [...]}`.
      languages: those that are probed; others are left out.

    Raises:
      UserError: a field is missing, options differ in number, fewer than two of the languages or
        no item in all of them.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for record in sources.read(source):
        fields = record.fields
        lacking = [name for name in ("id", "lang", "premise", "options") if name not in fields]
        if lacking:
            raise UserError(
                f"{record.origin}: an item needs id, lang, premise and options; {lacking[0]} is "
                "missing"
            )
        options = fields["options"]
        if (
            not isinstance(options, list)
            or len(options) < 2
            or any(not str(text).strip() for text in options)
        ):
            raise UserError(f"{record.origin}: options should be a list of at least two texts")
        texts = [f"{fields['premise']} {option}" for option in options]
        language = find_language(str(fields["lang"]), languages)
        if language in languages:
            rows = found.setdefault(language, {})
            if str(fields["id"]) in rows:
                raise UserError(
                    f"{record.origin}: {language} has the item {fields['id']!r} twice; keep one row"
                )
            rows[str(fields["id"])] = texts
    if len(found) < 2:
        raise UserError(
            f"{source}: items of {', '.join(found) or 'none'} of the probed languages "
            f"({', '.join(languages)}); give them in two or more"
        )
    shared = sorted(set.intersection(*(set(items) for items in found.values())))
    if not shared:
        raise UserError(f"{source}: no id occurs in all of {', '.join(found)}")
    counts = {len(items[shared[0]]) for items in found.values()}
    for name in shared:
        counts |= {len(items[name]) for items in found.values()}
        if len(counts) > 1:
            raise UserError(
                f"{source}: item {name!r} has {sorted(counts)} options; all items need the same "
                "number in every language"
            )
    return {language: [items[name] for name in shared] for language, items in found.items()}


def check_pivot(items: Items, pivot: str) -> None:
    """Refuses items without the pivot language.

    Raises:
      UserError: they have none.
    """
    if pivot not in items:
        raise UserError(
            f"the items have no pivot language {pivot!r} (they have: {', '.join(items)})"
        )


def measure_items(
    base: Base,
    system: System,
    items: Items,
    pivot: str,
    batch_size: int = 32,
    report: Callable[[int], None] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """DALI and its strong form of every language with the pivot, at every layer.

    The state of premise + option is that of its last token, as in the paper.

    Returns:
      dali and dali_strong -> language -> [L+1]: share of items that are aligned.

    Raises:
      UserError: the items have no pivot language.
    """
    check_pivot(items, pivot)
    states = {}
    for language, rows in items.items():
        texts = [text for options in rows for text in options]
        found = pooled_states(base, system, texts, ("last",), None, batch_size, report)["last"]
        states[language] = found.reshape(len(found), len(rows), -1, found.shape[-1])
    shares: dict[str, dict[str, np.ndarray]] = {}
    for name, variant in VARIANTS.items():
        shares[name] = {
            language: np.array(
                [
                    dali(x, y, variant=variant).mean()
                    for x, y in zip(states[pivot], states[language], strict=True)
                ]
            )
            for language in items
            if language != pivot
        }
    return shares
