"""Gradient rules: from the micro-batches of a phase to one gradient.

    mean      the mean over micro-batches, one after the other
    cached    the gradient of all micro-batches as one large batch, in the memory of one (Gao et al.
              2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"):
              every pair sees the others' targets as negatives

    gradient, metrics = RULES['mean'].gradient(phase, trained, frozen, batches, key, 'tokens', 0)

A rule is a row of RULES; `task.rule` and `align.rule` choose one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.objectives import View
from jaxalign.train.phases.build import Phase, phase_loss, terms_loss

# Of n micro-batches: weights [n], losses [n], and each term's (mean, count, logs), all [n].
Records = tuple[jax.Array, jax.Array, dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """How micro-batches become a gradient.

    Attributes:
      gradient: (phase, trained, frozen, stacked batches [n, B, ...], key, average, update) ->
        (gradient, metrics).
      apart: whether they may also come one after the other, each padded to its own length: the
        gradient is `mean_gradient` of what `add_gradients` summed.
    """

    gradient: Callable[..., tuple[Any, dict[str, jax.Array]]]
    apart: bool = False


def phase_gradient(
    phase: Phase, trained: Any, frozen: Any, batches: Any, key: Any, average: str, update: Any = 0
) -> tuple[Any, dict[str, jax.Array]]:
    """The phase's mean gradient over stacked micro-batches [n, B, ...], and what to log.

    Args:
      average: `tokens`: a micro-batch weighs as many answer tokens (pairs) as it has, so the
        result does not depend on how rows fell into micro-batches; `microbatch`: all weigh the
        same, a mean of means (what the paper's code does).
      update: how many updates were before this one.
    """
    zeros = jax.tree.map(jnp.zeros_like, trained)
    added = add_gradients(phase, trained, frozen, batches, key, average, update, zeros)
    return mean_gradient(*added)


def add_gradients(
    phase: Phase,
    trained: Any,
    frozen: Any,
    batches: Any,
    key: Any,
    average: str,
    update: Any,
    total: Any,
    first: Any = 0,
) -> tuple[Any, Records]:
    """`total` and the weighted gradients of stacked micro-batches [n, B, ...], one after the other.

    Args:
      average: as of `phase_gradient`, and so is `update`.
      total: sum of the micro-batches before these; like `trained`.
      first: the number of the first micro-batch in its update, which dropout's masks depend on.
    """

    def weighted(trained: Any, batch: Any, key: Any) -> Any:
        loss, terms = phase_loss(phase, trained, frozen, batch, key, update)
        count = terms[phase.terms[0].name].count
        weight = jnp.minimum(count, 1.0) if average == "microbatch" else count
        return weight * loss, (weight, loss, terms)

    def body(total: Any, item: Any) -> Any:
        batch, index = item
        micro_key = None if key is None else jax.random.fold_in(key, index)
        gradient, (weight, loss, terms) = jax.grad(weighted, has_aux=True)(
            trained, batch, micro_key
        )
        return jax.tree.map(jnp.add, total, gradient), (weight, loss, _means(terms))

    number = jax.tree.leaves(batches)[0].shape[0]
    return jax.lax.scan(body, total, (batches, first + jnp.arange(number)))


def mean_gradient(total: Any, records: Records) -> tuple[Any, dict[str, jax.Array]]:
    """The mean gradient and what to log, from a sum and what was recorded of its micro-batches."""
    weights, losses, means = records
    whole = jnp.maximum(jnp.sum(weights), 1.0)
    metrics = {"micro_losses": losses, "loss": jnp.sum(weights * losses) / whole}
    for name, (mean, count, logs) in means.items():
        metrics[name] = jnp.sum(weights * mean) / whole
        metrics[f"{name}/count"] = jnp.sum(count)
        for key, values in logs.items():
            metrics[f"{name}/{key}"] = jnp.sum(values) / jnp.maximum(jnp.sum(count), 1.0)
    return jax.tree.map(lambda g: g / whole, total), metrics


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
    records = jax.tree.map(lambda x: x[None], (jnp.ones(()), loss, _means(terms)))
    _, metrics = mean_gradient({}, records)
    # One line in the log for each micro-batch, as with the others.
    return total, metrics | {"micro_losses": jnp.full(number, loss)}


def _sloped(view: View) -> dict[str, Any]:
    """What of a view gradients flow into."""
    return {"taps": view.taps, "answers": view.answers}


def _means(terms: dict[str, Any]) -> dict[str, Any]:
    """Each term's (mean, count, logs)."""
    return {
        name: (term.sum / jnp.maximum(term.count, 1.0), term.count, term.logs)
        for name, term in terms.items()
    }


RULES: dict[str, Rule] = {
    "mean": Rule(phase_gradient, apart=True),
    "cached": Rule(cached_gradient),
}
