"""The gradient of all micro-batches of an update as one large batch, in the memory of one.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(GradCache): every pair has the others' targets as negatives.

    gradient, metrics = cached_gradient(phase, trained, frozen, batches, key, 'tokens')
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.objectives import View
from jaxalign.train.phases.build import Phase, terms_loss
from jaxalign.train.rules.rule import mean_gradient, means


def cached_gradient(
    phase: Phase, trained: Any, frozen: Any, batches: Any, key: Any, average: str, update: Any = 0
) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient of all stacked micro-batches as one batch of n B rows.

    States are computed without a graph and kept (pooled: a few numbers a row), the loss of all of
    them gives each state its slope, and every micro-batch runs once more to carry its slopes down.
    A forward pass more than `mean`. Dropout draws the same masks both times.
    """
    number = jax.tree.leaves(batches)[0].shape[0]
    keyed = (batches, jnp.arange(number))

    def views(trained: Any, batch: Any, index: jax.Array) -> dict[str, View]:
        micro_key = None if key is None else jax.random.fold_in(key, index)
        return phase.states(trained, frozen, batch, micro_key).views

    _, kept = jax.lax.scan(lambda _, item: (None, views(trained, *item)), None, keyed)
    joined = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # noqa: E731
    flat = partial(jax.tree.map, joined)

    def loss_of(sloped: dict[str, Any], trained: Any) -> Any:
        # The head, and heads of the terms: those of any micro-batch.
        any_ = phase.states(trained, frozen, jax.tree.map(lambda x: x[0], batches), None)
        found = {side: kept[side]._replace(**own) for side, own in sloped.items()}
        return terms_loss(phase, any_._replace(views=flat(found)), flat(batches), update)

    sloped = {side: _sloped(view) for side, view in kept.items()}
    (loss, terms), (slopes, total) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
        sloped, trained
    )

    def carry(total: Any, item: Any) -> Any:
        batch, index, slope = item
        here = lambda trained: {  # noqa: E731
            side: _sloped(view) for side, view in views(trained, batch, index).items()
        }
        _, back = jax.vjp(here, trained)
        return jax.tree.map(jnp.add, total, back(slope)[0]), None

    total, _ = jax.lax.scan(carry, total, (*keyed, slopes))
    records = jax.tree.map(lambda x: x[None], (jnp.ones(()), loss, means(terms)))
    _, metrics = mean_gradient({}, records)
    # One line in the log for each micro-batch, as with the others.
    return total, metrics | {"micro_losses": jnp.full(number, loss)}


def _sloped(view: View) -> dict[str, Any]:
    """What of a view gradients flow into."""
    return {"taps": view.taps, "answers": view.answers}
