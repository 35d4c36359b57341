"""Task items in several languages: is each answer nearest to its own translation, layer by layer?

    items = read_items('belebele.jsonl', ['cy', 'en'])
    items['cy'][0]                                 # a text for each option, with the premise
    found = measure_items(base, system, items, pivot='en')
    found['dali']['cy'][16]                        # share of items aligned after block 16

DALI (Ravisankar et al. 2025, arXiv 2504.09378) asks this of the very items that a model is tested
on: rows of `id`, `lang`, `premise` and `options`, the same ids in every language.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxalign.base import Base
from jaxalign.data import sources
from jaxalign.data.languages import find_language
from jaxalign.errors import UserError
from jaxalign.generate import System
from jaxalign.probe.corpus import shared_ids
from jaxalign.probe.dali import dali
from jaxalign.probe.states import lengths_of, pooled_states

VARIANTS = {"dali": "plain", "dali_strong": "strong"}


class Items(dict[str, list[list[str]]]):
    """Language -> items -> texts of premise and option; `notes` say what was left out."""

    def __init__(self, texts: Mapping[str, list[list[str]]], notes: tuple[str, ...] = ()) -> None:
        """`notes` are sentences for the report."""
        super().__init__(texts)
        self.notes = notes


def read_items(source: str, languages: Sequence[str]) -> Items:
    """The items that all probed languages have, in one order; a note counts the others.

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
            f"{source} has items in {', '.join(found) or 'none'} of the probed languages "
            f"({', '.join(languages)}); give them in two or more"
        )
    shared, notes = shared_ids(found, source)
    shared = sorted(shared)
    counts = {len(items[shared[0]]) for items in found.values()}
    for name in shared:
        counts |= {len(items[name]) for items in found.values()}
        if len(counts) > 1:
            raise UserError(
                f"{source}: item {name!r} has {sorted(counts)} options; all items need the same "
                "number in every language"
            )
    return Items({a: [items[name] for name in shared] for a, items in found.items()}, notes)


def readable(base: Base, items: Items) -> Items:
    """The items that the base reads whole in every language; a note counts the others.

    The option is the end of a text: without it, all options of an item would be the same.

    Raises:
      UserError: it reads none of them.
    """
    most = base.spec.max_position
    long: set[int] = set()
    for rows in items.values():
        owners = [number for number, options in enumerate(rows) for _ in options]
        lengths = lengths_of(base, [text for options in rows for text in options])
        long |= {owner for owner, n in zip(owners, lengths, strict=True) if n > most}
    if not long:
        return items
    number = len(next(iter(items.values())))
    what = f"of {number:,} items {len(long):,} are longer than the {most:,} tokens of the model"
    if len(long) == number:
        raise UserError(f"--items: {what}; give shorter ones")
    kept = {a: [one for n, one in enumerate(rows) if n not in long] for a, rows in items.items()}
    return Items(kept, (*items.notes, f"{what.capitalize()} and were left out."))


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

    The state of premise + option is that of its last token, as in the paper. The model reads as
    many tokens as it has places for; `readable` leaves out longer items.

    Returns:
      dali and dali_strong -> language -> [L+1]: share of items that are aligned.

    Raises:
      UserError: the items have no pivot language.
    """
    check_pivot(items, pivot)
    states = {}
    for language, rows in items.items():
        texts = [text for options in rows for text in options]
        found = pooled_states(
            base, system, texts, ("last",), None, batch_size, report, longest=base.spec.max_position
        )["last"]
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
