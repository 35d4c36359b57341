"""Greedy answers of ours against transformers' `generate`: tokens a second, equal tokens.

Everything runs in float32 on the CPU with random weights (those of train_step.py's models) and no
adapter: 32 prompts of 16 to 64 tokens in one batch, 64 new tokens each, no stop token.

    python benchmarks/generate.py                      # 10 M parameters, 2 threads
    python benchmarks/generate.py --model 60m
    python benchmarks/generate.py --first              # seconds to the first answers, new process

Both sides must first write the same tokens, or the run ends. Then they take turns (A B A B), and
the table shows the median of the ratios of neighbouring runs, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.sides import MODELS, random_llama

ROWS, NEW, SHORTEST, LONGEST = 32, 64, 16, 64


def make_prompts(vocab: int) -> list[list[int]]:
    """Random prompts of unequal lengths."""
    rng = np.random.default_rng(1)
    lengths = [LONGEST, *rng.integers(SHORTEST, LONGEST + 1, ROWS - 1)]
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


def write_model(folder: Path, model: str) -> None:
    """A random base, written by transformers."""
    random_llama(MODELS[model]).save_pretrained(folder)


class Ours:
    """Our `generate` on the weights of a folder."""

    def __init__(self, folder: Path) -> None:
        import jax.numpy as jnp

        from jaxalign.hf.load import load_params, load_spec
        from jaxalign.model.decoder import Decoder

        spec = load_spec(folder)
        self.decoder, self.params = Decoder(spec), load_params(folder, spec, jnp.float32)

    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        from jaxalign.generate import Decoding, generate

        settings: dict[str, Any] = {"stop_ids": (), "batch_size": ROWS}
        return generate(self.decoder, self.params, None, prompts, Decoding(NEW), **settings)


class Transformers:
    """transformers' `generate`, prompts padded on the left."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None

    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, width:].tolist()


def measure(options: argparse.Namespace) -> None:
    """Prints tokens a second of both sides and the ratio."""
    prompts = make_prompts(MODELS[options.model].vocab)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.model)
        ours, theirs = Ours(Path(folder)), Transformers(Path(folder), options.threads)
        if ours(prompts) != theirs(prompts):
            sys.exit("the two sides write different tokens")
        print(
            f"{options.model}, {options.threads} threads: both write the same {ROWS * NEW} tokens"
        )
        pairs = [
            (_seconds(ours, prompts), _seconds(theirs, prompts)) for _ in range(options.rounds)
        ]
    ratios = [b / a for a, b in pairs]
    for name, seconds in zip(("ours", "transformers"), zip(*pairs, strict=True), strict=True):
        print(f"  {name:12} {ROWS * NEW / statistics.median(seconds):8.0f} tokens/s")
    shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"  faster by    {shown}")


def _seconds(side: Any, prompts: list[list[int]]) -> float:
    start = time.perf_counter()
    side(prompts)
    return time.perf_counter() - start


def measure_first(options: argparse.Namespace) -> None:
    """Prints seconds to the first answers of new processes, the later ones with kept programs."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, "base"), options.model)
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for state in ("empty", "warm", "warm"):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{folder}/base"]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            )
            print(f"{options.model}, {state} compilation cache: {done.stdout.strip()}")


def measure_one(options: argparse.Namespace) -> None:
    """This process's seconds to load, and to the first answers."""
    began = time.perf_counter()
    ours = Ours(Path(options.one))
    loaded = time.perf_counter()
    ours(make_prompts(MODELS[options.model].vocab))
    ended = time.perf_counter()
    print(f"loaded after {loaded - began:.1f} s, first answers {ended - loaded:.1f} s later")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="10m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # XLA takes as many threads as it may run on cores, so the affinity binds it; torch is told.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.one:
        measure_one(options)
    elif options.first:
        measure_first(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
