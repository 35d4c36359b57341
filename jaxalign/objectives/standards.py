"""States whose largest dimensions do not drown the others.

In real LLMs a few dimensions of the residual stream are enormous (Sun et al. 2024, "Massive
Activations in Large Language Models", arXiv 2402.17762): in Gemma 3 270M one of 640 carries 94 to
98 % of the energy of a mean-pooled sentence, so that any two sentences have cosine 0.99 and a
contrastive loss is flat. `FORMS` are remedies, each from the mean and the deviation of every
dimension over many sentences:

    moments = Moments(dim)
    moments.add(number, mean, squares)                     # of one batch, and so on
    standardise(states, moments.standards("centred"))      # [..., D] float32

`standardised` states, in which every dimension counts the same, are the form to train with (Timkey
& van Schijndel 2021, "All Bark and No Bite", arXiv 2109.04404). The others take it apart: `centred`
subtracts the means alone, `trimmed` leaves out the few massive dimensions and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Form = Literal["raw", "standardised", "centred", "trimmed"]  # raw, and the names of FORMS
# A variance below this share of the dimension's mean square is rounding: float32 has 24 bits.
CONSTANT = 1e-12
MASSIVE = 100.0  # times the median dimension's mean square: from here on a dimension is massive


class Standards(NamedTuple):
    """What brings the states of one layer into a form; constants, no gradient reaches them."""

    mean: jax.Array | np.ndarray  # [D] float32: subtracted
    scale: jax.Array | np.ndarray  # [D] float32: multiplied with; 0 leaves a dimension out

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

    def standards(self, form: str = "standardised") -> Standards:
        """What brings states like these into a form of FORMS."""
        mean, scale = FORMS[form](self)
        return Standards(mean.astype(np.float32), scale.astype(np.float32))


def standardise(states: jax.Array, standards: Standards) -> jax.Array:
    """`(states - mean) * scale` of states [..., D]."""
    return (states - jnp.asarray(standards.mean)) * jnp.asarray(standards.scale)


def _standardised(found: Moments) -> tuple[np.ndarray, np.ndarray]:
    deviation = found.deviation  # a constant dimension is left out
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    return found.mean, scale


def _centred(found: Moments) -> tuple[np.ndarray, np.ndarray]:
    return found.mean, np.ones_like(found.mean)


def _trimmed(found: Moments) -> tuple[np.ndarray, np.ndarray]:
    energy = found.mean**2 + found.squares / max(found.number, 1.0)
    return np.zeros_like(found.mean), (energy < MASSIVE * np.median(energy)).astype(float)


# The name of a form -> (mean, scale) of states with these moments.
FORMS: dict[str, Callable[[Moments], tuple[np.ndarray, np.ndarray]]] = {
    "standardised": _standardised,
    "centred": _centred,
    "trimmed": _trimmed,
}
