"""What changes during training, and what does not.

state = TrainState.create(lora, optimiser)
state.step                                       # updates done, on the device
frozen = Frozen(params)                          # read by every update, written by none
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.objectives.standards import Standards
from jaxalign.objectives.states import Tap

HEADS = "heads"  # of `trained`: what objectives train next to the adapter, by term


class Frozen(NamedTuple):
    """What a phase reads and no update changes."""

    base: Any  # the base's weights; None under full fine-tuning, where they are trained
    standards: dict[Tap, Standards] | None = None  # of taps that are not raw; None: there is none
    start: Any = None  # the adapter that training started from, where an objective reads it


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint must hold of the model."""

    step: jax.Array  # int32: updates done
    trained: Any  # the adapter, or all weights under full fine-tuning; float32
    optimiser: Any  # moments of the same shapes

    @classmethod
    def create(cls, trained: Any, optimiser: optax.GradientTransformation) -> TrainState:
        """The state before the first update."""
        return cls(jnp.zeros((), jnp.int32), trained, optimiser.init(trained))


def without_heads(trained: Any) -> Any:
    """The adapter (or all weights) alone: what is exported, and what generates."""
    return {name: part for name, part in trained.items() if name != HEADS}
