"""The table of a comparison's JSON, as docs/results.md has it.

python experiments/real_llm/table.py experiments/real_llm/results/gemma_controls.json
python experiments/real_llm/table.py experiments/real_llm/results/gemma_slots.json type_f1 copied
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(report: dict, name: str = "") -> str:
    """Scores by group, with the deviation over several seeds; gains with their 95 % interval.

    Args:
      report: a comparison's JSON.
      name: of the measure; empty: the main one.
    """
    comparison = next(iter(report["comparisons"].values()))
    measure = comparison["measures"][name or next(iter(comparison["measures"]))]
    groups = [group for group in comparison["groups"] if group != "all"]
    head = [f"{group} ({len(comparison['groups'][group])})" for group in groups]
    lines = [
        f"| system, seeds | {' | '.join(head)} |",
        f"|---|{'---:|' * len(groups)}",
    ]
    for system in comparison["systems"]:
        cells = [f"{system.replace('_', ' ')}, {comparison['seeds'][system]}"]
        for group in groups:
            score = measure["groups"][system][group]
            text = f"{score['mean']:.1f}"
            if score["std"] is not None:  # of one seed there is none
                text += f" ± {score['std']:.1f}"
            if gain := measure["group_gains"].get(system, {}).get(group):
                text += f" ({gain['gain']:+.1f}; {gain['low']:.1f} to {gain['high']:.1f})"
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    file, *measures = sys.argv[1:]
    for name in measures or [""]:
        print(table(json.loads(Path(file).read_text("utf-8")), name), end="\n\n")
