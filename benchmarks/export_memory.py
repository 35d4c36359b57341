"""Host memory of `jaxalign export --format merged`, against the size of the base.

An artificial base (random bfloat16 weights, sharded safetensors) and an adapter for all seven
projections are written to a temporary folder; a fresh process exports the merged model. The
process's own memory is sampled from /proc/self/status while it works:

  anonymous    RssAnon: what the process has allocated; nothing can take it away
  resident     VmRSS: the same plus pages of mapped files (the base's shards, libraries), which
               the kernel counts while they are mapped and drops when memory is short
  peak         VmHWM, the kernel's own peak of resident pages; ru_maxrss is the same number, but a
               child's begins at what its parent held

    python benchmarks/export_memory.py                   # 3 GB base: needs 7 GB of disk
    python benchmarks/export_memory.py --layers 4        # a quick look

`--from checkpoint` exports a training of all weights (float32 in Orbax) in the base's dtype: leaves
are read one after the other. `--from memory` measures the way out of a training that has all
weights in memory: `load_params` (its own peak is the weights and one stacked leaf), then
`save_base`; what counts is what saving adds to the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SOURCES = ("files", "checkpoint", "memory")
BOUND = 500e6  # beyond the base and its largest tensor
DIM, FFN, HEADS, HEAD, VOCAB = 2048, 6656, 16, 128, 32768


def main() -> None:
    """Makes the base, measures in a process of its own, deletes everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--from", dest="source", default="files", choices=SOURCES)
    parser.add_argument("--folder", default=None, help="where to put the files (default: temp)")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Path(args.child), args.source)))
        return
    work = Path(tempfile.mkdtemp(prefix="jaxalign_export_", dir=args.folder))
    try:
        size, largest = build(work, args.layers), 2 * VOCAB * DIM
        free = shutil.disk_usage(work).free
        needed = size * (4 if args.source == "checkpoint" else 1.2)
        if free < needed:
            sys.exit(f"{work}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed")
        if args.source == "checkpoint":
            size, largest = train(work), 2 * largest
        words = ["--from", args.source, "--child", str(work)]
        found = subprocess.run(
            [sys.executable, __file__, *words],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        report(json.loads(found.stdout.splitlines()[-1]), size, largest, args.source)
    finally:
        shutil.rmtree(work)


def build(work: Path, layers: int) -> int:
    """A base and an adapter with random weights, written tensor by tensor; the base's bytes."""
    import jax
    import ml_dtypes
    import numpy as np

    from jaxalign.adapters.lora import Lora
    from jaxalign.hf.load import load_spec
    from jaxalign.hf.peft import save_peft
    from jaxalign.hf.save import write_model
    from jaxalign.hf.stream import Pending
    from jaxalign.model.spec import ModelSpec
    from jaxalign.model.spec.tensors import base_rows, sizes

    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB,
        "hidden_size": DIM, "intermediate_size": FFN, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    spec = ModelSpec.from_hf(config)
    size = sizes(spec)
    numbers = np.random.default_rng(0)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def pending(row, layer):
        shape = row.hf_shape(size)

        def make():
            found = numbers.standard_normal(shape, np.float32)
            found *= 0.02
            return found.astype(bfloat16)

        return Pending(row.name(layer), shape, bfloat16, make)

    tensors = [
        pending(row, layer)
        for row in base_rows(spec)
        for layer in range(spec.layers if row.stacked else 1)
    ]
    write_model(work / "base", tensors, config, max_shard_bytes=1_000_000_000)
    spec, adapter = load_spec(work / "base"), Lora(r=16, alpha=32.0)
    lora = adapter.init(spec, jax.random.key(0))
    lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)
    save_peft(work / "adapter", lora, spec, adapter, base_name=str(work / "base"))
    return sum(tensor.nbytes for tensor in tensors)


def train(work: Path) -> int:
    """The base as a training of all weights would leave it; the bytes of the trained weights."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from jaxalign.hf.load import fingerprint, load_params, load_spec
    from jaxalign.settings import Config
    from jaxalign.train.checkpoint import Checkpoints
    from jaxalign.train.state import TrainState

    config = Config(output=str(work / "run"), trainable="full")
    config.model.path = str(work / "base")
    params = load_params(config.model.path, load_spec(config.model.path), jnp.float32)
    store = Checkpoints(config.output, keep=1)
    meta = {
        "step": 1, "base": fingerprint(config.model.path), "model": config.model.path,
        "progress": {}, "config": dataclasses.asdict(config),
    }  # fmt: skip
    moments = {"none": jnp.zeros(1)}  # they are never read
    store.save(1, TrainState(jnp.zeros((), jnp.int32), params, moments), meta)
    store.wait()
    store.close()
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def measure(work: Path, source: str) -> dict[str, float]:
    """Peaks of this process while it exports, in bytes, and seconds."""
    import jax
    import jax.numpy as jnp

    from jaxalign.export.request import Request
    from jaxalign.export.run import export
    from jaxalign.hf.load import load_params, load_spec
    from jaxalign.hf.save import save_base

    jnp.ones(1).block_until_ready()
    start, spec = status(), load_spec(work / "base")
    params = load_params(work / "base", spec, jnp.bfloat16) if source == "memory" else None
    loaded = status()
    with Sampler() as peaks:
        began = time.perf_counter()
        if params is None:
            run = work / {"files": "adapter", "checkpoint": "run"}[source]
            export(Request(str(run), format="merged", out=str(work / "merged"),
                         max_shard_size="1GB"))  # fmt: skip
        else:
            save_base(work / "merged", params, spec, max_shard_bytes=1_000_000_000)
        seconds = time.perf_counter() - began
    del params
    assert jax.device_count() == 1
    return {
        "seconds": seconds,
        "start": start["RssAnon"],
        "loaded": loaded["RssAnon"],
        "anonymous": peaks.highest["RssAnon"],
        "resident": peaks.highest["VmRSS"],
        "peak": peaks.highest["VmHWM"],
    }


def status() -> dict[str, int]:
    """Bytes of every memory line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    parts = [line.replace(":", " ").split() for line in lines if line.endswith("kB")]
    return {part[0]: int(part[1]) * 1024 for part in parts}


class Sampler:
    """The highest of every memory line, looked up every two milliseconds by a thread."""

    def __enter__(self) -> Sampler:
        """Begins to look."""
        self.highest = status()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends."""
        self._over.set()
        self._thread.join()
        self._once()

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self._once()

    def _once(self) -> None:
        for name, value in status().items():
            self.highest[name] = max(self.highest.get(name, 0), value)


def report(found: dict[str, float], size: int, largest: int, source: str) -> None:
    """Prints the peaks beside what they must stay below."""
    bound = size + largest + BOUND
    what = "trained weights" if source == "checkpoint" else "base"
    print(f"{what} {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB; "
          f"{found['seconds']:.1f} s")  # fmt: skip
    for name in ("start", "loaded", "anonymous", "resident", "peak"):
        print(f"{name:10s} {found[name] / 1e6:8.0f} MB")
    if source == "memory":
        added = found["anonymous"] - found["loaded"]
        print(f"saving added {added / 1e6:.0f} MB to the weights in memory")
        return
    verdict = "below" if found["peak"] < bound else "ABOVE"
    print(f"peak {verdict} the bound of {bound / 1e9:.2f} GB (base, largest tensor, 500 MB)")


if __name__ == "__main__":
    main()
