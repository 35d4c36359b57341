"""Warnings about the shape of states, one line for all layers and languages that share them.

alarms = Alarms(("cy", "de", "en"))
alarms.add(layer, collapse(states))          # of every layer
alarms.lines()       # ['layers 4 to 17, all 3 languages: one dimension (443) carries ...']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from jaxalign.probe.collapse import FLAGS, Collapse

NAMED = 6  # languages that a line names one by one
Cell = dict[str, float]


class Alarms:
    """Flags of every layer and language of one system and pooling."""

    def __init__(self, languages: Sequence[str], pooling: str = "") -> None:
        """`pooling` is named where there are several."""
        self.languages, self.pooling = tuple(languages), pooling
        self.found: dict[str, dict[int, dict[str, list[Cell]]]] = {}  # flag -> layer -> language

    def add(self, layer: int, shape: Collapse) -> None:
        """The flags of a layer."""
        for place, flags in enumerate(shape.flags):
            for flag in flags:
                at = self.found.setdefault(flag, {}).setdefault(layer, {})
                at.setdefault(self.languages[place], []).append(shape.numbers(place))

    def lines(self) -> list[str]:
        """A line for each flag and each set of languages, what concerns most states first."""
        found: list[tuple[int, str]] = []
        for flag in FLAGS:
            layers = self.found.get(flag, {})
            sets: dict[tuple[str, ...], list[int]] = {}
            for layer in sorted(layers):
                sets.setdefault(tuple(sorted(layers[layer])), []).append(layer)
            for languages, where in sets.items():
                cells = [
                    cell for layer in where for row in layers[layer].values() for cell in row
                ]  # fmt: skip
                text = f"{_ranges(where)}{self._of()}, {self._who(languages)}: {_say(flag, cells)}"
                found.append((len(cells), text))
        return [text for _, text in sorted(found, key=lambda one: -one[0])]

    def _of(self) -> str:
        return f" ({self.pooling} pooling)" if self.pooling else ""

    def _who(self, languages: tuple[str, ...]) -> str:
        if len(languages) == len(self.languages) > 1:
            return f"all {len(languages)} languages"
        shown = ", ".join(languages[:NAMED])
        more = len(languages) - NAMED
        return shown if more <= 0 else f"{shown} and {more} more languages"


def merged(parts: Sequence[Alarms]) -> Alarms:
    """The flags of several corpora together; a language may be in more than one."""
    languages = sorted({language for part in parts for language in part.languages})
    whole = Alarms(languages, parts[0].pooling)
    for part in parts:
        for flag, layers in part.found.items():
            for layer, rows in layers.items():
                at = whole.found.setdefault(flag, {}).setdefault(layer, {})
                for language, cells in rows.items():
                    at.setdefault(language, []).extend(cells)
    return whole


def _say(flag: str, cells: list[Cell]) -> str:
    """The flag's sentence with the range of each number."""
    usual = Counter(cell["dimension_of_it"] for cell in cells).most_common(2)
    several = len(usual) > 1
    spans = {name: Span(cell[name] for cell in cells) for name in cells[0]}
    place = f"number {usual[0][0]:.0f}" + (" most often" if several else "")
    words: dict[str, object] = {**spans, "dimension_of_it": place}
    return FLAGS[flag].format(**words)


class Span:
    """Numbers that are formatted as `0.94`, or `0.94 to 0.98` where they differ."""

    def __init__(self, values: Iterable[float]) -> None:
        """At least one number."""
        self.values = list(values)

    def __format__(self, spec: str) -> str:
        low, high = (format(end(self.values), spec) for end in (min, max))
        if low == high:
            return low
        return f"{low.removesuffix('%')} to {high}"


def _ranges(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 3 to 7`, `layers 0, 3 to 7 and 12`."""
    parts = []
    for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        numbers = [layer for _, layer in run]
        parts.append(f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 2 else
                     " and ".join(map(str, numbers)))  # fmt: skip
    words = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {words}"
