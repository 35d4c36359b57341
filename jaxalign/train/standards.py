"""Mean and deviation of the aligned layer's states, measured once and kept with the run.

`align.states: standardised` needs them before the first update. They are those of the weights that
the run starts from, over the first `SAMPLE` pairs in training order, both sides together, and stay
constants: every host computes the same numbers, checkpoints carry them, a resumed run reads them.

    standards = measure(run)                         # {12: Standards(mean [D], scale [D])}
    settle(run, meta=None)                           # run.frozen has them now, on every device
    from_meta(to_meta(standards))                    # the same, through a checkpoint's JSON
"""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.batch import PairBatch
from jaxalign.objectives.standards import Moments, Standards
from jaxalign.objectives.states import PairStates
from jaxalign.sharding import constrain, put_batch, replicated, rows_here
from jaxalign.train.setup import Run

SAMPLE = 512  # pairs: 1,024 states know a dimension's deviation to about 2 %


def measure(run: Run) -> dict[int, Standards]:
    """The standards of each tapped layer, from a sample of the training pairs."""
    layer, stream = run.config.align.layer, run.train["align"]
    neutral = {layer: Standards.neutral(run.spec.dim)}
    frozen = run.frozen._replace(standards=neutral)
    moments = Moments(run.spec.dim)
    places = rows_here(run.mesh, stream.size)
    for index in range(min(-(-SAMPLE // stream.size), stream.epoch_batches)):
        batch = put_batch(run.mesh, stream.batch(index, places))
        _, states = run.evaluate["align"](run.state.trained, frozen, batch)
        number, mean, squares = jax.device_get(_moments(states, batch, layer))
        if number:
            moments.add(float(number), mean, squares)
    return {layer: moments.standards()}


@partial(jax.jit, static_argnums=2)
def _moments(states: PairStates, batch: PairBatch, layer: int) -> tuple[jax.Array, ...]:
    """Number of real states of both sides, their mean [D], and squares about it [D]."""
    vectors = jnp.concatenate([states.source[layer], states.target[layer]])  # [2B, D]
    masks = (batch.source_mask, batch.target_mask)
    real = jnp.concatenate([jnp.any(mask != 0, axis=-1) for mask in masks])[:, None]
    number = jnp.sum(real).astype(jnp.float32)
    mean = jnp.sum(jnp.where(real, vectors, 0.0), axis=0) / jnp.maximum(number, 1.0)
    square = jnp.sum(jnp.where(real, (vectors - mean) ** 2, 0.0), axis=0)
    return number, constrain(mean, "-"), constrain(square, "-")


def settle(run: Run, meta: dict[str, Any] | None) -> None:
    """Gives the run its standards: a checkpoint's own, or measured where there is none.

    Args:
      run: `run.frozen` is replaced; unchanged where states stay raw.
      meta: of the checkpoint that the run goes on from, or None.
    """
    if run.frozen.standards is None:
        return
    found = from_meta(meta["standards"]) if meta else measure(run)
    run.frozen = run.frozen._replace(standards=jax.device_put(found, replicated(run.mesh)))


def to_meta(standards: dict[int, Standards] | None) -> dict[str, dict[str, str]]:
    """JSON-ready: layer -> name -> little-endian float32 in base64, which loses no bit."""
    return {
        str(layer): {
            name: base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode("ascii")
            for name, vector in one._asdict().items()
        }
        for layer, one in (standards or {}).items()
    }


def from_meta(meta: dict[str, dict[str, str]]) -> dict[int, Standards] | None:
    """What `to_meta` wrote; None where it had nothing to write."""
    read: Any = lambda text: np.frombuffer(base64.b64decode(text), "<f4")  # noqa: E731
    return {
        int(layer): Standards(**{name: read(text) for name, text in one.items()})
        for layer, one in meta.items()
    } or None
