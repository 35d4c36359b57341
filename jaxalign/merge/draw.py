"""The picture of a search: the score by weight, for all languages and for every group.

draw(found, Path("search.png"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxalign.evaluate.comparable import ALL
from jaxalign.evaluate.report import label
from jaxalign.merge.scored import LOSS, Search
from jaxalign.picture import GRID, INK, PALETTE, picture

MOST = 24  # candidates that a ranking shows


def draw(found: Search, path: Path) -> None:
    """Writes the PNG: curves where one weight distinguishes the candidates, else a ranking."""
    shape = _curves if len(found.free) == 1 else _ranking
    height = 4.2 if shape is _curves else 1.6 + 0.26 * min(MOST, len(found.candidates))
    with picture(path, 7, height, dpi=150, style={"font.size": 10}) as figure:
        shape(figure.subplots(), found)
        # Above the axes: within them it would cover some search's points.
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)


def _measure(found: Search) -> str:
    return "loss, nats" if found.metric == LOSS else label(found.metric)


def _colours(found: Search) -> dict[str, str]:
    named = [group for group in found.groups if group != ALL]
    return {group: PALETTE[at % len(PALETTE)] for at, group in enumerate(named)} | {ALL: INK}


def _shown(found: Search) -> list[str]:
    """The groups; 'all' only where no other group is the same languages."""
    same = [set(found.groups[group]) == set(found.groups[ALL]) for group in found.groups]
    return [group for group in found.groups if group != ALL or sum(same) == 1]


def _words(found: Search, group: str) -> str:
    languages = found.groups[group]
    if len(languages) == 1:
        return languages[0] if group == ALL else f"{group}: {languages[0]}"
    return f"mean of {group} ({len(languages)} languages)"


def _curves(axes: Any, found: Search) -> None:
    (place,) = found.free
    order = sorted(found.candidates, key=lambda candidate: candidate.weights[place])
    weights = [candidate.weights[place] for candidate in order]
    colours = _colours(found)
    for group in _shown(found):
        values = [found.of_group(candidate, group) for candidate in order]
        axes.plot(weights, values, "o-", color=colours[group], ms=4.5,
                  lw=2.2 if group == ALL else 1.5, label=_words(found, group))  # fmt: skip
    best = found.candidates[found.best].weights[place]
    axes.axvline(best, color="#888888", lw=0.9, ls=(0, (4, 3)), zorder=0)
    axes.annotate("best mean of all", (best, 1), (3, -2), textcoords="offset points", va="top",
                  xycoords=("data", "axes fraction"), color="#666666", fontsize=8)  # fmt: skip
    axes.grid(axis="y", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(_axis(found, place))
    axes.set_ylabel(_measure(found))


def _axis(found: Search, place: int) -> str:
    """What the horizontal axis is, the other weights included."""
    words = f"weight of {found.adapters[place]}"
    others = [other for other in range(len(found.adapters)) if other != place]
    fixed = [
        f"{found.adapters[other]} at {found.candidates[0].weights[other]:g}"
        for other in others
        if len({candidate.weights[other] for candidate in found.candidates}) == 1
    ]
    if fixed:
        words += f" ({', '.join(fixed)})"
    elif len(others) == 1:
        words += f" ({found.adapters[others[0]]} has the rest of 1)"
    return words


def _ranking(axes: Any, found: Search) -> None:
    sign = 1 if found.metric == LOSS else -1
    order = sorted(found.candidates, key=lambda one: sign * found.of_group(one, ALL))[:MOST]
    colours = _colours(found)
    for group in _shown(found):
        values = [found.of_group(candidate, group) for candidate in order]
        axes.plot(values, range(len(order)), "D" if group == ALL else "o", color=colours[group],
                  ms=5, label=_words(found, group))  # fmt: skip
    names = [", ".join(f"{weight:g}" for weight in candidate.weights) for candidate in order]
    axes.set_yticks(range(len(order)), names)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.grid(axis="both", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(_measure(found))
    axes.set_ylabel("weights of " + ", ".join(found.adapters))
