"""The picture of a comparison: what each system gained where it had no task data, against its cost.

draw(found, Path('transfer.png'))
"""

from __future__ import annotations

from pathlib import Path

from jaxalign.compare.report import TRANSFER, Facts, Found
from jaxalign.evaluate.compare import ALL, Gain
from jaxalign.evaluate.report import label
from jaxalign.picture import GRID, INK, PALETTE, picture

SURE = 0.05


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
        for number, system in enumerate(others):
            gain: Gain = values.group_gains[system][group]
            at = cost[system] / cost[baseline] if cost[system] and cost[baseline] else 1.0
            colour = PALETTE[number % len(PALETTE)]
            axes.plot([at, at], [gain.low, gain.high], color=colour, lw=1.2, alpha=0.7)
            sure = gain.p < SURE
            axes.plot([at], [gain.gain], "o", ms=5, color=colour, mfc=colour if sure else "white")
            axes.annotate(
                system, (at, gain.gain), (5, 3), textcoords="offset points", fontsize=8,
                color=colour,
            )  # fmt: skip
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


def _mean(many: list[Facts], unit: str) -> float:
    values = [getattr(one, unit) or 0.0 for one in many]
    return sum(values) / max(len(values), 1)
