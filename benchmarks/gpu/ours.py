"""Our update as a run computes it (`jaxalign.train.design`), on random weights made on the device.

update = Ours(spec, work, remat='names', weights=weights)
update.compile()                                  # seconds
update.run()                                      # one update, waited for; its loss
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from part import REPO  # noqa: F401  (finds the checkout first)
from shapes import LLAMA, Work

from jaxalign.config import load
from jaxalign.data.batch import PairBatch, TaskBatch
from jaxalign.hf.load import abstract_params
from jaxalign.model.spec import ModelSpec
from jaxalign.sharding import batch_sharding, make_mesh
from jaxalign.train.design import Design, adapter_of, design
from jaxalign.train.state import Frozen, TrainState


def random_weights(spec: ModelSpec, quantize: str = "none", dtype: Any = jnp.bfloat16) -> dict:
    """A random base, every leaf made on the device in the dtype in which it is kept."""
    leaves, tree = jax.tree.flatten_with_path(abstract_params(spec, dtype, quantize))
    key = jax.random.key(0, impl="rbg")
    made = [
        _random(leaf.shape, leaf.dtype, _kind(jax.tree_util.keystr(path)))(
            jax.random.fold_in(key, number)
        )
        for number, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)


def _kind(path: str) -> str:
    if "norm" in path:
        return "norm"
    return "scales" if "scales" in path else "weights"


@partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(shape: tuple[int, ...], dtype: Any, kind: str, key: Any) -> jax.Array:
    if kind == "norm":
        return jnp.ones(shape, dtype)
    if kind == "scales":
        return jnp.full(shape, 0.05, dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
    return 0.02 * jax.random.normal(key, shape, dtype)


def _random(shape: tuple[int, ...], dtype: Any, kind: str) -> Any:
    return partial(_draw, shape, jnp.dtype(dtype), kind)


def batch_of(work: Work, vocab: int) -> Any:
    """Random micro-batches without padding [n, B, T]; of a task row all tokens are trained."""
    numbers = np.random.default_rng(0)
    shape = (work.micro_batches, work.rows, work.length)
    draw = lambda: numbers.integers(3, vocab, shape).astype(np.int32)  # noqa: E731
    if work.phase == "align":
        ones = np.ones(shape, np.int32)
        return PairBatch(draw(), ones, draw(), ones)
    tokens = draw()
    places = np.broadcast_to(np.arange(work.length, dtype=np.int32), shape)
    answers = np.concatenate([tokens[..., 1:], np.full_like(tokens[..., :1], -100)], axis=-1)
    return TaskBatch(tokens, np.ones_like(tokens), places, places, answers)


class Ours:
    """One update, compiled and called as the loop calls it."""

    def __init__(
        self,
        spec: ModelSpec,
        work: Work,
        remat: str = "names",
        weights: dict | None = None,
        quantize: str = "none",
        batch: Any = None,  # stacked micro-batches; None: random ones of `work`
    ) -> None:
        self.work, self.mesh = work, make_mesh(devices=jax.devices()[:1])
        off = {"task": "align", "align": "task"}[work.phase]
        rows, longest = {
            "task": ("batch.size", "batch.max_length"),
            "align": ("batch.pairs", "batch.pair_max_length"),
        }[work.phase]
        config = load(
            None,
            [
                f"model.path={LLAMA}", f"model.remat={remat}", f"model.quantize={quantize}",
                f"{off}.weight=0", f"align.layer={spec.layers // 2}", f"{rows}={work.rows}",
                f"{longest}={work.length}", "batch.buckets=[]", f"lora.r={work.rank}",
                f"lora.alpha={2 * work.rank}", "lora.dropout=0.0", "optim.schedule=constant",
                f"batch.accumulate={work.micro_batches}", "output=unused",
            ],
        ).config  # fmt: skip
        self.plan: Design = design(config, spec, adapter_of(config, spec), self.mesh, 1000)
        self.program: Any = None
        with jax.set_mesh(self.mesh):
            self.frozen = Frozen(weights or random_weights(spec, quantize))
            self.state = jax.jit(self._state, out_shardings=self.plan.shardings)(jax.random.key(1))
            placed = batch_sharding(self.mesh, stacked=True)
            self.batch = jax.device_put(batch or batch_of(work, spec.vocab), placed)

    def _state(self, key: Any) -> TrainState:
        assert self.plan.adapter is not None
        return TrainState.create(self.plan.adapter.init(self.plan.spec, key), self.plan.optimiser)

    def compile(self) -> float:
        """Seconds that the gradient's program took, by far the largest of an update."""
        began = time.monotonic()
        with jax.set_mesh(self.mesh):
            self.program = self.plan.step.gradient.lower(
                self.work.phase, self.state, self.frozen, self.batch, None
            ).compile()
        return time.monotonic() - began

    @property
    def memory(self) -> float:
        """Bytes that the program needs with its arguments, as the compiler says."""
        found = self.program.memory_analysis()
        outputs = found.output_size_in_bytes - found.alias_size_in_bytes
        return found.argument_size_in_bytes + found.temp_size_in_bytes + outputs

    def run(self) -> float:
        """One update."""
        batches = {self.work.phase: self.batch}
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.plan.step(
                self.state, self.frozen, batches, None, phase=self._phase
            )
        jax.block_until_ready(self.state)
        return float(metrics[f"{self.work.phase}/loss"])

    def _phase(self, name: str, *given: Any) -> Any:
        return self.program(*given)


def device_memory() -> dict[str, float]:
    """GB: how much programs may take, and the most that this process had."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"limit_gb": "bytes_limit", "peak_gb": "peak_bytes_in_use"}
    return {ours: stats[name] / 1e9 for ours, name in names.items() if name in stats}
