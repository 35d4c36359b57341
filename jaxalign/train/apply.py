"""From the phases' gradients to the next state, or to the same one where something is not finite.

update = make_update(optimiser, 'microbatch', rate)
state, metrics = update(state, {'task': ..., 'align': ...}, losses, (('task', 2), ('align', 2)))
metrics['skipped']                               # 1: parameters and moments are as they were
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.train.combine import COMBINE, cosine
from jaxalign.train.state import TrainState

Sizes = tuple[tuple[str, int], ...]  # (phase, its micro-batches in this update)


def make_update(
    optimiser: optax.GradientTransformation,
    every: str,
    rate: optax.Schedule | None,
    way: str = "weighted",
) -> Callable[[TrainState, dict, dict, Sizes], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, gradients, losses, sizes) -> (state, metrics), to be compiled.

    Where the gradient, a loss or what would become of the parameters is not finite, the update is
    skipped: `skipped` is 1, and only the state's step and the schedule go on.
    """

    def looked(state: TrainState, gradients: dict, sizes: Sizes) -> Any:
        gradient, metrics = combine(gradients, dict(sizes), every, way)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        if rate is not None:
            metrics["learning_rate"] = rate(state.step)
        return gradient, metrics

    def updated(state: TrainState, gradients: dict, sizes: Sizes) -> Any:
        gradient, metrics = looked(state, gradients, sizes)
        changes, moments = optimiser.update(gradient, state.optimiser, state.trained)
        trained = optax.apply_updates(state.trained, changes)
        return TrainState(state.step + 1, trained, moments), metrics

    def skipped(state: TrainState, gradients: dict, sizes: Sizes) -> Any:
        _, metrics = looked(state, gradients, sizes)
        moments = _tick(state.optimiser)
        return TrainState(state.step + 1, state.trained, moments), metrics

    def apply_step(state: TrainState, gradients: dict, losses: dict, sizes: Sizes) -> Any:
        norm = looked(state, gradients, sizes)[1]["grad_norm"]
        # What would come of the parameters is computed once more in the branch that is taken:
        # kept until the verdict, new and old state would both be in memory.
        after = updated(state, gradients, sizes)[0].trained
        finite = _all_finite((norm, losses, after))
        branches = (partial(one, sizes=sizes) for one in (updated, skipped))
        state, metrics = jax.lax.cond(finite, *branches, state, gradients)
        return state, metrics | {"skipped": 1 - finite.astype(jnp.int32)}

    return apply_step


def combine(
    gradients: dict[str, Any], sizes: dict[str, int], every: str, way: str = "weighted"
) -> tuple[Any, dict[str, jax.Array]]:
    """One gradient from the phases', in the order of `sizes`; their norms, and the cosine of two.

    Turns by micro-batch weigh each phase by its share of the update's micro-batches (`sizes`);
    joint training adds the phases.

    Args:
      way: a name of `COMBINE`.
    """
    gradients = {name: gradients[name] for name in sizes}  # a compiled function gets them sorted
    metrics = {f"{name}/grad_norm": optax.tree.norm(g) for name, g in gradients.items()}
    if len(gradients) == 2:
        metrics["gradient_cosine"] = cosine(*gradients.values())
    total = sum(sizes.values())
    share = {name: 1.0 if every == "joint" else size / total for name, size in sizes.items()}
    scaled = [jax.tree.map(partial(jnp.multiply, share[n]), g) for n, g in gradients.items()]
    return COMBINE[way](scaled), metrics


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _tick(moments: Any) -> Any:
    """The schedule's clock goes on: it counts updates, not successes."""
    is_clock = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    tick = lambda node: node._replace(count=node.count + 1) if is_clock(node) else node  # noqa: E731
    return jax.tree.map(tick, moments, is_leaf=is_clock)
