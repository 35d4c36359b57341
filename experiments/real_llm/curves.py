"""Which layer finds translations, by raw and by standardised states: reports of `jaxalign probe`.

python experiments/real_llm/curves.py reduce NAME PROBE/report.json   # into results/probe
python experiments/real_llm/curves.py table                           # of all that is there
python experiments/real_llm/curves.py measures                        # the best layer by each
python experiments/real_llm/curves.py draw curves.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.picture import GRID, PALETTE, picture

HERE = Path(__file__).resolve().parent / "results" / "probe"
# Share of sentences that find their translation, mean over all directions; MEXA with English.
CURVES = ("margin", "csls", "cosine", "standardised_csls", "standardised_cosine")
MEXA = ("mexa", "standardised_mexa")
HEALTH = ("largest", "spread")  # share of the energy in one dimension; 1 - |mean|^2 / mean |x|^2


def reduce(name: str, report: Path) -> None:
    """Keeps the means by layer."""
    found = json.loads(report.read_text("utf-8"))
    mean = lambda values: np.nanmean(np.array(values, float), axis=-1)  # noqa: E731
    kept: dict[str, Any] = {key: found[key] for key in ("languages", "sentences", "jax")}
    for key in CURVES:
        kept[key] = mean(mean(found["pairs"][key]))[0, 0].round(4).tolist()
    for key in MEXA:
        kept[key] = mean(found["pivoted"][key])[0, 0].round(4).tolist()
    for key in HEALTH:
        kept[key] = mean(np.reshape(found["health"][key][0][0], (len(kept["margin"]), -1))).tolist()
    file = HERE / f"{name.lower().replace(' ', '-')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"name": name} | kept, indent=1) + "\n", "utf-8")


def known() -> dict[str, dict[str, Any]]:
    """The probes that are there, by name."""
    found = [json.loads(file.read_text("utf-8")) for file in sorted(HERE.glob("*.json"))]
    return {one["name"]: one for one in found}


def table() -> str:
    """Each model's best blocks and the massive dimension."""
    lines = [
        "| model, blocks | embeddings | best by raw states | last | best by standardised states | "
        "last | blocks within 90 % of it | largest dimension |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in known().items():
        raw, plain = (100 * np.array(found[key]) for key in ("csls", "standardised_csls"))
        near = np.flatnonzero(plain >= 0.9 * plain.max())
        lines.append(
            f"| {name}, {len(raw) - 1} | {raw[0]:.0f} % | block {raw.argmax()}: {raw.max():.0f} % "
            f"| {raw[-1]:.0f} % | block {plain.argmax()}: {plain.max():.0f} % | {plain[-1]:.0f} % "
            f"| {near[0]} to {near[-1]} | {100 * max(found['largest']):.0f} % |"
        )
    return "\n".join(lines)


def measures() -> str:
    """Each model's best layer by every measure, and how its states are spread there."""
    words = [key.replace("standardised_", "standardised ") for key in (*CURVES, *MEXA)]
    lines = [
        f"| model | {' | '.join(words)} | spread of states at block csls finds best |",
        "|---|" + "---:|" * (len(words) + 1),
    ]
    for name, found in known().items():
        best = [np.array(found[key]) for key in (*CURVES, *MEXA)]
        cells = [f"{one.argmax()}: {100 * one.max():.0f}" for one in best]
        spread = found["spread"][int(np.argmax(found["csls"]))]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread:.3f} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """A panel for each model."""
    probes = known()
    with picture(path, 2.6 * len(probes) + 0.6, 2.9) as figure:
        panels = figure.subplots(1, len(probes), sharey=True, squeeze=False)[0]
        for axes, (name, found) in zip(panels, probes.items(), strict=True):
            for key, colour, words in (
                ("csls", PALETTE[1], "raw states"),
                ("standardised_csls", PALETTE[0], "standardised states"),
            ):
                axes.plot(100 * np.array(found[key]), "o-", color=colour, ms=2.5, label=words)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("layer (0 = embeddings)")
            axes.grid(axis="y", color=GRID, lw=0.6)
        panels[0].set_ylabel("translations found, % (CSLS)")
        panels[0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["reduce", name, report]:
            reduce(name, Path(report))
        case ["draw", path]:
            draw(Path(path))
        case ["measures"]:
            print(measures())
        case _:
            print(table())
