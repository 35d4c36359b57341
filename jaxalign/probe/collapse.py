"""Warnings next to the alignment scores: have the states shrunk, or fallen into a few directions?

Cosine scores can rise while representations collapse, so they are never read alone.

    found = collapse(states)
    found.spread, found.cosine, found.isoscore           # [G] each
    found.warnings(["en", "cy"])                         # sentences; empty if all is well
    retrieval(shuffled_pairs(states))                    # the control: about 1 / N or less
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.probe.cka import CONSTANT, Products, products
from jaxalign.probe.retrieval import cosines
from jaxalign.probe.vectors import States, floats, shape_of, unit_vectors

# What deserves a sentence; chosen by us, no paper's numbers.
NARROW = 0.98  # mean cosine of different sentences
FEW = 2.0  # effective dimensions
MASSIVE = 0.5  # share of the energy in one dimension
FLAT = 0.02  # deviation of the cosines of different sentences
STRIP = 1024  # rows of a language's cosines that exist at a time

# Flag -> what it means, as a sentence after the name of a language; numbers as `Collapse` has them.
FLAGS = {
    "constant": "all sentences have the same state: no score of it means anything",
    "zero": "some sentences have the zero vector as state",
    "massive": "one dimension ({dimension_of_it}) carries {largest:.0%} of the energy, a massive "
    "activation; cosines of different sentences spread by only {contrast:.3f}: read the scores by "
    "standardised states",
    "narrow": "different sentences have cosine {cosine:.3f} on average: a narrow cone",
    "flat": "cosines of different sentences spread by only {contrast:.3f}: read the scores by "
    "standardised states",
    "few": "the variance is in {dimension:.1f} effective dimensions",
}


@dataclass(frozen=True)
class Collapse:
    """Shape of the states of each language, and what their variance is about."""

    norm: np.ndarray  # [G] mean length of a state
    spread: np.ndarray  # [G] 1 - |mean|^2 / mean |x|^2: 0 when all sentences are one vector
    cosine: np.ndarray  # [G] mean cosine of two different sentences (anisotropy)
    dimension: np.ndarray  # [G] effective dimensions, (sum of eigenvalues)^2 / sum of squares
    isoscore: np.ndarray  # [G] 0: one direction, 1: all directions alike
    shares: dict[str, float]  # of the variance over all languages: language, sentence, rest
    flags: tuple[tuple[str, ...], ...]  # per language, of FLAGS
    largest: np.ndarray  # [G] share of the energy (mean squared length) in one dimension
    place: np.ndarray  # [G] int: which dimension that is, counted from 0
    contrast: np.ndarray  # [G] standard deviation of the cosines of different sentences

    def warnings(self, names: list[str]) -> list[str]:
        """One sentence for each flag of each language; `names` [G] are the languages' codes."""
        return [
            f"{name}: " + FLAGS[flag].format(**self.numbers(g))
            for g, (name, flags) in enumerate(zip(names, self.flags, strict=True))
            for flag in flags
        ]

    def numbers(self, language: int) -> dict[str, float]:
        """What the sentences of FLAGS say about a language."""
        return {
            "cosine": float(self.cosine[language]),
            "dimension": float(self.dimension[language]),
            "largest": float(self.largest[language]),
            "contrast": float(self.contrast[language]),
            "dimension_of_it": int(self.place[language]),
        }


def collapse(states: States, *, shared: Products | None = None) -> Collapse:
    """Norms, spread, anisotropy and variance shares of every language at one layer.

    - `spread` is 1 minus the share of the mean squared length that the mean vector holds.
    - `cosine`: mean over pairs of different sentences (Ethayarajh 2019, arXiv 1909.00512), in
      closed form: (|sum of unit vectors|^2 - N) / (N (N - 1)).
    - `contrast`: the standard deviation of those cosines. Where it is small for the
      temperature of a contrastive loss, the loss is flat.
    - `largest`: mean square of the largest dimension over that of all; near 1 with a massive
      activation (Sun et al. 2024, arXiv 2402.17762), which hides the rest from a cosine.
    - `dimension`: the participation ratio of the covariance's eigenvalues, tr(C)^2 / tr(C^2).
    - `isoscore`: IsoScore (Rudman et al. 2022, arXiv 2108.07344). Its seven steps
      come down to (dimension - 1) / (D - 1), which needs no eigenvalues.
    - `shares`: x_gn = mean + language_g + sentence_n + rest, each part's share of the squares
      summed around the mean (two-way analysis of variance). Where all languages mean
      the same, `sentence` is near 1.

    Args:
      states: [G, N, D] of one layer.
      shared: `products(states)`, if it is there already.

    Raises:
      UserError: bad states.
    """
    languages, number, width = shape_of(states)
    if shared is None:
        shared = products(states)
    if shared.squares.shape != (languages, number):
        raise UserError("these products belong to other states")
    measured = [_measure(floats(states, g)) for g in range(languages)]
    norm, least, centre, square, largest, place = (
        np.array(column, float) for column in zip(*measured, strict=True)
    )
    spread = np.clip(1 - np.divide(centre, square, out=np.ones(languages), where=square > 0), 0, 1)
    total = shared.squares.sum(axis=1)  # 1, or 0 where constant
    self_inner = np.diagonal(shared.inner)
    dimension = np.divide(total**2, self_inner, out=np.zeros(languages), where=self_inner > 0)
    isoscore = np.clip((dimension - 1) / max(width - 1, 1), 0, 1)
    vectors = unit_vectors(states)
    sums = [float(jnp.sum(jnp.sum(x, axis=0) ** 2)) for x in vectors]
    cosine = (np.array(sums) - number) / (number * (number - 1))
    contrast = np.array([_contrast(x, middle) for x, middle in zip(vectors, cosine, strict=True)])
    varied = total > 0
    # In one direction in every sentence: otherwise it distinguishes sentences, and `few` says so.
    massive = varied & (largest > MASSIVE) & (cosine > MASSIVE)
    raised = {
        "constant": ~varied,
        "zero": least == 0,
        "massive": massive,
        # What a massive activation explains is not said a second time.
        "narrow": varied & ~massive & (cosine > NARROW),
        "flat": varied & ~massive & (cosine <= NARROW) & (contrast < FLAT),
        "few": varied & ~massive & (dimension < min(FEW, width)),
    }
    flags = tuple(
        tuple(flag for flag, where in raised.items() if where[g]) for g in range(languages)
    )
    shares = _shares(states, languages, number)
    return Collapse(
        norm, spread, cosine, dimension, isoscore, shares, flags, largest, place.astype(int),
        contrast,
    )  # fmt: skip


def _contrast(x: jax.Array, middle: float) -> float:
    """Standard deviation of the cosines of different rows of x [N, D], whose mean is `middle`."""
    number = len(x)
    squares = sum(float(_apart(x, start, middle)) for start in range(0, number, STRIP))
    return float(np.sqrt(squares / (number * (number - 1))))


@partial(jax.jit, static_argnames="start")
def _apart(x: jax.Array, start: int, middle: float) -> jax.Array:
    cosine = cosines(x[start : start + STRIP], x)
    own = start + jnp.arange(len(cosine))[:, None] == jnp.arange(len(x))
    return jnp.sum(jnp.where(own, 0, cosine - middle) ** 2)


@jax.jit
def _measure(x: jax.Array) -> tuple[jax.Array, ...]:
    """Mean and least length, |mean|^2 and mean |x|^2 (in one unit), the largest dimension."""
    scale = jnp.maximum(jnp.max(jnp.abs(x)), 1e-30)
    x = x / scale
    lengths = jnp.linalg.norm(x, axis=-1)
    centre = jnp.sum(jnp.mean(x, axis=0) ** 2)
    energy = jnp.mean(x * x, axis=0)  # [D]
    share = jnp.max(energy) / jnp.maximum(jnp.sum(energy), 1e-30)
    return (
        jnp.mean(lengths) * scale,
        jnp.min(lengths),
        centre,
        jnp.mean(lengths**2),
        share,
        jnp.argmax(energy),
    )


def _shares(states: States, languages: int, number: int) -> dict[str, float]:
    """Two passes: means first, squares around them second."""
    means = np.stack(
        [np.asarray(jnp.mean(floats(states, g), axis=0), np.float64) for g in range(languages)]
    )
    middle = means.mean(axis=0)
    whole, sentences = 0.0, jnp.zeros(())
    for g in range(languages):
        moved = floats(states, g) - jnp.asarray(middle, jnp.float32)
        whole += float(jnp.sum(moved * moved))
        sentences = sentences + moved  # [N, D]
    about_language = number * float(((means - middle) ** 2).sum())
    about_sentence = float(jnp.sum((sentences / languages) ** 2)) * languages
    if whole <= CONSTANT * languages * number * max(float((middle**2).sum()), 1e-30):
        return {"language": 0.0, "sentence": 0.0, "rest": 0.0}
    rest = max(whole - about_language - about_sentence, 0.0)
    return {
        "language": about_language / whole,
        "sentence": about_sentence / whole,
        "rest": rest / whole,
    }
