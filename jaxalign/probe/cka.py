"""Linear CKA between languages: are their sentences arranged alike, up to rotation and scale?

similarity = linear_cka(states)                              # [G, G], 1 on the diagonal
similarity = linear_cka(states, estimator="debiased")        # few sentences, many dimensions
shared = products(states)                                    # for CKA and collapse together
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.probe.vectors import States, floats, shape_of

STRIP = 256  # rows of the [N, N] matrices that exist at a time, for all languages
CONSTANT = 1e-12  # below this share of its squared length a language's spread is rounding


@dataclass(frozen=True)
class Products:
    """Inner products of the languages' Gram matrices; X is centred and has Frobenius norm 1."""

    inner: np.ndarray  # [G, G] float64: <X X', Y Y'> = |X' Y|^2
    squares: np.ndarray  # [G, N] float64: squared length of each row of X; 0 in a constant language


def products(states: States) -> Products:
    """What CKA and the effective dimension are made of, in one pass over the states.

    The smaller way is taken: Gram matrices [N, N], or cross products [D, D] where there are many
    more sentences than dimensions.

    Args:
      states: [G, N, D] of one layer.

    Raises:
      UserError: bad states.
    """
    languages, number, width = shape_of(states)
    centred = [_centred(floats(states, language)) for language in range(languages)]
    gram = languages * number * (number * width + languages * number / 2)
    cross = languages * (languages + 1) / 2 * number * width * width
    inner = _by_grams(centred) if gram <= cross else _by_crosses(centred)
    squares = np.stack([np.asarray(jnp.sum(x * x, axis=-1), np.float64) for x in centred])
    return Products(inner, squares)


def linear_cka(
    states: States, *, estimator: str = "plain", shared: Products | None = None
) -> np.ndarray:
    """Linear CKA of every pair of languages, [G, G] float64.

        |Y' X|_F^2 / ( |X' X|_F |Y' Y|_F )        for centred X, Y [N, D]

    (Kornblith et al. 2019, arXiv 1905.00414, linear CKA). With fewer sentences
    than dimensions it is biased towards 1; `debiased` puts the unbiased HSIC of Song et al. 2012
    (JMLR 13; Nguyen et al. 2021, arXiv 2010.15327) in all three places. A constant
    language has CKA 0 with all, itself included.

    Args:
      states: [G, N, D] of one layer.
      estimator: plain or debiased (which needs 4 sentences and can fall below 0).
      shared: `products(states)`, if it is there already.

    Raises:
      UserError: bad states, or another estimator.
    """
    _, number, _ = shape_of(states, sentences=4 if estimator == "debiased" else 2)
    if estimator not in ("plain", "debiased"):
        raise UserError(f"CKA's estimator is plain or debiased, not {estimator!r}")
    shared = shared or products(states)
    hsic = shared.inner
    if estimator == "debiased":
        # Rows of a centred Gram matrix add up to 0; without its diagonal k, to -k.
        both = shared.squares @ shared.squares.T
        totals = shared.squares.sum(axis=1)
        hsic = (
            hsic
            - both
            + np.outer(totals, totals) / ((number - 1) * (number - 2))
            - 2 * both / (number - 2)
        )
    own = np.sqrt(np.maximum(np.diagonal(hsic), 0))
    under = np.outer(own, own)
    return np.divide(hsic, under, out=np.zeros_like(hsic), where=under > 0)


@jax.jit
def _centred(x: jax.Array) -> jax.Array:
    scale = jnp.maximum(jnp.max(jnp.abs(x)), 1e-30)  # squares of large states overflow
    x = x / scale
    moved = x - jnp.mean(x, axis=0)
    spread = jnp.sum(moved * moved)
    constant = spread <= CONSTANT * jnp.sum(x * x)
    return jnp.where(constant, 0.0, moved / jnp.sqrt(jnp.where(constant, 1.0, spread)))


def _by_grams(centred: list[jax.Array]) -> np.ndarray:
    inner = np.zeros((len(centred), len(centred)))
    for start in range(0, len(centred[0]), STRIP):
        inner += np.asarray(_inner([_strip(x, start) for x in centred]), np.float64)
    return inner


@partial(jax.jit, static_argnames="start")
def _strip(x: jax.Array, start: int) -> jax.Array:
    """Rows of the Gram matrix from the diagonal on, flat; symmetric twins count twice."""
    rows = x[start : start + STRIP]
    gram = jnp.einsum("iD,jD->ij", rows, x[start:], precision=jax.lax.Precision.HIGHEST)
    twins = jnp.where(jnp.arange(gram.shape[1]) < len(rows), 1.0, np.sqrt(2.0))
    return (gram * twins).reshape(-1)


@jax.jit
def _inner(strips: list[jax.Array]) -> jax.Array:
    flat = jnp.stack(strips)  # [G, strip * columns]
    return jnp.einsum("gi,hi->gh", flat, flat, precision=jax.lax.Precision.HIGHEST)


def _by_crosses(centred: list[jax.Array]) -> np.ndarray:
    inner = np.zeros((len(centred), len(centred)))
    for a, x in enumerate(centred):
        for b, y in enumerate(centred[: a + 1]):
            inner[a, b] = inner[b, a] = float(_cross(x, y))
    return inner


@jax.jit
def _cross(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.einsum("nD,nE->DE", x, y, precision=jax.lax.Precision.HIGHEST) ** 2)
