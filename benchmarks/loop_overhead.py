"""How much of a training run's wall time is not the compiled step: input, logging, checkpoints.

Trains a random ~10M Llama on the demo's rows through the real loop. Every call of the step is timed
until its results are there, and what lies between two calls is the loop's share. Nothing of it can
hide behind a running step here, so a real run pays this or less.

    python benchmarks/loop_overhead.py --steps 60 --rounds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from jaxalign.config import load
from jaxalign.demo import ASSETS
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import parameter_count
from jaxalign.paths import Desk
from jaxalign.train import loop
from jaxalign.train.setup import prepare
from jaxalign.train.watch import Watch

SPEC = ModelSpec(
    family="llama", vocab=4096, dim=256, layers=8, heads=8, kv_heads=4, head_dim=32, ffn=1024,
    norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False, o_bias=False,
    mlp_bias=False, tied=False, max_position=512, bos_id=1, eos_ids=(2,), pad_id=0,
)  # fmt: skip
WARM = 10  # steps that are not counted


class Timed:
    """The step, waited for: remembers when each call began and ended."""

    def __init__(self, step: Any) -> None:
        self.step, self.calls = step, []
        self.phase, self.programs = step.phase, step.programs

    def __call__(self, *args: Any, **more: Any) -> Any:
        """As the step."""
        began = time.perf_counter()
        found = jax.block_until_ready(self.step(*args, **more))
        self.calls.append((began, time.perf_counter()))
        return found


def main() -> None:
    """Prints the seconds of a step and the share of wall time outside it, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        save_base(base, Decoder(SPEC).init(jax.random.key(0)), SPEC, tokenizer_from=ASSETS / "base")
        words = [
            f"model.path={base}", "model.dtype=float32",
            "model.remat=none", "lora.dropout=0.0", "prompt.system=''", "task.kind=intent_slots",
            f"task.train=[{ASSETS}/data/train.en.jsonl]",
            f"align.train=[{ASSETS}/data/pairs_tatoeba.jsonl]", "align.layer=4",
            "batch.size=16", "batch.pairs=16", "batch.accumulate=2", "batch.buckets=[64]",
            "batch.max_length=64", "batch.pair_max_length=64", f"train.steps={args.steps}",
            "train.log_every=10", f"checkpoint.every={args.steps // 2}", "log.progress=none",
        ]  # fmt: skip
        print(f"{parameter_count(SPEC):,} parameters, {args.steps} steps a round")
        shares = []
        for number in range(args.rounds):
            run = prepare(load(None, [*words, f"output={folder}/run_{number}"]).config)
            step, ended = through_loop(run)
            # The first steps compile; the last checkpoint of the loop counts as its own.
            warm = step.calls[WARM:]
            wall = ended - step.calls[WARM - 1][1]
            inside = sum(end - began for began, end in warm)
            shares.append(1 - inside / wall)
            print(f"step {inside / len(warm):.3f} s, outside the step {shares[-1]:.2%}")
        print(f"median outside the step {statistics.median(shares):.2%}")


def through_loop(run: Any) -> tuple[Timed, float]:
    """The timed step of one run, and when its loop was over, checkpoints on disk."""
    step = Timed(run.step)
    timed, config = dataclasses.replace(run, step=step), run.config
    with (
        Desk(config.output) as desk,
        Watch(config, desk.folder) as watch,
        jax.set_mesh(run.mesh),
    ):
        loop._train(timed, "overhead", None, desk, watch)
    return step, time.perf_counter()


if __name__ == "__main__":
    main()
