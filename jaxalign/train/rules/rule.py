"""What a gradient rule is, and rules that take micro-batches one after the other.

rule = one_by_one(mean)
gradient, metrics = rule.gradient(phase, trained, frozen, batches, key, 'tokens', 0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.train.phases.build import Inner, Phase, phase_loss

Record = tuple[
    jax.Array, jax.Array, dict[str, Any]
]  # weight, loss, each term's (mean, count, logs)
Records = tuple[jax.Array, jax.Array, dict[str, Any]]  # the same of n micro-batches: all [n]
# (phase, trained, frozen, batch [B, ...], key, average, update) -> weighted gradient, its Record
One = Callable[..., tuple[Any, Record]]


def no_more(inner: Inner) -> float:
    """Every row passes once."""
    return 1.0


@dataclass(frozen=True)
class Rule:
    """How micro-batches become a gradient.

    Attributes:
      gradient: (phase, trained, frozen, stacked batches [n, B, ...], key, average, update) ->
        (gradient, metrics).
      one: what it does with one micro-batch, where the gradient is the mean over them. They may
        then also come one after the other, each padded to its own length (`add_gradients`).
      plain: a gradient, called as `gradient`, that this one is compared with at times.
      cost: its least work, in forward and backward passes of all rows.
      twice: it differentiates gradients, which attention kernels do not allow.
      share: of a micro-batch's rows, those that pass together.
      copies: of what is trained, in memory next to itself: the sum so far, slopes, steps.
    """

    gradient: Callable[..., tuple[Any, dict[str, jax.Array]]]
    one: One | None = None
    plain: Callable[..., tuple[Any, dict[str, jax.Array]]] | None = None
    cost: Callable[[Inner], float] = no_more
    twice: bool = False
    share: float = 1.0
    copies: Callable[[Inner], int] = lambda inner: 2


def one_by_one(one: One, plain: One | None = None, **facts: Any) -> Rule:
    """The rule whose gradient is the mean over micro-batches of what `one` gives of each.

    Args:
      one: of a micro-batch, its gradient times its weight, and the record of it.
      plain: the same of the rule's `plain`.
      facts: the rest of the `Rule`.
    """
    return Rule(_summed(one), one, _summed(plain) if plain else None, **facts)


def _summed(one: One) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    def gradient(
        phase: Phase,
        trained: Any,
        frozen: Any,
        batches: Any,
        key: Any,
        average: str,
        update: Any = 0,
    ) -> tuple[Any, dict[str, jax.Array]]:
        zeros = jax.tree.map(jnp.zeros_like, trained)
        added = add_gradients(one, phase, trained, frozen, batches, key, average, update, zeros)
        return mean_gradient(*added)

    return gradient


def mean(
    phase: Phase, trained: Any, frozen: Any, batch: Any, key: Any, average: str, update: Any = 0
) -> tuple[Any, Record]:
    """The gradient of the phase's loss on one micro-batch.

    Args:
      average: `tokens`: a micro-batch weighs as many answer tokens (pairs) as it has, so the
        result does not depend on how rows fell into micro-batches; `microbatch`: all weigh the
        same, a mean of means (what the paper's code does).
      update: how many updates were before this one.
    """

    def weighted(trained: Any) -> Any:
        loss, terms = phase_loss(phase, trained, frozen, batch, key, update)
        weight = weight_of(terms[phase.terms[0].name].count, average)
        return weight * loss, (weight, loss, terms)

    gradient, (weight, loss, terms) = jax.grad(weighted, has_aux=True)(trained)
    return gradient, (weight, loss, means(terms))


def add_gradients(
    one: One,
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
      one: the rule's; average and update as there.
      total: sum of the micro-batches before these; like `trained`.
      first: the number of the first micro-batch in its update, which dropout's masks depend on.
    """

    def body(total: Any, item: Any) -> Any:
        batch, index = item
        own = None if key is None else jax.random.fold_in(key, index)
        gradient, record = one(phase, trained, frozen, batch, own, average, update)
        return jax.tree.map(jnp.add, total, gradient), record

    number = jax.tree.leaves(batches)[0].shape[0]
    return jax.lax.scan(body, total, (batches, first + jnp.arange(number)))


def mean_gradient(total: Any, records: Records) -> tuple[Any, dict[str, jax.Array]]:
    """The mean gradient and what to log, from a sum and what was recorded of its micro-batches."""
    weights, losses, found = records
    whole = jnp.maximum(jnp.sum(weights), 1.0)
    metrics = {"micro_losses": losses, "loss": jnp.sum(weights * losses) / whole}
    for name, (value, count, logs) in found.items():
        metrics[name] = jnp.sum(weights * value) / whole
        metrics[f"{name}/count"] = jnp.sum(count)
        for key, values in logs.items():
            metrics[f"{name}/{key}"] = jnp.sum(values) / jnp.maximum(jnp.sum(count), 1.0)
    return jax.tree.map(lambda g: g / whole, total), metrics


def weight_of(count: jax.Array, average: str) -> jax.Array:
    """What a micro-batch of so many answer tokens (pairs) weighs; nothing where it has none."""
    return jnp.minimum(count, 1.0) if average == "microbatch" else count


def means(terms: dict[str, Any]) -> dict[str, Any]:
    """Each term's (mean, count, logs)."""
    return {
        name: (term.sum / jnp.maximum(term.count, 1.0), term.count, term.logs)
        for name, term in terms.items()
    }
