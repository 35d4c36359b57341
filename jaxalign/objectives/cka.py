"""TRepLiNa's alignment terms: linear CKA of both sides, and little drift from the frozen base.

    CKA(X, Y) = |X'Y|^2 / (|X'X| |Y'Y|)          X, Y centred, Frobenius norms
    drift     = mean over real tokens and dimensions of (h - h_base)^2

(arXiv 2510.06249; CKA: Kornblith et al. 2019, arXiv 1905.00414.) Their rows are tokens:
token i of the source meets token i of the target, over the real tokens of the batch in order, both
cut to the shorter side. Their value is clamped to [0, 1], 1e-6 is added to the divisor, and
sentences are encoded without special tokens (here: with the tokenizer's own).

With few rows and many dimensions that CKA is near 1 for any two matrices (independent Gaussian rows
of 4096 numbers: 0.995 at 20 rows), so that little of it is left to raise. Our choices against that:
`rows='pooled'` compares sentences; `estimator='debiased'` is 0 for unrelated rows, whatever their
number (Song et al. 2012, JMLR 13, eq. 5, of both matrices without their diagonals).

    cka(states, batch, layer=15)                     # a Loss of 1 - CKA
    drift(states, batch, layer=15)                   # of the sources: the low-resource side
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign.objectives.declare import both_sides, declare
from jaxalign.objectives.pooling import Pooling
from jaxalign.objectives.standards import Form
from jaxalign.objectives.states import TOKENS, Loss, Needs, States, Tap, View

EPSILON = 1e-6  # of the released code


def _tap(layer: int, rows: str, pooling: str, form: str) -> Tap:
    return Tap(layer, TOKENS) if rows == "tokens" else Tap(layer, pooling, form)


@declare(
    lambda layer, rows, pooling, form, **_: both_sides(Needs((_tap(layer, rows, pooling, form),))),
    settings="layer pooling form",
    ordered=lambda rows, **_: rows == "tokens",  # the n-th tokens of all rows meet
)
def cka(
    states: States,
    batch: Any,
    *,
    layer: int,
    rows: Literal["tokens", "pooled"] = "tokens",
    estimator: Literal["biased", "debiased"] = "biased",
    pooling: Pooling = "mean",
    form: Form = "raw",
) -> Loss:
    """1 - linear CKA of sources and targets at one layer.

    Args:
      states: whole states [B, T, D], or pooled ones [B, D], of both sides.
      batch: unread.
      rows: `tokens`, as released; `pooled`: a row is a sentence.
      estimator: `biased`, as released, clamped to [0, 1]; `debiased`, clamped to [-1, 1], so that
        values below 0 still have a gradient; it needs 4 rows.
      pooling: of pooled rows; whole states have none.
      form: of pooled rows, as `align.states`; whole states are raw.

    Returns:
      1 - CKA, counted once a batch; logs `cka`.
    """
    tap = _tap(layer, rows, pooling, form)
    source, target = (_rows(view, tap) for view in (states.source, states.target))
    number = jnp.minimum(jnp.sum(source[1]), jnp.sum(target[1]))
    x, y = (_centred(*side, number) for side in (source, target))
    inner, least, fewest = ESTIMATORS[estimator]
    shared, own, others = inner(x, y, number), inner(x, x, number), inner(y, y, number)
    value = jnp.clip(shared / (jnp.sqrt(own) * jnp.sqrt(others) + EPSILON), least, 1.0)
    there = (number >= fewest).astype(jnp.float32)
    return Loss((1.0 - value) * there, there, {"cka": jax.lax.stop_gradient(value) * there})


@declare(
    lambda layer, **_: {"source": Needs((Tap(layer, TOKENS),), reference=(Tap(layer, TOKENS),))},
    settings="layer",
    group=1,
)
def drift(states: States, batch: Any, *, layer: int) -> Loss:
    """Mean squared distance of the sources' states from those of the base without the adapter.

    Args:
      states: whole states [B, T, D] of the sources, trained and reference.
      batch: unread.

    Returns:
      Sum over real tokens of the mean over dimensions, and their number.
    """
    tap, real = Tap(layer, TOKENS), states.source.real != 0
    apart = states.source.taps[tap] - jax.lax.stop_gradient(states.source.reference[tap])
    squares = jnp.mean(jnp.square(apart.astype(jnp.float32)), axis=-1)  # [B, T]
    return Loss(jnp.sum(squares * real), jnp.sum(real).astype(jnp.float32), {})


def _inner(x: jax.Array, y: jax.Array, number: jax.Array) -> jax.Array:
    """|X'Y|^2 of matrices [n, D]; through products of the shorter side."""
    rows, dim = x.shape
    return jnp.sum((x.T @ y) ** 2) if rows > dim else jnp.sum((x @ x.T) * (y @ y.T))


def _unbiased(x: jax.Array, y: jax.Array, number: jax.Array) -> jax.Array:
    """n (n - 3) times the unbiased HSIC of n rows, and not below the smallest positive number
    where it is that of one matrix with itself."""
    outside = 1.0 - jnp.eye(x.shape[0])
    k, l = (x @ x.T) * outside, (y @ y.T) * outside  # noqa: E741  as in the paper
    n = jnp.maximum(number, 4).astype(jnp.float32)
    by_k, by_l = jnp.sum(k, axis=0), jnp.sum(l, axis=0)
    sums = jnp.sum(by_k) * jnp.sum(by_l) / ((n - 1) * (n - 2))
    found = jnp.sum(k * l) + sums - 2 / (n - 2) * jnp.vdot(by_k, by_l)
    return jnp.maximum(found, 1e-30) if x is y else found


# Name -> (product of two matrices, least value, rows that it needs).
ESTIMATORS: dict[str, tuple[Callable[..., jax.Array], float, int]] = {
    "biased": (_inner, 0.0, 1),
    "debiased": (_unbiased, -1.0, 4),
}


def _rows(view: View, tap: Tap) -> tuple[jax.Array, jax.Array]:
    """Rows [n, D] float32 of a side, the real ones first and in order, and which are real [n]."""
    states = view.taps[tap].astype(jnp.float32)
    real = view.real.reshape(-1) != 0 if tap.pool == TOKENS else jnp.any(view.real != 0, axis=-1)
    order = jnp.argsort(~real, stable=True)
    return states.reshape(-1, states.shape[-1])[order], real[order]


def _centred(rows: jax.Array, real: jax.Array, number: jax.Array) -> jax.Array:
    """The first `number` rows about their mean; zeros behind them."""
    kept = (real & (jnp.arange(len(real)) < number))[:, None]
    mean = jnp.sum(jnp.where(kept, rows, 0.0), axis=0) / jnp.maximum(number, 1)
    return jnp.where(kept, rows - mean, 0.0)
