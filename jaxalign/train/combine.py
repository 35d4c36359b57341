"""From the gradients of several phases to one.

    weighted    the sum, each by its share
    pcgrad      each without the component that conflicts with any other, then the sum (Yu et al.
                2020, "Gradient Surgery for Multi-Task Learning", algorithm 1; no random order, as
                the projections are from the original gradients)
    task_first  the first phase as it is, the others without the component that conflicts with it

    gradient = COMBINE['pcgrad']([g_task, g_align])

A way to combine is a row of COMBINE; `optim.combine` chooses one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def weighted(gradients: Sequence[Any]) -> Any:
    """The sum."""
    return jax.tree.map(lambda *parts: sum(parts), *gradients)


def pcgrad(gradients: Sequence[Any]) -> Any:
    """The sum of the gradients, each projected onto the normal plane of those it conflicts with."""
    others = [[b for b in gradients if b is not a] for a in gradients]
    return weighted([_without(a, them) for a, them in zip(gradients, others, strict=True)])


def task_first(gradients: Sequence[Any]) -> Any:
    """The first as it is; the others projected onto its normal plane where they conflict with it.

    Nothing of them slows the first phase down, to first order.
    """
    first, *others = gradients
    return weighted([first, *(_without(other, [first]) for other in others)])


COMBINE: dict[str, Callable[[Sequence[Any]], Any]] = {
    "weighted": weighted,
    "pcgrad": pcgrad,
    "task_first": task_first,
}


def cosine(a: Any, b: Any) -> jax.Array:
    """Of two gradients."""
    return _dot(a, b) / jnp.maximum(optax.tree.norm(a) * optax.tree.norm(b), 1e-30)


def _dot(a: Any, b: Any) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), start=jnp.zeros(()))


def _without(gradient: Any, others: Sequence[Any]) -> Any:
    """The gradient less its part against each of the others."""
    for other in others:
        against = jnp.minimum(_dot(gradient, other), 0.0)
        share = against / jnp.maximum(_dot(other, other), 1e-30)
        gradient = jax.tree.map(lambda g, o, share=share: g - share * o, gradient, other)
    return gradient
