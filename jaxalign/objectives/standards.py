"""States in which every dimension counts the same.

In real LLMs a few dimensions of the residual stream are enormous (Sun et al. 2024, "Massive
Activations in Large Language Models", arXiv 2402.17762): in Gemma 3 270M one of 640 carries 94 to
98 % of the energy of a mean-pooled sentence, so that any two sentences have cosine 0.99 and a
contrastive loss is flat. Subtracting each dimension's mean and dividing by its deviation, both
over many sentences, lets the others be heard.

    standards = Standards.of(mean, variance)         # float64 [D], over a sample of sentences
    standardise(states, standards)                   # [..., D] float32
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A deviation below this share of the dimension's own size is rounding: float32 has 24 bits.
CONSTANT = 1e-6


class Standards(NamedTuple):
    """What standardises the states of one layer; constants, no gradient reaches them."""

    mean: jax.Array | np.ndarray  # [D] float32
    scale: jax.Array | np.ndarray  # [D] float32: 1 / deviation; 0 for a constant dimension

    @classmethod
    def of(cls, mean: np.ndarray, variance: np.ndarray) -> Standards:
        """From each dimension's mean and variance, [D] float64."""
        deviation = np.sqrt(np.maximum(variance, 0.0))
        constant = deviation <= CONSTANT * np.sqrt(mean**2 + deviation**2)
        scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation))
        return cls(mean.astype(np.float32), scale.astype(np.float32))

    @classmethod
    def neutral(cls, dim: int) -> Standards:
        """What changes nothing: mean 0, scale 1."""
        return cls(np.zeros(dim, np.float32), np.ones(dim, np.float32))


def standardise(states: jax.Array, standards: Standards) -> jax.Array:
    """`(states - mean) * scale` of states [..., D]."""
    return (states - jnp.asarray(standards.mean)) * jnp.asarray(standards.scale)
