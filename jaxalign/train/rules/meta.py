"""Meta-learning over languages: gradients that ask how well a language is learnt, not known.

Each micro-batch is one language (`task.order=grouped`), of two halves: support S and query Q.

    φ_0 = θ,  φ_i = φ_{i-1} - inner_rate · ∇L_S(φ_{i-1})      inner_steps steps of plain SGD

    maml      ∇_θ L_Q(φ_k(θ)): through the steps, with second derivatives (Finn et al. 2017,
              arXiv 1703.03400)
    fomaml    ∇L_Q at φ_k: the steps are taken as constant (the same paper, section 5.2)
    reptile   (θ - φ_k) / (inner_rate · k), the mean of the gradients along the way; the steps take
              S and Q in turns (Nichol et al. 2018, arXiv 1803.02999)

As in Meta-X_NLG (Maurya & Desarkar 2022, arXiv 2203.10250), whose code takes two inner steps of
rate 1e-5 on half of 4 rows a language, with dropout, and adds up the languages' gradients. Here
they are averaged, as micro-batches are: AdamW does not see the difference, a clip does. With
`optim.average=microbatch` all languages weigh the same, as in their sum. Rows alternate between the
halves; which go where is chance in both. Reptile's authors divide by inner_rate alone, which is k
times as much.

At inner rate 0 `maml` and `fomaml` are the gradient of the query half, `reptile` that of both.

    gradient, metrics = MAML.gradient(phase, trained, frozen, batches, key, 'tokens', 0)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.train.optim import keep_layers
from jaxalign.train.phases.build import Phase, phase_loss
from jaxalign.train.rules.rule import Record, mean, means, one_by_one, weight_of


def halves(batch: Any) -> tuple[Any, Any]:
    """A micro-batch's even and its odd rows; end to end, its even and its odd sequences.

    A device's share of the rows gives each half as much. `data.flat` lays even rows in the even
    sequences, so both layouts have the same rows in a half, on every mesh.
    """
    first = batch.flat or next(iter(batch.sides().values()))
    sequences = first.tokens.shape[0]

    def half(number: int, x: jax.Array) -> jax.Array:
        pairs = x.reshape(sequences // 2, 2, x.shape[0] // sequences, *x.shape[1:])
        return pairs[:, number].reshape(x.shape[0] // 2, *x.shape[1:])

    support, query = (jax.tree.map(partial(half, number), batch) for number in (0, 1))
    return support, query


def maml(
    phase: Phase, trained: Any, frozen: Any, batch: Any, key: Any, average: str, update: Any = 0
) -> tuple[Any, Record]:
    """The gradient by what the steps started from; see the module."""
    support, query = halves(batch)
    learnt = lambda start: _learnt(phase, start, frozen, support, key, update)  # noqa: E731
    return _asked(learnt, phase, trained, frozen, query, key, average, update)


def fomaml(
    phase: Phase, trained: Any, frozen: Any, batch: Any, key: Any, average: str, update: Any = 0
) -> tuple[Any, Record]:
    """The gradient by what the steps ended at; see the module."""
    support, query = halves(batch)
    fast = _learnt(phase, trained, frozen, support, key, update)
    return _asked(lambda end: end, phase, fast, frozen, query, key, average, update)


def reptile(
    phase: Phase, trained: Any, frozen: Any, batch: Any, key: Any, average: str, update: Any = 0
) -> tuple[Any, Record]:
    """The mean of the gradients along the steps; see the module."""
    turns = jax.tree.map(lambda *both: jnp.stack(both), *halves(batch))

    def step(carry: Any, number: jax.Array) -> Any:
        fast, total = carry
        here = jax.tree.map(lambda x: x[number % 2], turns)
        fast, slope, terms = _step(phase, fast, frozen, here, _key(key, number), update)
        return (fast, jax.tree.map(jnp.add, total, slope)), terms

    steps = phase.inner.steps
    zeros = jax.tree.map(jnp.zeros_like, trained)
    (_, total), (losses, terms) = jax.lax.scan(step, (trained, zeros), jnp.arange(steps))
    terms = jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)  # sums and counts: they add up
    weight = weight_of(terms[phase.terms[0].name].count, average)
    gradient = jax.tree.map(lambda g: weight * g / steps, total)
    return gradient, (weight, jnp.mean(losses), means(terms))


def query_alone(
    phase: Phase, trained: Any, frozen: Any, batch: Any, key: Any, average: str, update: Any = 0
) -> tuple[Any, Record]:
    """The plain gradient of the query half."""
    return mean(phase, trained, frozen, halves(batch)[1], key, average, update)


def _learnt(phase: Phase, trained: Any, frozen: Any, support: Any, key: Any, update: Any) -> Any:
    """φ_k: the weights after the inner steps."""

    def step(fast: Any, number: jax.Array) -> Any:
        return _step(phase, fast, frozen, support, _key(key, number), update)[0], None

    return jax.lax.scan(step, trained, jnp.arange(phase.inner.steps))[0]


def _step(
    phase: Phase, fast: Any, frozen: Any, batch: Any, key: Any, update: Any
) -> tuple[Any, Any, Any]:
    """The weights after one inner step, its gradient, and the loss with its terms before it."""

    def loss_of(fast: Any) -> Any:
        loss, terms = phase_loss(phase, fast, frozen, batch, key, update)
        return loss, (loss, terms)

    slope, told = jax.grad(loss_of, has_aux=True)(fast)
    if phase.layer_mask is not None:
        slope = keep_layers(slope, phase.layer_mask)
    return jax.tree.map(lambda w, g: w - phase.inner.rate * g, fast, slope), slope, told


def _asked(
    learnt: Callable[[Any], Any],
    phase: Phase,
    start: Any,
    frozen: Any,
    query: Any,
    key: Any,
    average: str,
    update: Any,
) -> tuple[Any, Record]:
    """The gradient by `start` of the loss on the query half at `learnt(start)`."""

    def weighted(start: Any) -> Any:
        own = _key(key, phase.inner.steps)  # other masks than those of the steps
        loss, terms = phase_loss(phase, learnt(start), frozen, query, own, update)
        weight = weight_of(terms[phase.terms[0].name].count, average)
        return weight * loss, (weight, loss, terms)

    gradient, (weight, loss, terms) = jax.grad(weighted, has_aux=True)(start)
    return gradient, (weight, loss, means(terms))


def _key(key: Any, number: Any) -> Any:
    return None if key is None else jax.random.fold_in(key, number)


# Costs in passes of all rows. A step is half of them; its second derivative takes as much again, as
# frozen weights have no gradient of their own.
# A pass has half of the rows. Next to the sum there are the weights after a step and their slope;
# `maml` keeps all steps.
HALF: dict[str, Any] = {"share": 0.5, "copies": lambda inner: 3}
MAML = one_by_one(
    maml, query_alone, cost=lambda inner: inner.steps + 0.5, twice=True, share=0.5,
    copies=lambda inner: 2 * inner.steps + 2,
)  # fmt: skip
FOMAML = one_by_one(fomaml, query_alone, cost=lambda inner: (inner.steps + 1) / 2, **HALF)
REPTILE = one_by_one(reptile, mean, cost=lambda inner: inner.steps / 2, **HALF)
