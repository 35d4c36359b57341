"""The demo's picture: what alignment did to the layers, to the languages and to the losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.demo import ALIGNED, LANGUAGES
from jaxalign.picture import REST, picture

COLOURS = {"base": REST, "sft": "#d1772e", "aligned": "#1f6fb2"}
LABELS = {"base": "base", "sft": "fine-tuned", "aligned": "fine-tuned + aligned"}


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the PNG: retrieval by layer, intents by language, losses by step."""
    with picture(path, 13, 4, dpi=140, style={"font.size": 10}) as figure:
        left, middle, right = figure.subplots(1, 3)
        _layers(left, found)
        _languages(middle, found)
        _losses(right, found)


def _runs(found: dict[str, Any], kind: str) -> list[dict]:
    return [run for run in found["runs"] if run["kind"] == kind]


def _layers(axes: Any, found: dict[str, Any]) -> None:
    for kind, colour in COLOURS.items():
        runs = [found["base"]] if kind == "base" else _runs(found, kind)
        curves = 100 * np.array(
            [np.mean([run["retrieval"][lang] for lang in ALIGNED], axis=0) for run in runs]
        )
        layers = np.arange(curves.shape[1])
        axes.plot(layers, curves.mean(0), "o-", color=colour, label=LABELS[kind])
        if len(curves) > 1:
            axes.fill_between(layers, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
    axes.set(
        title="Translations found, by layer", xlabel="layer (0: embeddings)",
        ylabel="top-1 retrieval with English, %", xticks=layers, ylim=(0, 100),
    )  # fmt: skip
    axes.legend(frameon=False)


def _languages(axes: Any, found: dict[str, Any]) -> None:
    places = np.arange(len(LANGUAGES))
    measure = next(iter(found["runs"][0]["scores"]))  # the task's main one
    for shift, kind in ((-0.2, "sft"), (0.2, "aligned")):
        values = np.array(
            [[run["scores"][measure][lang] for lang in LANGUAGES] for run in _runs(found, kind)]
        )
        spread = values.std(0, ddof=1) if len(values) > 1 else None
        axes.bar(places + shift, values.mean(0), 0.38, yerr=spread, color=COLOURS[kind],
                 label=LABELS[kind])  # fmt: skip
    axes.set(title="Commands understood (task rows: English only)",
             ylabel=f"{measure.replace('_', ' ').replace('f1', 'F1')}, %",
             xticks=places, xticklabels=LANGUAGES, ylim=(0, 100))  # fmt: skip
    axes.legend(frameon=False)


def _losses(axes: Any, found: dict[str, Any]) -> None:
    for run in found["runs"]:
        log = Path(run["adapter"]).parent / "log.jsonl"
        rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        for name, dash in (("task/loss", "-"), ("align/loss", ":")):
            points = [(r["step"], r[name]) for r in rows if r["event"] == "train" and name in r]
            if points:
                label = f"{name.split('/')[0]}, {LABELS[run['kind']]}"
                axes.plot(*zip(*points, strict=True), dash, color=COLOURS[run["kind"]],
                          label=label if run["seed"] == 1 else None)  # fmt: skip
    axes.set(title="Training losses", xlabel="update", ylabel="nats", ylim=(0, None))
    axes.legend(frameon=False)
