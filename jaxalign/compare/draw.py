"""The picture of a comparison: what each system gained where it had no task data, against its cost.

draw(found, Path('transfer.png'))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxalign.compare.report import TRANSFER, Facts, Found
from jaxalign.evaluate.comparable import ALL
from jaxalign.evaluate.compare import Gain
from jaxalign.evaluate.report import label
from jaxalign.picture import GRID, INK, PALETTE, picture

SURE = 0.05
LABEL = (0.2, 11.0)  # of a system's name: share of the axes' width, points of height


def draw(found: Found, path: Path) -> None:
    """Writes the PNG: a point for each system but the baseline, of the first evaluation.

    Its height is the gain over the baseline with its interval, its place the training's cost as a
    multiple of the baseline's: in FLOPs where all logs have them, else in seconds.
    """
    comparison = next(iter(found.comparisons.values()))
    measure, values = next(iter(comparison.measures.items()))
    group = TRANSFER if TRANSFER in comparison.groups else ALL
    baseline, *others = comparison.systems
    unit = "flops" if all(x.flops for many in found.facts.values() for x in many) else "seconds"
    cost = {system: _mean(many, unit) for system, many in found.facts.items()}
    with picture(path, 6.8, 0.32 * len(others) + 3.2) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=INK, lw=0.8)
        axes.plot([1], [0], "s", color=INK, ms=5)
        axes.annotate(baseline, (1, 0), (4, -10), textcoords="offset points", fontsize=8)
        points = {}
        for number, system in enumerate(others):
            gain: Gain = values.group_gains[system][group]
            at = cost[system] / cost[baseline] if cost[system] and cost[baseline] else 1.0
            colour = PALETTE[number % len(PALETTE)]
            axes.plot([at, at], [gain.low, gain.high], color=colour, lw=1.2, alpha=0.7)
            sure = gain.p < SURE
            axes.plot([at], [gain.gain], "o", ms=5, color=colour, mfc=colour if sure else "white")
            points[system] = at, gain.gain, colour
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        tall = LABEL[1] / 72 / (figure.get_figheight() * axes.get_position().height)
        places = {system: (x, y) for system, (x, y, _) in points.items()}
        size = LABEL[0] * (right - left), tall * (high - low)
        for system, y in apart(places, *size).items():
            at, _, colour = points[system]
            axes.annotate(
                system, (at, y), (5, 3), textcoords="offset points", fontsize=8, color=colour
            )
        axes.grid(color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        what = "FLOPs" if unit == "flops" else "seconds of updates"
        axes.set_xlabel(f"{what} of the training, times those of {baseline}")
        inside = len(comparison.groups[group])
        axes.set_ylabel(f"{label(measure)}: gain in {inside} languages ({group})")
        seeds = max(comparison.seeds.values())
        axes.set_title(
            f"{found.title} ({seeds} seed{'s' if seeds > 1 else ''}; lines: "
            f"{comparison.confidence} %, filled: p < {SURE})",
            fontsize=9, loc="left",
        )  # fmt: skip


def apart(
    points: Mapping[str, tuple[float, float]], width: float, height: float
) -> dict[str, float]:
    """The height of each point's name, so that names of this size do not cover one another.

    The highest stays where its point is, and others go down as far as those above them ask for.
    """
    placed: dict[str, float] = {}
    for name, (x, y) in sorted(points.items(), key=lambda item: -item[1][1]):
        near = sorted((placed[other] for other in placed if abs(points[other][0] - x) < width),
                      reverse=True)  # fmt: skip
        for above in near:
            if abs(above - y) < height:
                y = above - height
        placed[name] = y
    return placed


def _mean(many: list[Facts], unit: str) -> float:
    values = [getattr(one, unit) or 0.0 for one in many]
    return sum(values) / max(len(values), 1)
