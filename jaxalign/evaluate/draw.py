"""The picture of a comparison: what each language gained over the baseline, and how surely.

draw(compare(systems, groups), Path("report.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxalign.data.languages import LANGUAGE_NAMES, base_language, resource_class
from jaxalign.evaluate.compare import Comparison
from jaxalign.evaluate.report import by_group, label
from jaxalign.picture import GRID, INK, PALETTE, REST, picture

COLUMNS = 4  # panels in a row
SURE = 0.05


def ordered(comparison: Comparison) -> list[str]:
    """Languages with the least resources first, among equals the baseline's worst first.

    Languages without a known class come before all: most of the world's are of the lowest.
    """
    scores = next(iter(comparison.measures.values())).languages[comparison.systems[0]]
    return sorted(
        comparison.rows, key=lambda name: (resource_class(name) or 0, scores[name].mean, name)
    )


def draw(comparison: Comparison, path: Path) -> None:
    """Writes the PNG: a panel for each system of gains over the baseline in the main measure.

    Markers are filled where p < 0.05. With nothing to compare, the one system's scores are drawn.
    """
    systems = comparison.systems[1:] or comparison.systems
    languages = ordered(comparison)
    across = min(COLUMNS, len(systems))
    down = -(-len(systems) // across)
    lines = len(languages) + len(_means(comparison)) + 1
    size = (2.2 + 3.1 * across if across > 1 else 6.4, (1.4 + 0.19 * lines) * down + 0.5)
    with picture(path, *size, style={"axes.spines.left": False}) as figure:
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for axes, system in zip(panels.flat, systems, strict=False):
            _panel(axes, comparison, system, languages)
        for axes in panels.flat[len(systems) :]:
            axes.set_visible(False)
        for row in panels:
            visible = [axes for axes in row if axes.get_visible()]
            _classes(row, visible[-1], languages)
        _words(figure, comparison, languages)
        _legend(figure, comparison)


def _means(comparison: Comparison) -> list[str]:
    """Groups whose mean says more than a language's line."""
    return [group for group, inside in comparison.groups.items() if len(inside) > 1]


def _colours(comparison: Comparison) -> dict[str, str]:
    named = [group for group in comparison.groups if group not in ("all", "other")]
    found = {group: PALETTE[number % len(PALETTE)] for number, group in enumerate(named)}
    return {**found, "other": REST, "all": INK if named else REST}


def _panel(axes: Any, comparison: Comparison, system: str, languages: list[str]) -> None:
    """Bars of languages from the top, a gap, then diamonds of the groups' means."""
    colours = _colours(comparison)
    groups = {name: group for group, names in by_group(comparison).items() for name in names}
    means = _means(comparison)
    for place, language in enumerate(languages):
        value, low, high, sure = _line(comparison, system, language, "language")
        colour = colours[groups[language]]
        axes.barh(place, value, 0.72, color=colour, alpha=0.35, lw=0)
        _marker(axes, place, (value, low, high), colour, "o" if sure else "hollow")
    for place, group in enumerate(means, len(languages) + 1):
        value, low, high, sure = _line(comparison, system, group, "group")
        _marker(axes, place, (value, low, high), colours[group], "D" if sure else "hollow D")
    axes.axhline(len(languages), color="#cccccc", lw=0.8)
    axes.axvline(0, color="#444444", lw=0.8)
    axes.grid(axis="x", color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    places = [*range(len(languages)), *range(len(languages) + 1, len(languages) + 1 + len(means))]
    words = [*map(_name, languages), *(f"mean of {group}" for group in means)]
    axes.set_yticks(places, words)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(languages) + len(means) + 0.6, -0.7)
    axes.set_title(system, fontsize=10)


def _line(
    comparison: Comparison, system: str, name: str, level: str
) -> tuple[float, float, float, bool]:
    """Value, ends of the interval, and whether p < 0.05, of a gain or of the only system."""
    found = next(iter(comparison.measures.values()))
    if len(comparison.systems) > 1:
        gains = found.language_gains if level == "language" else found.group_gains
        gain = gains[system][name]
        return gain.gain, gain.low, gain.high, gain.p < SURE
    score = (found.languages if level == "language" else found.groups)[system][name]
    std = score.std or 0.0
    return score.mean, score.mean - std, score.mean + std, True


def _marker(
    axes: Any, place: int, line: tuple[float, float, float], colour: str, shape: str
) -> None:
    value, low, high = line
    axes.plot([low, high], [place, place], "-", color=colour, lw=1.3, solid_capstyle="butt")
    axes.plot(
        value, place, shape[-1] if shape.endswith("D") else "o", color=colour, ms=4.5,
        mfc="white" if shape.startswith("hollow") else colour, mew=1.2,
    )  # fmt: skip


def _name(language: str) -> str:
    # With a hyphen it is a variety ('de-st') or a direction ('de-en'), not that language.
    name = None if "-" in language else LANGUAGE_NAMES.get(base_language(language))
    return f"{name} {language}" if name else language


def _classes(row: Sequence[Any], last: Any, languages: list[str]) -> None:
    """Dashes between resource classes, their numbers next to the last panel."""
    for number, inside in groupby(enumerate(languages), lambda item: resource_class(item[1])):
        places = [place for place, _ in inside]
        if places[0]:
            for axes in row:
                axes.axhline(places[0] - 0.5, color="#bbbbbb", lw=0.6, ls=(0, (4, 4)), zorder=0)
        if number is not None:
            last.text(1.01, sum(places) / len(places), f"class {number}", color="#666666",
                      fontsize=7, va="center", transform=last.get_yaxis_transform())  # fmt: skip


def _words(figure: Any, comparison: Comparison, languages: list[str]) -> None:
    what = label(next(iter(comparison.measures)))
    if len(comparison.systems) > 1:
        what = f"gain over {comparison.systems[0]}: {what.replace(', %', ', percentage points')}"
        what += f" ({comparison.confidence} % intervals)"
    if any(resource_class(language) is not None for language in languages):
        what += "\nlanguages by resource class of Joshi et al. (2020)"
    figure.supxlabel(what, fontsize=8)


def _legend(figure: Any, comparison: Comparison) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = _colours(comparison)
    handles: list[Any] = [
        Patch(color=colours[group], alpha=0.6, lw=0, label=group)
        for group in by_group(comparison)
        if group != "all"
    ]
    dot: dict[str, Any] = {"marker": "o", "ls": "-", "color": "#444444", "ms": 4.5, "lw": 1.3}
    if len(comparison.systems) > 1:
        handles += [
            Line2D([], [], label=f"p < {SURE}", **dot),
            Line2D([], [], mfc="white", label=f"p ≥ {SURE}", **dot),
        ]
    elif max(comparison.seeds.values()) > 1:
        handles.append(Line2D([], [], label="± standard deviation over seeds", **dot))
    # Inches of a key and its words at 8 points; what does not fit in one line gets two or more.
    widths = [0.5 + 0.062 * len(handle.get_label()) for handle in handles]
    columns = max(1, int(figure.get_figwidth() / max(widths, default=1)))
    columns = len(handles) if sum(widths) < figure.get_figwidth() else columns
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False,
                      fontsize=8, columnspacing=1.4, handletextpad=0.5)  # fmt: skip
