"""What changes during training, and nothing else: the frozen base is no part of it.

state = TrainState.create(lora, optimiser)
state.step                                       # updates done, on the device
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


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
