"""Seconds and memory of the probe's metrics at the size of an 8B model: 36 languages, FLORES.

States are made on the fly, layer by layer: a vector for the sentence, one for the language, noise,
with a spectrum that falls like a model's; in the middle layers languages agree more. Prints for
each layer the seconds of every metric, then what 33 layers would take and the peak memory.

    python benchmarks/probe_metrics.py --layers 1
    python benchmarks/probe_metrics.py --layers 1 --width 256 --compare
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxalign.probe.cka import linear_cka, products
from jaxalign.probe.collapse import collapse
from jaxalign.probe.neighbours import overlap
from jaxalign.probe.retrieval import SCORES, retrieval
from jaxalign.probe.subspace import compress
from jaxalign.probe.vectors import unit_vectors

WHOLE = 33  # layers of an 8B model, the embeddings among them


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=WHOLE)
    parser.add_argument("--languages", type=int, default=36)
    parser.add_argument("--sentences", type=int, default=988)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--width", type=int, default=None, help="principal directions kept")
    parser.add_argument("--compare", action="store_true", help="beside the exact numbers")
    args = parser.parse_args()
    print(f"{args.languages} x {args.sentences} x {args.dim}, {jax.devices()[0].device_kind}")
    print(f"float32 products: {speed(args.sentences, args.dim):.0f} GFLOP/s")
    spent: dict[str, float] = {}
    warm(args)
    for layer in ((np.arange(args.layers) + 0.5) * WHOLE / args.layers).astype(int):
        states = layer_states(args.languages, args.sentences, args.dim, layer)
        found, seconds = timed(
            {
                "retrieval": lambda s=states: retrieval(s, SCORES, width=args.width),
                "products": lambda s=states: products(s),
                "overlap": lambda s=states: overlap(s),
            }
        )
        shared = found["products"]
        more, rest = timed(
            {
                "cka": lambda s=states, p=shared: linear_cka(s, shared=p),
                "collapse": lambda s=states, p=shared: collapse(s, shared=p),
            }
        )
        found, seconds = found | more, seconds | rest
        for name, value in seconds.items():
            spent[name] = spent.get(name, 0.0) + value
        means = {name: np.nanmean(table) for name, table in found["retrieval"].items()}
        say(f"layer {layer}", seconds | {"all": sum(seconds.values())}, "s")
        say("  mean", means | {"cka": np.mean(found["cka"]), "overlap": np.mean(found["overlap"])})
        if args.compare and args.width:
            differ(states, found["retrieval"], args.width)
    total = {name: value / args.layers * WHOLE for name, value in spent.items()}
    say(f"{WHOLE} layers", total | {"all": sum(total.values())}, "s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"peak memory {peak:.2f} GiB")


def layer_states(languages: int, sentences: int, dim: int, layer: int) -> np.ndarray:
    """[G, N, D] float32: meaning, language and noise; eigenvalues fall like 1 / rank."""
    rng = np.random.default_rng(layer)
    scales = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    meaning = rng.standard_normal((sentences, dim), np.float32) * scales
    middle = 1 - abs(2 * layer / (WHOLE - 1) - 1)  # 0 at both ends, 1 in the middle
    states = np.empty((languages, sentences, dim), np.float32)
    for g in range(languages):
        noise = (2.5 - 1.5 * middle) * (0.6 + 0.8 * g / languages)
        states[g] = meaning + noise * rng.standard_normal((sentences, dim), np.float32) * scales
        states[g] += 1.5 * rng.standard_normal(dim, np.float32) * scales + 3 * scales
    return states


def warm(args: argparse.Namespace) -> None:
    """Compiles every program on two languages."""
    states = layer_states(2, args.sentences, args.dim, 0)
    retrieval(states, SCORES, width=args.width)
    overlap(states)


def speed(sentences: int, dim: int) -> float:
    """GFLOP/s of the product that everything else is made of."""
    x = jax.random.normal(jax.random.key(0), (sentences, dim))
    multiply = jax.jit(lambda x: x @ x.T)
    multiply(x).block_until_ready()
    began = time.perf_counter()
    for _ in range(3):
        multiply(x).block_until_ready()
    return 3 * 2 * sentences**2 * dim / (time.perf_counter() - began) / 1e9


def timed(metrics: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    """(results, seconds) of every metric."""
    found, seconds = {}, {}
    for name, metric in metrics.items():
        began = time.perf_counter()
        found[name] = metric()
        seconds[name] = time.perf_counter() - began
    return found, seconds


def differ(states: np.ndarray, near: dict[str, np.ndarray], width: int) -> None:
    """Prints how far the numbers in fewer directions are from the exact ones."""
    print(f"  kept {compress(unit_vectors(states), width).kept:.3f} of the squared length")
    exactly, seconds = timed({"exact": lambda: retrieval(states, SCORES)})
    say("  retrieval", seconds, "s")
    for name, exact in exactly["exact"].items():
        gaps = near[name] - exact
        say(
            f"  {name} - exact",
            {
                "mean": np.nanmean(gaps),
                "largest": np.nanmax(np.abs(gaps)),
                "mean exact": np.nanmean(exact),
            },
        )


def say(what: str, values: dict[str, float], unit: str = "") -> None:
    """One line of numbers."""
    print(f"{what}: " + ", ".join(f"{name} {value:.4g}{unit}" for name, value in values.items()))


if __name__ == "__main__":
    main()
