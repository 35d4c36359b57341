"""What brings taps into the form of `align.states`, measured once and kept with the run.

Every form but `raw` needs the mean and deviation of each dimension before the first update. They
are those of the weights that the run starts from, over the first `SAMPLE` pairs in training order,
both sides together, and stay constants: every host computes the same numbers, checkpoints carry
them, a resumed run reads them.

    standards = measure(run)                         # {Tap(12, ...): Standards(mean, scale)}
    settle(run, meta=None)                           # run.frozen has them now, on every device
    from_meta(to_meta(standards))                    # the same, through a checkpoint's JSON
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.objectives import Tap, View
from jaxalign.objectives.standards import Moments, Standards
from jaxalign.sharding import constrain, put_batch, replicated, rows_here
from jaxalign.train.phases.build import Phase
from jaxalign.train.setup import Run

SAMPLE = 512  # pairs: 1,024 states know a dimension's deviation to about 2 %


def measure(run: Run) -> dict[Tap, Standards]:
    """The standards of each tap that is not raw, from a sample of the training rows."""
    found: dict[Tap, Standards] = {}
    for name, phase in run.phases.items():
        if not phase.formed:
            continue
        moments = {tap: Moments(run.spec.dim) for tap in phase.formed}
        neutral = dict.fromkeys(moments, Standards.neutral(run.spec.dim))
        look, frozen = _look(phase), run.frozen._replace(standards=neutral)
        stream = run.train[name]
        places = rows_here(run.mesh, stream.size)
        for index in range(min(-(-SAMPLE // stream.size), stream.epoch_batches)):
            batch = put_batch(run.mesh, stream.batch(index, places))
            for tap, one in jax.device_get(look(run.state.trained, frozen, batch)).items():
                if one[0]:
                    moments[tap].add(float(one[0]), *one[1:])
        found |= {tap: one.standards(tap.states) for tap, one in moments.items()}
    return found


def _look(phase: Phase) -> Callable:
    """(trained, frozen, batch) -> tap -> number of real states of all sides, mean, squares."""

    @jax.jit
    def look(trained: Any, frozen: Any, batch: Any) -> dict[Tap, tuple[jax.Array, ...]]:
        views = [*phase.states(trained, frozen, batch, None).views.values()]
        return {tap: _moments(views, tap) for tap in phase.formed}

    return look


def _moments(views: Sequence[View], tap: Tap) -> tuple[jax.Array, ...]:
    """Number of real states of the sides that have this tap, their mean [D], squares about it [D].

    A side that has it of the frozen base alone is measured there.
    """
    found = [(view, (view.reference | view.taps).get(tap)) for view in views]
    having = [(view, states) for view, states in found if states is not None]
    vectors = jnp.concatenate([states for _, states in having])  # [2B, D]
    real = jnp.concatenate([jnp.any(view.real != 0, axis=-1) for view, _ in having])[:, None]
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
    found = from_meta(meta["standards"], run.config.align.pooling) if meta else measure(run)
    run.frozen = run.frozen._replace(standards=jax.device_put(found, replicated(run.mesh)))


def to_meta(standards: dict[Tap, Standards] | None) -> dict[str, dict[str, str]]:
    """JSON-ready: layer/pooling/form -> name -> little-endian float32 in base64: every bit."""
    return {
        f"{tap.layer}/{tap.pool}/{tap.states}": {
            name: base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode("ascii")
            for name, vector in one._asdict().items()
        }
        for tap, one in (standards or {}).items()
    }


def from_meta(meta: dict[str, dict[str, str]], pooling: str) -> dict[Tap, Standards] | None:
    """What `to_meta` wrote; None where it had nothing to write.

    Args:
      pooling: of a checkpoint that names the layer alone, as older versions wrote it. They had
        one form, which none of them names.
    """
    read: Any = lambda text: np.frombuffer(base64.b64decode(text), "<f4")  # noqa: E731
    found = {}
    for key, one in meta.items():
        layer, pool, form = (*key.split("/"), "", "")[:3]
        vectors = Standards(**{name: read(text) for name, text in one.items()})
        found[Tap(int(layer), pool or pooling, form or "standardised")] = vectors
    return found or None
