"""The picture of a comparison's JSON: what each system gains over the first, by group of languages.

python experiments/real_llm/draw.py experiments/real_llm/results/gemma_gpu.json gains.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jaxalign.picture import GRID, PALETTE, picture

HEIGHT = 0.22  # of a group within its system


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of mean gains with 95 % intervals over rows, and a dot for each seed."""
    comparison = next(iter(report["comparisons"].values()))
    measure = next(iter(comparison["measures"].values()))
    base, *systems = comparison["systems"]
    groups = [group for group in comparison["groups"] if group not in ("all", "transfer")]
    with picture(path, 7.2, 0.5 * len(systems) + 1.2, style={"axes.spines.left": False}) as figure:
        axes = figure.subplots()
        for number, group in enumerate(groups):
            colour = PALETTE[number]
            before = measure["groups"][base][group]["seeds"]
            for place, system in enumerate(systems):
                height = place + HEIGHT * (number - (len(groups) - 1) / 2)
                gain = measure["group_gains"][system][group]
                count = len(comparison["groups"][group])
                label = f"{group} ({count} language{'s' if count > 1 else ''})"
                axes.barh(height, gain["gain"], 0.85 * HEIGHT, color=colour, alpha=0.5, lw=0,
                          label=label if not place else None)  # fmt: skip
                axes.plot([gain["low"], gain["high"]], [height] * 2, color=colour, lw=1.6)
                after = measure["groups"][system][group]["seeds"]
                each = [one - other for one, other in zip(after, before, strict=True)]
                axes.plot(each, [height] * len(each), "o", color=colour, ms=2.6)
        axes.axvline(0, color="#444444", lw=0.8)
        axes.grid(axis="x", color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_yticks(range(len(systems)), [name.replace("_", " ") for name in systems])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel(f"gain over {base} in percentage points (line: 95 % interval, dots: seeds)")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(groups))


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))
