"""The probe against the script everyone writes: states of all layers, retrieval for every pair.

The rival is transformers with `output_hidden_states=True` on padded batches in file order, a masked
mean in PyTorch, and for each layer and ordered pair of languages a NumPy matrix of cosines and its
argmax. Both start from the same float32 model in memory (random, or that of a folder) and the same
sentences, take turns (A B A B), and must give the same retrieval accuracies.

    python benchmarks/probe.py                          # 60 M parameters, 8 languages x 100
    python benchmarks/probe.py --parallel data/ntrex --languages 12 --sentences 200 --rounds 2
    python benchmarks/probe.py --model FOLDER --parallel data/ntrex --sentences 40 --rounds 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.generate import write_model
from jaxalign.demo import ASSETS
from jaxalign.probe.corpus import Parallel, read_parallel


def read_sentences(source: str, languages: int, sentences: int) -> dict[str, list[str]]:
    """Parallel sentences without repetitions, or equal states would be told apart by chance."""
    (corpus,) = read_parallel(source) if source else (_commands(),)
    names = corpus.languages[:languages]
    rows = zip(*(corpus.sentences[name] for name in names), strict=True)
    seen: list[set[str]] = [set() for _ in names]
    kept = []
    for row in rows:
        if not any(text in known for text, known in zip(row, seen, strict=True)):
            kept.append(row)
            for text, known in zip(row, seen, strict=True):
                known.add(text)
    return {name: [row[g] for row in kept[:sentences]] for g, name in enumerate(names)}


def _commands() -> Parallel:
    """The demo's test commands, the same in every language."""
    files = sorted((ASSETS / "data").glob("test.*.jsonl"))
    lines = {file.name.split(".")[1]: file.read_text("utf-8").splitlines() for file in files}
    return Parallel(
        {name: [json.loads(line)["utterance"] for line in rows] for name, rows in lines.items()},
        "the demo's test commands",
    )


def theirs(model: Any, tokenizer: Any, text: dict[str, list[str]], batch: int) -> np.ndarray:
    """[L+1, G, G] top-1 retrieval by cosine."""
    import torch

    states = {}
    for language, sentences in text.items():
        parts = []
        for first in range(0, len(sentences), batch):
            given = tokenizer(sentences[first : first + batch], return_tensors="pt", padding=True)
            given.pop("token_type_ids", None)
            with torch.no_grad():
                hidden = model(**given, output_hidden_states=True).hidden_states
            mask = given["attention_mask"][..., None].float()
            parts.append([((h * mask).sum(1) / mask.sum(1)).numpy() for h in hidden])
        states[language] = [np.concatenate(layer) for layer in zip(*parts, strict=True)]
    layers, names = len(next(iter(states.values()))), list(states)
    found = np.full((layers, len(names), len(names)), np.nan)
    for layer in range(layers):
        for i, source in enumerate(names):
            for j, target in enumerate(names):
                if i != j:
                    x, y = states[source][layer], states[target][layer]
                    x = x / np.linalg.norm(x, axis=1, keepdims=True)
                    y = y / np.linalg.norm(y, axis=1, keepdims=True)
                    found[layer, i, j] = np.mean((x @ y.T).argmax(1) == np.arange(len(x)))
    return found


def ours(base: Any, text: dict[str, list[str]], batch: int) -> np.ndarray:
    """The same numbers."""
    from jaxalign.probe.retrieval import retrieval
    from jaxalign.probe.states import pooled_states

    flat = [sentence for sentences in text.values() for sentence in sentences]
    states = pooled_states(base, base.bare(), flat, batch_size=batch)["mean"]
    states = states.reshape(states.shape[0], len(text), -1, states.shape[-1])
    return np.stack([retrieval(layer, ("cosine",))["cosine"] for layer in states])


@contextmanager
def folder_of(model: str) -> Iterator[str]:
    """A model's folder: a random one of this size, or the one that is named."""
    if Path(model).is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), model)
        for file in (ASSETS / "base").glob("*token*"):
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        yield folder


def main() -> None:
    """Prints seconds of both, their ratio, and the largest difference of an accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="60m", help="10m, 60m, or a Hugging Face folder")
    parser.add_argument("--parallel", default="", help="folder; default: the demo's commands")
    parser.add_argument("--languages", type=int, default=8)
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jaxalign.base import open_base
    from jaxalign.config import load

    torch.set_num_threads(2)
    text = read_sentences(args.parallel, args.languages, args.sentences)
    with folder_of(args.model) as folder:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        base = open_base(load(None, [f"model.path={folder}", "model.dtype=float32"]).config)
        sides = {
            "ours": lambda: ours(base, text, args.batch),
            "theirs": lambda: theirs(model, tokenizer, text, args.batch),
        }
        started = time.monotonic()
        found = {name: side() for name, side in sides.items()}  # compiles
        number = len(next(iter(text.values())))
        print(f"{args.model}, {len(text)} languages x {number} sentences; first call of both "
              f"{time.monotonic() - started:.1f} s")  # fmt: skip
        lengths = [[len(ids) for ids in tokenizer(rows)["input_ids"]] for rows in text.values()]
        parts = [row[i : i + args.batch] for row in lengths for i in range(0, number, args.batch)]
        print(f"{sum(map(sum, lengths)):,} tokens; in file order and padded, as they run, "
              f"{sum(max(part) * len(part) for part in parts):,}")  # fmt: skip
        # The last of transformers' hidden states is behind the final norm, ours is before it.
        difference = np.nanmax(np.abs(found["ours"] - found["theirs"])[:-1])
        print(f"largest difference of an accuracy below the last layer: {difference:.4f}")
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                began = time.monotonic()
                side()
                seconds[name].append(time.monotonic() - began)
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        for name, values in seconds.items():
            print(f"  {name:8s} {statistics.median(values):8.2f} s")
        print(f"  faster by {statistics.median(ratios):6.2f} ({min(ratios):.2f} to "
              f"{max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
