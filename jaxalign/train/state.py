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


class Frozen(NamedTuple):
    """What a phase reads and no update changes."""

    base: Any  # the base's weights; None under full fine-tuning, where they are trained
    standards: dict[int, Standards] | None = None  # tapped layer -> its; None: states stay raw


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
