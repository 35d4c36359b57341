"""Raw and standardised states side by side: does alignment reach a real LLM next to a task?

    python experiments/standardised/run.py --data DATA --gemma FOLDER --qwen FOLDER --out OUT

DATA holds `xsid/train.en.jsonl` (commands with their intents) and `tatoeba/XX-en.tsv` (sentence
pairs). Every run is `jaxalign train joint.yaml` with the words of RUNS. A run that was stopped goes
on with the same command, and one in OUT/results.json is not repeated. `--only 'gemma*'` takes the
runs whose name fits the pattern; words such as `train.steps=30` change all runs (in another OUT).
Without models it prints the table of OUT.

Once trained, every run is measured on the held-out pairs before (the base) and after (its adapter),
in both forms, whichever it trained on: the share of sentences whose translation is the nearest of
all by cosine, and the loss in groups of 32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RUNS = {
    "gemma-raw": ("gemma", ["align.states=raw"]),
    "gemma-standardised": ("gemma", ["align.states=standardised"]),
    "qwen-standardised": ("qwen", ["align.states=standardised"]),
    "qwen-raw": ("qwen", ["align.states=raw"]),
    "qwen-standardised-rest": ("qwen", ["align.states=standardised", "align.pooling=mean_rest"]),
    "qwen-raw-rest": ("qwen", ["align.states=raw", "align.pooling=mean_rest"]),
}
LANGUAGES = ("ar", "cs", "de", "es", "fr", "ru", "tr", "zh")
LONGEST = 28  # characters of a command or a sentence: short sequences, quick updates
COMMANDS, PAIRS, HELD_OUT = 200, 40, 12  # pairs of each language
TEMPERATURE, GROUP = 0.1, 32
LOGGED = ("align/contrastive", "align/grad_norm", "task/grad_norm", "task/language_model")


def main() -> None:
    """Trains and measures what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder of xsid and tatoeba")
    parser.add_argument("--gemma", help="folder of Gemma 3 270M")
    parser.add_argument("--qwen", help="folder of Qwen2.5-Coder 0.5B")
    parser.add_argument("--out", type=Path, default=Path("runs/standardised"))
    parser.add_argument("--only", default="*", help="a pattern of runs' names")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE for all runs")
    args = parser.parse_args()
    file = args.out / "results.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {"runs": {}}
    for step in (trained, measured):
        for name, (which, words) in RUNS.items():
            model, found = getattr(args, which), known["runs"].get(name, {})
            if not model or not fnmatch(name, args.only) or (step is measured and not found):
                continue
            if args.data is None:
                sys.exit("--data is missing")
            if new := step(args.out / name, found, [*words, *args.settings], args.data, model):
                runs = known["runs"] | {name: found | new}
                known = {**circumstances(), "runs": runs}
                file.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    print(table(known["runs"]))


def trained(
    folder: Path, found: dict[str, Any], words: list[str], data: Path, model: str
) -> dict[str, Any]:
    """What the training says of itself, from its start or from where it stopped; {} if known."""
    if found:
        return {}
    print(f"--- {folder.name}", flush=True)
    files = prepare(data, folder.parent / "data")
    where = [f"output={folder}", f"model.path={model}", *files]
    command = [sys.executable, "-m", "jaxalign.cli", "train", str(HERE / "joint.yaml")]
    if code := subprocess.run([*command, *where, *words]).returncode:
        goes_on = "; the same command goes on" if code > 128 or code < 0 else ""  # a signal
        sys.exit(f"{folder.name} ended with exit code {code}{goes_on}")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    result = json.loads((folder / "result.json").read_text("utf-8"))
    weight = result["config"]["align"]["weight"]
    updates = [
        {"step": row["step"]} | {key: round(row[key], 5) for key in LOGGED}
        for row in rows
        if row["event"] == "train"
    ]
    looks = [
        {
            "step": row["step"],
            "loss": round(row["eval/align_loss"] / weight, 4),
            "retrieval": round(row["eval/retrieval"], 4),
            "deviation": round(row["eval/align/contrastive/deviation"], 5),
        }
        for row in rows
        if row["event"] == "eval"
    ]
    about = {"settings": words, "best_step": result["best_step"]}
    return about | {"updates": updates, "validations": looks}


def measured(
    folder: Path, found: dict[str, Any], words: list[str], data: Path, model: str
) -> dict[str, Any]:
    """Held-out pairs before and after, by raw and by standardised states; {} if known."""
    import jaxalign
    from jaxalign.objectives.standards import Moments, standardise

    if "before" in found:
        return {}
    print(f"--- {folder.name} is measured", flush=True)
    config = json.loads((folder / "result.json").read_text("utf-8"))["config"]["align"]
    lines = Path(config["valid"][0]).read_text("utf-8").splitlines()
    texts = [json.loads(line)[side] for side in ("text0", "text1") for line in lines]
    layer, pooling = config["layer"], config["pooling"]
    before, after = (
        jaxalign.states(model, texts, [layer], adapter=adapter, pooling=pooling)[layer]
        for adapter in ("", str(folder / "adapter"))
    )
    moments = Moments(before.shape[-1])  # of the base, as in a run
    moments.add(len(before), before.mean(0), ((before - before.mean(0)) ** 2).sum(0))
    forms = {"raw": lambda x: x, "standardised": lambda x: standardise(x, moments.standards())}
    return {
        when: {form: scores(np.asarray(change(states))) for form, change in forms.items()}
        for when, states in (("before", before), ("after", after))
    }


def scores(states: np.ndarray) -> dict[str, float]:
    """Of sources and targets [2N, D]: the loss in groups, and who finds the translation of all."""
    from jaxalign.objectives.contrastive import similarities

    cosine = np.asarray(similarities(*np.split(states, 2)), np.float64)  # [N, N]
    losses: list[float] = []
    for first in range(0, len(cosine), GROUP):
        part = cosine[first : first + GROUP, first : first + GROUP] / TEMPERATURE
        losses += list(np.log(np.exp(part).sum(-1)) - np.diag(part))
    others = np.where(np.eye(len(cosine), dtype=bool), -np.inf, cosine).max(-1)
    found = (np.diag(cosine) > others).mean()
    return {"loss": round(float(np.mean(losses)), 4), "retrieval": round(float(found), 4)}


def prepare(data: Path, folder: Path) -> list[str]:
    """Writes short rows of the data into a folder, the same ones each time, and names them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    lines = (data / "xsid" / "train.en.jsonl").read_text("utf-8").splitlines()
    short = [line for line in lines if len(json.loads(line)["utterance"]) <= LONGEST]
    content = {"commands": rng.sample(short, COMMANDS), "pairs": [], "held_out": []}
    seen: set[str] = set()
    for language in LANGUAGES:
        found = []
        for line in (data / "tatoeba" / f"{language}-en.tsv").read_text("utf-8").splitlines():
            text, english = line.split("\t")
            # No English sentence twice: each has one translation, and none is in both halves.
            if max(len(text), len(english)) <= LONGEST and english.lower() not in seen:
                seen.add(english.lower())
                pair = {"text0": text, "text1": english, "lang0": language, "lang1": "en"}
                found.append(json.dumps(pair, ensure_ascii=False))
        rng.shuffle(found)
        content["held_out"] += found[:HELD_OUT]
        content["pairs"] += found[HELD_OUT : HELD_OUT + PAIRS]
    for name, rows in content.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    keys = {"task.train": "commands", "align.train": "pairs", "align.valid": "held_out"}
    return [f"{key}=[{folder}/{name}.jsonl]" for key, name in keys.items()]


def circumstances() -> dict[str, Any]:
    """What the numbers depend on besides the settings."""
    packages = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} shared CPU cores ({platform.machine()})",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "data": {
            "languages": LANGUAGES,
            "characters": LONGEST,
            "commands": COMMANDS,
            "pairs": PAIRS * len(LANGUAGES),
            "held_out": HELD_OUT * len(LANGUAGES),
        },
    }


def table(runs: dict[str, Any]) -> str:
    """One line a run, as Markdown."""
    lines = [
        "| run | alignment loss of updates | of held-out pairs | found by the run's states | "
        "found by raw states | by standardised | task loss of updates |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        updates, looks = run["updates"], run["validations"]
        percent = [f"{100 * look['retrieval']:.0f}" for look in looks]
        shares = {"raw": [], "standardised": []}
        for when in ("before", "after"):
            for form, values in run.get(when, {}).items():
                shares[form].append(f"{100 * values['retrieval']:.0f}")
        cells = [
            name,
            *_path(f"{update['align/contrastive']:.2f}" for update in (updates[0], updates[-1])),
            *_path(f"{look['loss']:.2f}" for look in looks),
            *_path(percent),
            *_path(shares["raw"]),
            *_path(shares["standardised"]),
            *_path(f"{update['task/language_model']:.2f}" for update in (updates[0], updates[-1])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _path(values: Any) -> list[str]:
    return [" → ".join(values)]


if __name__ == "__main__":
    main()
