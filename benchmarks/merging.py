"""The paper's merging experiment in small: a task adapter and an alignment adapter, trained apart.

With the demo's base, data and settings, each seed trains one adapter on the task alone, one on the
alignment alone, and one on both together. The first two are merged with weights along a line
(w, 1 - w) and as (1, w); each candidate is scored on development rows: intents, and retrieval with
English at the aligned layer. The weights that are best there are scored on the test rows, beside
both adapters and the one trained together.

    python benchmarks/merging.py --seeds 3           # runs/merging/merging.json, merging.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxalign.base import Base, open_base
from jaxalign.config import load
from jaxalign.demo import ALIGNED, ASSETS, LANGUAGES, UNALIGNED
from jaxalign.demo.measure import Rows, read_rows, retrieval, scores
from jaxalign.demo.run import CONFIG
from jaxalign.merge.algebra import combine
from jaxalign.merge.methods import Recipe, Weighted
from jaxalign.merge.source import AdapterFolder, read_adapters
from jaxalign.picture import GRID, INK, PALETTE, picture
from jaxalign.train.loop import train

KINDS = {"task": ["align.weight=0"], "align": ["task.weight=0"], "joint": []}
LINE = [(n / 10, 1 - n / 10) for n in range(11)]
SUMS = [(1.0, n / 4) for n in range(5)]
SWEEPS = {"line, delta": ("delta", LINE), "line, average": ("average", LINE),
          "sum, delta": ("delta", SUMS)}  # fmt: skip
GROUPS = {"English": ("en",), "six with pairs": ALIGNED, "two without pairs": UNALIGNED}
COLOURS = dict(zip(GROUPS, (INK, *PALETTE), strict=False))


def measured(base: Base, merged: Any, rows: Rows, layer: int) -> dict[str, float]:
    """Percent: intents by group and over all languages, and retrieval of the six."""
    system = base.attach(merged.lora, merged.adapter)
    intents = scores(base, system, rows)["intent_accuracy"]
    found = {group: statistics.mean(intents[lang] for lang in GROUPS[group]) for group in GROUPS}
    found["all"] = statistics.mean(intents.values())
    shares = retrieval(base, system, rows)
    found["retrieval"] = 100 * statistics.mean(shares[lang][layer] for lang in ALIGNED)
    return found


def merge_of(
    parts: list[AdapterFolder], weights: tuple[float, ...], method: str, base: Base
) -> Any:
    """The merged adapter in memory."""
    weighted: list[Weighted] = [
        source.weighted(weight) for source, weight in zip(parts, weights, strict=True)
    ]
    return combine(weighted, base.spec, Recipe(method))


def one_seed(seed: int, out: Path, words: list[str]) -> dict[str, Any]:
    """Everything of one seed."""
    paths = {}
    for kind, own in KINDS.items():
        config = load(CONFIG, [f"output={out}/{kind}_{seed}", f"seed={seed}", *own, *words]).config
        began = time.monotonic()
        paths[kind] = train(config, title=f"{kind}, seed {seed}").adapter
        print(f"{kind}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    base = open_base(config)
    layer = config.align.layer
    dev, test = (read_rows(ASSETS, split, LANGUAGES) for split in ("dev", "test"))
    task, align, joint = read_adapters(list(paths.values()), base.opened)
    found: dict[str, Any] = {"seed": seed, "sweeps": {}, "test": {}}
    for name, (method, candidates) in SWEEPS.items():
        found["sweeps"][name] = [
            {"weights": weights, **measured(base, merge_of([task, align], weights, method, base),
                                            dev, layer)}
            for weights in candidates
        ]  # fmt: skip
        best = max(found["sweeps"][name], key=lambda row: row["all"])["weights"]
        merged = merge_of([task, align], best, method, base)
        found["test"][name] = {"weights": best, **measured(base, merged, test, layer)}
    for name, source in {"task alone": task, "alignment alone": align, "joint": joint}.items():
        merged = merge_of([source], (1.0,), "delta", base)
        found["test"][name] = measured(base, merged, test, layer)
    return found


def show(runs: list[dict[str, Any]]) -> None:
    """Prints the tables, in Markdown."""

    def cell(values: list[float]) -> str:
        text = f"{statistics.mean(values):.1f}"
        return text + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    keys = [*GROUPS, "retrieval"]
    for name, (_, candidates) in SWEEPS.items():
        print(f"\n{name}, development rows\n\n| task, align | {' | '.join(keys)} | all |")
        print("|---" * (len(keys) + 2) + "|")
        for at, weights in enumerate(candidates):
            rows = [run["sweeps"][name][at] for run in runs]
            cells = [cell([row[key] for row in rows]) for key in (*keys, "all")]
            print(f"| {weights[0]:g}, {weights[1]:g} | {' | '.join(cells)} |")
    print(f"\ntest rows\n\n| | weights | {' | '.join(keys)} |")
    print("|---" * (len(keys) + 2) + "|")
    for name in runs[0]["test"]:
        rows = [run["test"][name] for run in runs]
        chosen = "; ".join(f"{r['weights'][0]:g}, {r['weights'][1]:g}" for r in rows
                           if "weights" in r)  # fmt: skip
        print(f"| {name} | {chosen} | {' | '.join(cell([r[k] for r in rows]) for k in keys)} |")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Writes the PNG: intents and retrieval by weight."""
    with picture(path, 13, 4.2, dpi=120, style={"font.size": 10}) as figure:
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (name, (_, candidates)) in zip(panels, SWEEPS.items(), strict=True):
            place = 0 if name.startswith("line") else 1
            x = [weights[place] for weights in candidates]
            for key in (*GROUPS, "retrieval"):
                curves = np.array([[row[key] for row in run["sweeps"][name]] for run in runs])
                dash = ":" if key == "retrieval" else "-"
                colour = COLOURS.get(key, COLOURS["six with pairs"])
                axes.plot(x, curves.mean(0), f"o{dash}", ms=4, color=colour)
                if len(runs) > 1:
                    axes.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.15,
                                      lw=0)  # fmt: skip
            axes.grid(axis="y", color=GRID, lw=0.6)
            axes.set_axisbelow(True)
        titles = (
            "w·task + (1 - w)·alignment, updates (delta)",
            "the same of the factors (average)",
            "task + w·alignment, updates (delta)",
        )
        labels = ("w, weight of the task adapter", "w, weight of the task adapter",
                  "w, weight of the alignment adapter")  # fmt: skip
        for axes, title, words in zip(panels, titles, labels, strict=True):
            axes.set(title=title, xlabel=words, ylim=(0, 100))
        panels[0].set_ylabel("development rows, %")
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colour, marker="o", ms=4, label=f"intents: {group}")
                   for group, colour in COLOURS.items()]  # fmt: skip
        handles.append(Line2D([], [], color=COLOURS["six with pairs"], marker="o", ms=4, ls=":",
                              label="retrieval at the aligned layer, six with pairs"))  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def main() -> None:
    """Trains, merges, measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/merging"))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in train.steps=100")
    args = parser.parse_args()
    file = args.out / "merging.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text("utf-8")) if file.is_file() else []
    for seed in range(len(runs) + 1, args.seeds + 1):  # finished seeds are kept
        runs.append(one_seed(seed, args.out, args.settings))
        file.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    show(runs)
    draw(runs, args.out / "merging.png")


if __name__ == "__main__":
    main()
