"""One update on real rows, ours against PyTorch + PEFT: slot filling and sentence pairs.

The rows are xSID's English commands with the prompt of `task.kind=slots` in the model's own chat
template, 32 of them, and 32 pairs of Tatoeba in many languages. Three sides start from the same
weights and the same adapter (rank 8, seven projections) and update on the same rows in float32:

    shared   ours as it is: rows end to end behind what they share (`batch.pack=auto`)
    padded   ours with each row padded to the batch's length (`batch.pack=none`)
    peft     transformers and PEFT; a batch is padded to its longest row; pairs run through all
             layers with `output_hidden_states=True`

    python benchmarks/train_step.py --rows slots --model 10m
    python benchmarks/train_step.py --rows slots --model FOLDER --rounds 3

Before anything is timed, the losses of two updates must be equal. Then the sides take turns, and
the table shows medians, and the medians of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROWS, TEMPERATURE, RATE = 32, 0.1, 5e-4
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
TOLERANCE = 1e-4
DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


class Ours:
    """Our step, prepared from a configuration as `jaxalign train` prepares it."""

    def __init__(self, base: str, adapter: str, layer: int, files: dict, pack: str) -> None:
        import jax

        from jaxalign.config import load
        from jaxalign.sharding import put_batch
        from jaxalign.train import setup

        config = load(
            None,
            [
                f"model.path={base}", "model.dtype=float32", "model.remat=none",
                f"adapter.start={adapter}", "lora.dropout=0", "lora.r=8", "lora.alpha=16",
                "task.kind=slots", f"task.train=[{files['task']}]",
                f"align.train=[{files['align']}]", f"align.layer={layer}",
                f"align.temperature={TEMPERATURE}", f"batch.pack={pack}",
                f"batch.size={ROWS}", f"batch.pairs={ROWS}", "batch.accumulate=1",
                "batch.max_length=512", "batch.pair_max_length=512", "optim.schedule=constant",
                f"optim.learning_rate={RATE}", "optim.warmup_ratio=0", "train.steps=100",
            ],
        ).config  # fmt: skip
        self.run = setup.prepare(config)
        self.state, self.put = self.run.state, put_batch
        self.kept = jax.tree.map(np.asarray, self.state)
        self.batches = {
            name: self.put(self.run.mesh, stream.stack([0]), stacked=True)
            for name, stream in self.run.train.items()
        }

    def tokens(self, step: str) -> tuple[int, int]:
        """(that count, that are computed)."""
        return self.run.train[step].tokens(0)

    def rows(self, step: str) -> list[Any]:
        """The rows of the batch, in order."""
        stream = self.run.train[step]
        return [stream.rows[row] for slot in stream._slots(0) for row in slot]

    def update(self, step: str) -> float:
        import jax

        with jax.set_mesh(self.run.mesh):
            batch = {step: self.batches[step]}
            self.state, metrics = self.run.step(self.state, self.run.frozen, batch, None)
            return float(metrics[f"{step}/loss"])

    def reset(self) -> None:
        import jax

        self.state = jax.device_put(self.kept, self.run.shardings)


class Peft:
    """Eager PyTorch on the same rows."""

    def __init__(
        self, base: str, adapter: str, layer: int, rows: dict, pad: int, part: int
    ) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.config.use_cache = False
        self.model = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
        self.layer, self.part = layer, part
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.kept = [p.detach().clone() for p in self.trained]
        task = [row.tokens for row in rows["task"]]
        self.task = _padded(task, pad)
        self.labels = self.task[0].clone()
        for labels, row in zip(self.labels, rows["task"], strict=True):
            labels[: row.first] = -100
            labels[len(row.tokens) :] = -100
        sides = ("source", "target")
        self.sides = [_padded([getattr(r, side) for r in rows["align"]], pad) for side in sides]
        self.reset()

    def reset(self) -> None:
        import torch

        with torch.no_grad():
            for now, then in zip(self.trained, self.kept, strict=True):
                now.copy_(then)
        self.optimiser = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)

    def update(self, step: str) -> float:
        import torch

        # Logits of a large vocabulary do not fit for all rows: the task goes in parts, as one would
        # accumulate, each cut to its longest row and weighed by its answer tokens.
        losses = [self._task(part) for part in self._parts()] if step == "task" else [self._align]
        total = 0.0
        for one in losses:
            loss = one()
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)
        return total

    def _parts(self) -> list[slice]:
        return [slice(first, first + self.part) for first in range(0, ROWS, self.part)]

    def tokens(self, step: str) -> int:
        if step == "task":
            return sum(self._cut(part)[0].numel() for part in self._parts())
        return sum(tokens.numel() for tokens, _ in self.sides)

    def _cut(self, part: slice) -> list[Any]:
        tokens, mask = self.task
        longest = int(mask[part].sum(1).max())
        return [x[part, :longest] for x in (tokens, mask, self.labels)]

    def _task(self, part: slice) -> Callable[[], Any]:
        tokens, mask, labels = self._cut(part)
        share = (labels[:, 1:] != -100).sum() / (self.labels[:, 1:] != -100).sum()
        return lambda: share * self.model(tokens, attention_mask=mask, labels=labels).loss

    def _align(self) -> Any:
        import torch
        from torch.nn.functional import cosine_similarity, cross_entropy

        vectors = []
        for tokens, mask in self.sides:
            out = self.model(tokens, attention_mask=mask, output_hidden_states=True)
            weights = mask[..., None].float()
            vectors.append((weights * out.hidden_states[self.layer]).sum(1) / weights.sum(1))
        source, target = vectors
        scores = cosine_similarity(source[:, None], target[None], dim=-1) / TEMPERATURE
        return cross_entropy(scores, torch.arange(len(scores)))


def _padded(rows: list[np.ndarray], pad: int) -> tuple[Any, Any]:
    import torch

    tokens = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(tokens)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return tokens, mask


def write_base(folder: Path, shape: Any, make: Callable[..., Any], data: Path) -> str:
    """A random base of a shape, with a tokenizer that has learned from the pairs."""
    from jaxalign.demo.tokenizer import END, PAD, save_tokenizer, train_tokenizer

    sentences = {
        file.stem: [part for line in file.open(encoding="utf-8") for part in line.split("\t")[:2]]
        for file in sorted((data / "tatoeba").glob("*.tsv"))
    }
    make(pad_token_id=PAD, eos_token_id=END).save_pretrained(folder / "base")
    save_tokenizer(train_tokenizer(sentences, shape.vocab), folder / "base")
    return str(folder / "base")


def write_adapter(base: str, folder: Path) -> str:
    """An adapter of PEFT's whose B is not zero, or A would have no gradient."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=[f"{name}_proj" for name in TARGETS],
                      task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.002)
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def write_rows(folder: Path, data: Path) -> dict[str, str]:
    """xSID's commands as they are, and pairs of all languages."""
    pairs = folder / "pairs.jsonl"
    with pairs.open("w", encoding="utf-8") as out:
        for file in sorted((data / "tatoeba").glob("*.tsv")):
            for line in file.read_text("utf-8").splitlines()[:40]:
                text0, text1 = line.split("\t")[:2]
                out.write(json.dumps({"text0": text0, "text1": text1}) + "\n")
    return {"task": str(data / "xsid" / "train.en.jsonl"), "align": str(pairs)}


def measure(options: argparse.Namespace, shape: Any, make: Any) -> list[dict[str, Any]]:
    """Seconds of each side and phase, and ratios of neighbouring updates."""
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_rows(folder, DATA)
        base = write_base(folder, shape, make, DATA) if shape else options.model
        from jaxalign.hf.load import load_spec

        layer = load_spec(Path(base)).layers // 2
        adapter = write_adapter(base, folder)
        sides: dict[str, Any] = {
            "shared": Ours(base, adapter, layer, files, "auto"),
            "padded": Ours(base, adapter, layer, files, "none"),
        }
        rows = {step: sides["shared"].rows(step) for step in ("task", "align")}
        pad = sides["shared"].run.base.tokenizer.pad_token_id
        sides["peft"] = Peft(base, adapter, layer, rows, pad, options.peft_rows)
    found = []
    for step in options.steps:
        _check(sides, step)
        found.append({"step": step} | _turns(sides, step, options.rounds))
        _print(found[-1])
    return found


def _check(sides: dict[str, Any], step: str) -> None:
    losses = {}
    for name, side in sides.items():
        side.reset()
        losses[name] = [side.update(step) for _ in range(2)]
        shown = " ".join(f"{value:.6f}" for value in losses[name])
        print(f"  {step:5} {name:6} losses of two updates: {shown}", flush=True)
    gap = max(
        abs(a - b) / abs(b)
        for values in losses.values()
        for a, b in zip(values, losses["peft"], strict=True)
    )
    if gap > TOLERANCE:
        sys.exit(f"{step}: losses differ by {gap:.1e}, more than {TOLERANCE}")


def _turns(sides: dict[str, Any], step: str, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):  # all are warm: their losses were compared
        for name, side in sides.items():
            times[name].append(_seconds(partial(side.update, step)))
    ratio = lambda a, b: statistics.median(  # noqa: E731
        x / y for x, y in zip(times[a], times[b], strict=True)
    )
    counted, computed = sides["shared"].tokens(step)
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "tokens": {
            "count": counted,
            "shared": computed,
            "padded": sides["padded"].tokens(step)[1],
            "peft": sides["peft"].tokens(step),
        },
        "shared/peft": ratio("shared", "peft"),
        "shared/padded": ratio("shared", "padded"),
        "padded/peft": ratio("padded", "peft"),
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _print(row: dict[str, Any]) -> None:
    tokens, seconds = row["tokens"], row["seconds"]
    for name, took in seconds.items():
        print(f"{row['step']:6} {name:7} {took:8.3f} s  {tokens[name]:6} tokens computed")
    print(
        f"{row['step']:6} shared / peft {row['shared/peft']:.3f}, shared / padded "
        f"{row['shared/padded']:.3f}, padded / peft {row['padded/peft']:.3f}; "
        f"{100 * tokens['count'] / tokens['shared']:.0f} % of ours count",
        flush=True,
    )
