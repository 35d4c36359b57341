"""What a phase exposes to its objectives, and what they give back."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Loss(NamedTuple):
    """A sum and its count, never a mean: micro-batches and devices add up exactly."""

    sum: jax.Array  # scalar float32
    # Scalar float32: answer tokens, pairs, ...; it hides tuple.count, which nobody calls.
    count: jax.Array  # type: ignore[assignment]
    logs: dict[str, jax.Array]  # name -> scalar sum over the same count


class TaskStates(NamedTuple):
    """A task batch after the whole model."""

    hidden: jax.Array  # [B, T, D] after the final norm
    head: jax.Array  # [V, D]
    pooled: dict[int, jax.Array]  # tapped layer -> [B, D] float32
    soft_cap: float = 0.0  # logits are c·tanh(hidden · head / c); 0: no cap


class PairStates(NamedTuple):
    """Both sides of a batch of sentence pairs, pooled at the tapped layers."""

    source: dict[int, jax.Array]  # layer -> [B, D] float32
    target: dict[int, jax.Array]  # layer -> [B, D] float32
