"""`jaxalign demo`: fine-tune the shipped base twice, with and without alignment, and compare.

Everything is real and small: a base of 1.8 M weights pre-trained on multilingual text, English
commands with intents and slots as the task, sentence pairs with English for the alignment, and the
same test commands in languages that the task never showed.

    demo('runs/demo', seeds=1)      # prints tables; writes demo.json, demo.png and the adapters
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxalign.base import open_base
from jaxalign.config import load
from jaxalign.demo import ALIGNED, ASSETS, LANGUAGES, UNALIGNED
from jaxalign.demo.measure import read_rows, retrieval, scores
from jaxalign.errors import UserError
from jaxalign.terminal import console
from jaxalign.train.loop import train

CONFIG = Path(__file__).parent / "demo.yaml"
KINDS = {"sft": ["align.weight=0"], "aligned": []}
Groups = list[tuple[str, tuple[str, ...]]]
MEANS: Groups = [("mean, with pairs", ALIGNED), ("mean, without pairs", UNALIGNED)]
NAMES = {"base": "base", "sft": "fine-tuned", "aligned": "fine-tuned + aligned"}


def demo(out: str, seeds: int = 1, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Trains, measures and reports.

    Args:
      out: folder of the runs, demo.json and demo.png.
      seeds: runs of each kind.
      settings: `key=value` words over demo.yaml, for both kinds.

    Returns:
      What demo.json holds.
    """
    for key in (word.partition("=")[0].strip() for word in settings):
        if key in ("seed", "output"):
            raise UserError(f"{key} is set for each run of the demo; use --seeds or --out")
    screen, started = console(), time.monotonic()
    base = open_base(load(CONFIG, settings).config)
    rows = read_rows(ASSETS, "test", LANGUAGES)
    found: dict[str, Any] = {
        "runs": [],
        "base": {"retrieval": retrieval(base, base.bare(), rows)},
    }
    for seed in range(1, seeds + 1):
        for kind, words in KINDS.items():
            output = f"{out}/{kind}" if seeds == 1 else f"{out}/{kind}_{seed}"
            config = load(CONFIG, [f"output={output}", f"seed={seed}", *settings, *words]).config
            began = time.monotonic()
            result = train(config, title=NAMES[kind], base=base)
            if not result.complete:  # half a run is nothing to compare
                raise SystemExit(result.exit_code)
            trained = time.monotonic() - began
            system = base.wear(result.adapter)
            found["runs"].append(
                {
                    "kind": kind,
                    "seed": seed,
                    "adapter": result.adapter,
                    "losses": {k: v for k, v in result.metrics.items() if k.endswith("_loss")},
                    "retrieval": retrieval(base, system, rows),
                    "scores": scores(base, system, rows),
                    "seconds": round(trained, 1),
                }
            )
    found["seconds"] = round(time.monotonic() - started, 1)
    _tables(screen, found)
    folder = Path(out)
    (folder / "demo.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    from jaxalign.demo.draw import draw

    draw(found, folder / "demo.png")
    for run in found["runs"]:
        screen.print(f"{NAMES[run['kind']]} adapter (PEFT): {run['adapter']}")
    screen.print(
        f"numbers: {folder / 'demo.json'}   curves: {folder / 'demo.png'}   "
        f"{found['seconds']:.0f} s",
    )
    return found


def _runs(found: dict[str, Any], kind: str) -> list[dict]:
    return [run for run in found["runs"] if run["kind"] == kind]


def mean(parts: list[dict], languages: tuple[str, ...]) -> np.ndarray:
    """[runs] or [runs, L+1]: the mean over languages, run by run."""
    return np.array([np.mean([part[lang] for lang in languages], axis=0) for part in parts])


def _tables(screen: Console, found: dict[str, Any]) -> None:
    seeds = len(_runs(found, "sft"))
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    for measure in found["runs"][0]["scores"]:
        title = measure.replace("_", " ").replace("f1", "F1").capitalize()
        table = Table(title=f"{title} on xSID test, % ({spread})", title_justify="left")
        for column in ("language", "task rows", "pairs", NAMES["sft"], NAMES["aligned"], "gain"):
            table.add_column(column, justify="left" if column == "language" else "right")
        sft, aligned = (
            [run["scores"][measure] for run in _runs(found, k)] for k in ("sft", "aligned")
        )
        each: Groups = [(lang, (lang,)) for lang in LANGUAGES]
        for name, languages in [*each, *MEANS]:
            a, b = mean(sft, languages), mean(aligned, languages)
            table.add_row(
                name,
                "yes" if name == "en" else "-",
                "yes" if set(languages) <= set(ALIGNED) or name == "en" else "-",
                _points(a),
                _points(b),
                f"{b.mean() - a.mean():+.1f}",
                end_section=name in ("en", LANGUAGES[-1]),
            )
        screen.print(table)

    layers = len(next(iter(found["base"]["retrieval"].values())))
    table = Table(title="Retrieval to and from English on xSID test, %", title_justify="left")
    table.add_column("language, weights")
    for layer in range(layers):
        table.add_column(f"layer {layer}", justify="right")
    others: Groups = [(lang, (lang,)) for lang in LANGUAGES[1:]]
    for name, languages in [*others, *MEANS]:
        for kind, label in NAMES.items():
            runs = [found["base"]] if kind == "base" else _runs(found, kind)
            parts = [run["retrieval"] for run in runs]
            values = mean(parts, languages)  # [runs, L+1]
            table.add_row(
                f"{name}: {label}",
                *(_percent(values[:, layer]) for layer in range(layers)),
                end_section=kind == "aligned",
            )
    screen.print(table)
    for run in found["runs"]:
        losses = ", ".join(f"{name.removeprefix('eval/')} {v:.3f}"
                           for name, v in run["losses"].items())  # fmt: skip
        screen.print(f"{NAMES[run['kind']]}, seed {run['seed']}: {losses}; trained in "
                      f"{run['seconds']:.0f} s")  # fmt: skip


def _percent(shares: np.ndarray) -> str:
    return _points(100 * shares)


def _points(values: np.ndarray) -> str:
    text = f"{values.mean():.1f}"
    return text + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")
