"""States in which every dimension counts the same.

In real LLMs a few dimensions of the residual stream are enormous (Sun et al. 2024, "Massive
Activations in Large Language Models", arXiv 2402.17762): in Gemma 3 270M one of 640 carries 94 to
98 % of the energy of a mean-pooled sentence, so that any two sentences have cosine 0.99 and a
contrastive loss is flat. Subtracting each dimension's mean and dividing by its deviation, both
over many sentences, lets the others be heard.

    moments = Moments(dim)
    moments.add(number, mean, squares)               # of one batch, and so on
    standardise(states, moments.standards())         # [..., D] float32
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A variance below this share of the dimension's mean square is rounding: float32 has 24 bits.
CONSTANT = 1e-12


class Standards(NamedTuple):
    """What standardises the states of one layer; constants, no gradient reaches them."""

    mean: jax.Array | np.ndarray  # [D] float32
    scale: jax.Array | np.ndarray  # [D] float32: 1 / deviation; 0 for a constant dimension

    @classmethod
    def neutral(cls, dim: int) -> Standards:
        """What changes nothing: mean 0, scale 1."""
        return cls(np.zeros(dim, np.float32), np.ones(dim, np.float32))


class Moments:
    """Mean and variance of every dimension, gathered batch by batch in float64.

    Attributes:
      number: states so far.
      mean: [D] float64.
      squares: [D] float64, sums of squares about the mean.
    """

    def __init__(self, dim: int) -> None:
        self.number, self.mean, self.squares = 0.0, np.zeros(dim), np.zeros(dim)

    def add(self, number: float, mean: np.ndarray, squares: np.ndarray) -> None:
        """Joins the moments of other states to these (Chan et al. 1983, eq. 1.5).

        Args:
          number: of the other states, above 0.
          mean: theirs, [D].
          squares: sums of squares about it, [D].
        """
        apart, whole = np.asarray(mean, np.float64) - self.mean, self.number + number
        self.squares += np.asarray(squares, np.float64) + apart**2 * self.number * number / whole
        self.mean += apart * number / whole
        self.number = whole

    @property
    def deviation(self) -> np.ndarray:
        """[D] float64; 0 where a dimension is constant up to rounding."""
        variance = self.squares / max(self.number, 1.0)
        constant = variance <= CONSTANT * (variance + self.mean**2)
        return np.where(constant, 0.0, np.sqrt(variance))

    def standards(self) -> Standards:
        """What standardises states like these."""
        deviation = self.deviation
        scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        return Standards(self.mean.astype(np.float32), scale.astype(np.float32))


def standardise(states: jax.Array, standards: Standards) -> jax.Array:
    """`(states - mean) * scale` of states [..., D]."""
    return (states - jnp.asarray(standards.mean)) * jnp.asarray(standards.scale)
