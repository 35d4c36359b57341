"""How much of a training step's wall time is not the compiled step: input, logging, checkpoints.

Trains a random ~10M Llama on the demo's rows through the real loop, and calls the same compiled
step alone on one prepared batch, in turns in one process; the overhead is loop / step - 1.

    python benchmarks/loop_overhead.py --steps 40 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

from jaxalign.config import load
from jaxalign.demo import ASSETS
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec, parameter_count
from jaxalign.sharding import put_batch
from jaxalign.train import loop
from jaxalign.train.setup import prepare

SPEC = ModelSpec(
    family="llama", vocab=4096, dim=256, layers=8, heads=8, kv_heads=4, head_dim=32, ffn=1024,
    norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False, o_bias=False,
    mlp_bias=False, tied=False, max_position=512, bos_id=1, eos_ids=(2,), pad_id=0,
)  # fmt: skip


def main() -> None:
    """Prints the seconds per step of both and their ratio, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        save_base(base, Decoder(SPEC).init(jax.random.key(0)), SPEC, tokenizer_from=ASSETS / "base")
        words = [
            f"output={folder}/run", f"model.path={base}", "model.dtype=float32",
            "model.remat=none", "lora.dropout=0.0", "prompt.system=''", "task.kind=intent_slots",
            f"task.train=[{ASSETS}/data/train.en.jsonl]",
            f"align.train=[{ASSETS}/data/pairs_tatoeba.jsonl]", "align.layer=4",
            "batch.size=16", "batch.pairs=16", "batch.accumulate=2", "batch.buckets=[64]",
            "batch.max_length=64", "batch.pair_max_length=64", f"train.steps={args.steps}",
            "train.log_every=10", f"checkpoint.every={args.steps // 2}", "log.progress=none",
        ]  # fmt: skip
        run = prepare(load(None, words).config)
        batches = put_batch(
            run.mesh, {n: run.train[n].stack(r) for n, r in run.turns(0).items()}, stacked=True
        )
        print(f"{parameter_count(SPEC):,} parameters, {args.steps} steps a round")
        ratios = []
        for number in range(args.rounds):
            ours, alone = through_loop(run, number), step_alone(run, batches, args.steps)
            ratios.append(ours / alone - 1)
            print(f"loop {ours:.4f} s/step, step alone {alone:.4f}, overhead {ratios[-1]:+.1%}")
        print(f"median overhead {statistics.median(ratios):+.1%}")


def through_loop(run, number: int) -> float:
    """Seconds per step of the real loop, checkpoints included; the first window warms up."""
    run.config.output = f"{run.config.output}_{number}"
    # The loop donates its state: give it a copy, so that the next round starts alike.
    state, run.state = run.state, jax.tree.map(lambda x: x.copy(), run.state)
    with jax.set_mesh(run.mesh):
        loop._train(run, "overhead")
    run.state = state
    lines = Path(run.config.output, "log.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"][1:]
    return statistics.fmean(row["seconds_per_step"] for row in rows)


def step_alone(run, batches: dict, steps: int) -> float:
    """Seconds per step of the compiled step on one batch."""
    state = jax.tree.map(lambda x: x.copy(), run.state)
    with jax.set_mesh(run.mesh):
        for _ in range(3):
            state, metrics = run.step(state, run.frozen, batches, None)
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = run.step(state, run.frozen, batches, None)
            jax.block_until_ready(metrics["grad_norm"])
        return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    main()
