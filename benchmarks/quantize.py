"""What a base in 8 or 4 bits costs in logits and saves in bytes.

Two models: the demo's base on English commands of its test set, and a random one of 60 M
parameters on random tokens. For each kind of `model.quantize`: bytes of the projections and of all
weights, the largest and the mean difference of a logit from those of the float32 model (as a share
of the mean size of a logit), how often the best token stays the same, the difference in
cross-entropy, and the time of a forward pass. Weights are loaded as a run loads them.

    python benchmarks/quantize.py
    python benchmarks/quantize.py --model demo --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxalign.demo import ASSETS
from jaxalign.frozen.quantised import KINDS
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec

RANDOM = ModelSpec(
    family="llama", vocab=16384, dim=512, layers=12, heads=8, kv_heads=4, head_dim=64, ffn=2048,
    norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False, o_bias=False,
    mlp_bias=False, tied=False, max_position=512, bos_id=None, eos_ids=(2,), pad_id=0,
)  # fmt: skip


def demo() -> tuple[Path, np.ndarray, np.ndarray]:
    """The demo's base, and 256 commands: tokens and which of them are real, [B, T]."""
    from jaxalign.data.chat import load_tokenizer

    folder = ASSETS / "base"
    lines = (ASSETS / "data" / "test.en.jsonl").read_text("utf-8").splitlines()[:256]
    tokenizer = load_tokenizer(str(folder))
    ids = [tokenizer(json.loads(line)["utterance"])["input_ids"] for line in lines]
    width = max(map(len, ids))
    tokens = np.zeros((len(ids), width), np.int32)
    real = np.zeros((len(ids), width), bool)
    for row, one in enumerate(ids):
        tokens[row, : len(one)], real[row, : len(one)] = one, True
    return folder, tokens, real


def write_random(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A random base of 60 M parameters, written into a folder, and random tokens."""
    save_base(folder, Decoder(RANDOM).init(jax.random.key(0)), RANDOM)
    tokens = np.random.default_rng(0).integers(3, RANDOM.vocab, (8, 128)).astype(np.int32)
    return folder, tokens, np.ones_like(tokens, bool)


def measure(folder: Path, tokens: np.ndarray, real: np.ndarray, dtype: str) -> list[list[str]]:
    """A row of the table for each kind."""
    spec = load_spec(folder)
    decoder = Decoder(spec)

    @jax.jit
    def logits(params: Any) -> jax.Array:
        return decoder.logits(params, decoder.forward(params, None, tokens).hidden)

    @jax.jit
    def compare(ours: jax.Array, wide: jax.Array) -> Any:
        weights = real / real.sum()
        off = jnp.abs(ours - wide)
        size = jnp.sum(weights * jnp.abs(wide).mean(-1))
        both = real[:, 1:] & real[:, :-1]

        def loss(logits: jax.Array) -> jax.Array:
            picked = jnp.take_along_axis(
                jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
            )
            return -jnp.sum(picked[..., 0] * both) / both.sum()

        return (
            jnp.max(off * real[..., None]) / size,
            jnp.sum(weights * off.mean(-1)) / size,
            jnp.sum(weights * (ours.argmax(-1) == wide.argmax(-1))),
            loss(wide),
            loss(ours) - loss(wide),
        )

    wide = logits(load_params(folder, spec, jnp.float32))
    table = []
    for kind in ("none", *KINDS):
        params = load_params(folder, spec, jnp.dtype(dtype), quantize=kind)
        ours = logits(params).block_until_ready()
        seconds = []
        for _ in range(5):
            begun = time.perf_counter()
            logits(params).block_until_ready()
            seconds.append(time.perf_counter() - begun)
        largest, mean, same, loss, more = map(float, compare(ours, wide))
        kernels = [
            site["kernel"]
            for part in ("attention", "mlp")
            for site in params["blocks"][part].values()
            if "kernel" in site
        ]
        inner = sum(leaf.nbytes for leaf in jax.tree.leaves(kernels))
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        table.append(
            [
                kind,
                f"{inner / 2**20:.2f}",
                f"{whole / 2**20:.2f}",
                f"{largest:.3f}",
                f"{mean:.4f}",
                f"{100 * same:.1f}",
                f"{loss:.4f}",
                f"{more:+.4f}",
                f"{1000 * statistics.median(seconds):.0f}",
            ]
        )
    return table


def main() -> None:
    """Prints a table for each model."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", "60m", "both"), default="both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = {"demo": demo, "60m": lambda: write_random(Path(scratch, "base"))}
        for name in models if args.model == "both" else (args.model,):
            shown = Table(title=f"{name}, {args.dtype}")
            for head in (
                "quantize", "projections, MiB", "weights, MiB", "largest", "mean difference",
                "same best, %", "loss, float32", "more loss", "forward, ms",
            ):  # fmt: skip
                shown.add_column(head, justify="right")
            for row in measure(*models[name](), args.dtype):
                shown.add_row(*row)
            Console().print(shown)


if __name__ == "__main__":
    main()
