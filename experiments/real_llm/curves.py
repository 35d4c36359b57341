"""Which layer finds translations, by raw and by standardised states: reports of `jaxalign probe`.

python experiments/real_llm/curves.py reduce NAME PROBE/report.json   # into results/probe
python experiments/real_llm/curves.py table                           # of all that is there
python experiments/real_llm/curves.py table 36                        # over 36 languages
python experiments/real_llm/curves.py table 36 50                     # with 50 sentences of each
python experiments/real_llm/curves.py measures                        # the best layer by each
python experiments/real_llm/curves.py classes                         # by resource class
python experiments/real_llm/curves.py classes 50                      # with 50 sentences of each
python experiments/real_llm/curves.py draw curves.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.languages import resource_class
from jaxalign.picture import GRID, PALETTE, picture

LANGUAGES, SENTENCES = 16, 300  # of the probes of all models; there are others, too
HERE = Path(__file__).resolve().parent / "results" / "probe"
# Share of sentences that find their translation, mean over all directions; MEXA with English.
CURVES = ("margin", "csls", "cosine", "standardised_csls", "standardised_cosine")
MEXA = ("mexa", "standardised_mexa")
RAW, PLAIN = "csls", "standardised_csls"  # what tables and pictures compare
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
    stem = name
    number, sentences = shape(kept)
    if number != LANGUAGES:
        kept["classes"], stem = by_class(found), f"{name} {number}"
    if sentences != SENTENCES:
        stem += f" {sentences}"
    file = HERE / f"{stem.lower().replace(' ', '-')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"name": name} | kept, indent=1) + "\n", "utf-8")


def by_class(found: dict[str, Any]) -> dict[str, Any]:
    """Resource class (Joshi et al. 2020) -> its languages and curves, from and to English."""
    languages, english = found["languages"], found["languages"].index("en")
    kept: dict[str, Any] = {}
    for number in range(6):
        places = [i for i, one in enumerate(languages) if resource_class(one) == number]
        places = [i for i in places if i != english]
        if not places:
            continue
        kept[str(number)] = {"languages": [languages[i] for i in places]}
        for key in (RAW, PLAIN):
            shares = np.array(found["pairs"][key], float)[0, 0]  # [L+1, from, to]
            both = (shares[:, places, english] + shares[:, english, places]) / 2
            kept[str(number)][key] = both.mean(axis=1).round(4).tolist()
    return kept


def known(languages: int = LANGUAGES, sentences: int = SENTENCES) -> dict[str, dict[str, Any]]:
    """The probes over so many languages with so many sentences of each, by name."""
    found = [json.loads(file.read_text("utf-8")) for file in sorted(HERE.glob("*.json"))]
    return {one["name"]: one for one in found if shape(one) == (languages, sentences)}


def shape(found: dict[str, Any]) -> tuple[int, int]:
    """Languages, and sentences of each."""
    return len(found["languages"]), max(found["sentences"].values())


def classes(sentences: int = SENTENCES, languages: int = 36) -> str:
    """What each class of languages finds from and to English, by raw and standardised states."""
    lines = [
        "| model | class: languages | best by raw states | best by standardised states | "
        "raw and standardised at the model's best |",
        "|---|---|---:|---:|---:|",
    ]
    for name, found in known(languages, sentences).items():
        tops = [int(np.argmax(found[key])) for key in (RAW, PLAIN)]
        for number, one in found["classes"].items():
            raw, plain = (100 * np.array(one[key]) for key in (RAW, PLAIN))
            lines.append(
                f"| {name} | {number}: {' '.join(one['languages'])} "
                f"| block {raw.argmax()}: {raw.max():.0f} % | block {plain.argmax()}: "
                f"{plain.max():.0f} % | {raw[tops[0]]:.0f} %, {plain[tops[1]]:.0f} % |"
            )
    return "\n".join(lines)


def table(languages: int = LANGUAGES, sentences: int = SENTENCES) -> str:
    """Each model's best blocks and the massive dimension."""
    lines = [
        "| model, blocks | embeddings | best by raw states | last | best by standardised states | "
        "last | blocks within 90 % of it | largest dimension |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in known(languages, sentences).items():
        raw, plain = (100 * np.array(found[key]) for key in (RAW, PLAIN))
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
        spread = found["spread"][int(np.argmax(found[RAW]))]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread:.3f} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """A panel for each model."""
    probes = known()
    with picture(path, 2.6 * len(probes) + 0.6, 2.9) as figure:
        panels = figure.subplots(1, len(probes), sharey=True, squeeze=False)[0]
        for axes, (name, found) in zip(panels, probes.items(), strict=True):
            for key, colour, words in (
                (RAW, PALETTE[1], "raw states"),
                (PLAIN, PALETTE[0], "standardised states"),
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
        case ["classes", *numbers]:
            print(classes(*map(int, numbers)))
        case ["table", *numbers]:
            print(table(*map(int, numbers)))
        case _:
            print(table())
