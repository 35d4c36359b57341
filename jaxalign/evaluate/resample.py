"""Rows drawn with replacement, the same items in every language that has them.

Languages whose rows carry the same ids are translations of one test set, though one may lack a few
rows or half of them. Their scores rise and fall together, and the interval of their mean has to
know it. So what is drawn is items: all ids of languages that share any, once. Each language then
takes the drawn items that it has.

    pools({"en": items("en", ids_of_en, 250), "ja": items("ja", ids_of_ja, 125)})     # one pool
    for block, counts in resamples(pool, draws=1000, seed=1):
        counts["ja"]                                  # [draws, 125]: how often each row was drawn
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.evaluate.measure import Measure

BLOCK = 4_000_000  # picks held at a time: 32 MB of counts
Item = tuple[str, str, int]  # the language of rows without ids, the id, its number among equal ones


@dataclass(frozen=True)
class Pool:
    """Items that are drawn together."""

    name: str  # decides about the draws
    items: int
    rows: dict[str, np.ndarray]  # language -> the item of each of its rows


def items(language: str, ids: Sequence[str], rows: int) -> list[Item]:
    """What each row is known by; rows without ids are shared with no other language.

    Equal ids of one language are distinguished by their number: rows that all have the same id are
    not one item, whose resamples would be copies of each other.
    """
    if not ids:
        return [(language, "", number) for number in range(rows)]
    seen: Counter[str] = Counter()
    found = []
    for name in ids:
        found.append(("", name, seen[name]))
        seen[name] += 1
    return found


def pools(languages: Mapping[str, Sequence[Item]]) -> list[Pool]:
    """Languages in groups that share no item; the items of a group in the order they appear in."""
    groups: list[tuple[set[Item], list[str]]] = []
    for language, own in languages.items():
        have, inside = set(own), [language]
        apart = []
        for others, members in groups:
            if have.isdisjoint(others):
                apart.append((others, members))
            else:
                have, inside = have | others, members + inside
        groups = [*apart, (have, inside)]
    return [_pool({language: languages[language] for language in inside}) for _, inside in groups]


def _pool(languages: Mapping[str, Sequence[Item]]) -> Pool:
    union = list(dict.fromkeys(item for own in languages.values() for item in own))
    place = {item: number for number, item in enumerate(union)}
    # Rows without ids: the language's name decides, whatever their number.
    name = union[0][0] or "\n".join(name for _, name, _ in union)
    rows = {
        language: np.array([place[item] for item in own]) for language, own in languages.items()
    }
    return Pool(name, len(union), rows)


def resamples(pool: Pool, draws: int, seed: int) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """(which draws, language -> how often each of its rows is in them [draws, rows] float64).

    A block of draws at a time. As many items are drawn as there are, so a language that has only
    some of them gets more or fewer rows; where it gets none at all it keeps those it has.
    """
    rng = np.random.default_rng([seed, zlib.crc32(pool.name.encode("utf-8", "surrogatepass"))])
    size = max(1, BLOCK // pool.items)
    for start in range(0, draws, size):
        lines = min(size, draws - start)
        picks = rng.integers(0, pool.items, size=(lines, pool.items))
        picks += pool.items * np.arange(lines)[:, None]
        counts = np.bincount(picks.ravel(), minlength=lines * pool.items)
        counts = counts.reshape(lines, pool.items).astype(np.float64)
        found = {}
        for language, rows in pool.rows.items():
            own = counts[:, rows]
            own[~own.any(axis=1)] = 1
            found[language] = own
        yield slice(start, start + lines), found


@dataclass(frozen=True)
class Stack:
    """One language's measures of all systems and seeds: one product serves them all."""

    runs: list[tuple[str, int, list[Measure]]]  # measure, number of the system, its seeds
    parts: np.ndarray  # [rows, all their statistics]

    @classmethod
    def of(cls, runs: Iterable[tuple[str, int, list[Measure]]]) -> Stack:
        """The stack of these (measure, system, seeds)."""
        runs = list(runs)
        return cls(runs, np.hstack([one.parts for _, _, seeds in runs for one in seeds]))

    def scores(self, counts: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
        """Measure, system and scores [draws], mean over seeds, of rows drawn [draws, rows]."""
        sums, at = counts @ self.parts, 0
        for name, number, seeds in self.runs:
            found = []
            for measure in seeds:
                width = measure.parts.shape[1]
                found.append(measure.formula(sums[:, at : at + width]))
                at += width
            yield name, number, np.mean(found, axis=0)
