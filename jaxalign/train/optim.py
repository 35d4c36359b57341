"""The optimiser: clipping, then AdamW, on the trained parameters alone.

optimiser = make_optimiser(rate, clip_norm=1.0, layer_mask=None)
updates, state = optimiser.update(gradients, state, trained)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def make_optimiser(
    rate: optax.Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    missing: str = "zero",
    layer_mask: jax.Array | None = None,
) -> optax.GradientTransformation:
    """Clip by global norm, AdamW, learning rate.

    Args:
      missing: what a block without gradient does (blocks above the tap in an alignment update):
        `zero`: its moments decay and still move it, as in optax and ZeRO; `skip`: nothing of it
        changes, as torch's AdamW does with `grad is None`.
      layer_mask: [L], 1 where a block's adapter is trained; the others never move.
    """
    adam = {
        "zero": optax.chain(
            optax.scale_by_adam(beta1, beta2, eps), optax.add_decayed_weights(weight_decay)
        ),
        "skip": scale_by_present_adam(beta1, beta2, eps, weight_decay),
    }[missing]
    steps = [
        _keep_layers(layer_mask) if layer_mask is not None else optax.identity(),
        optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
        adam,
        # Decay must not move the blocks that are not trained either, hence the second mask.
        _keep_layers(layer_mask) if layer_mask is not None else optax.identity(),
        optax.scale_by_learning_rate(rate),
    ]
    return optax.chain(*steps)


def keep_layers(tree: Any, mask: jax.Array) -> Any:
    """The tree with zeros, whatever was there, in its blocks [L, ...] where the mask [L] is 0."""
    wide = lambda x: mask.reshape(-1, *(1,) * (x.ndim - 1)) > 0  # noqa: E731
    kept = jax.tree.map(lambda x: jnp.where(wide(x), x, 0), tree["blocks"])
    return tree | {"blocks": kept}


def _keep_layers(mask: jax.Array) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _=None: keep_layers(updates, mask))


class PresentAdamState(NamedTuple):
    """Adam moments, and each block's own count of updates [L]."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    mu: Any
    nu: Any


def scale_by_present_adam(
    beta1: float, beta2: float, eps: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW in which a block (a slice of the stacked axis) without gradient stands still.

    A block counts as present where any of its factors has a gradient. The tree is that of an
    adapter: every leaf of its blocks [L, ...]; one without blocks counts as one.
    """

    def init(params: Any) -> PresentAdamState:
        layers = jax.tree.leaves(params)[0].shape[0] if "blocks" in params else 1
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))  # donated: never shared
        return PresentAdamState(jnp.zeros(layers, jnp.int32), mu, nu)

    def update(grads: Any, state: PresentAdamState, params: Any) -> Any:
        first = 1 if "blocks" in params else 0  # axes of blocks
        each = [jnp.any(g != 0, axis=tuple(range(first, g.ndim))) for g in jax.tree.leaves(grads)]
        present = jnp.any(jnp.stack(each), axis=0).reshape(-1)  # [L]
        count = state.count + present

        def wide(x: jax.Array, like: jax.Array) -> jax.Array:
            return x.reshape(-1, *(1,) * (like.ndim - 1))  # [L, 1, ...]

        def moment(old: jax.Array, new: jax.Array, beta: float) -> jax.Array:
            return jnp.where(wide(present, new), beta * old + (1 - beta) * new, old)

        mu = jax.tree.map(lambda m, g: moment(m, g, beta1), state.mu, grads)
        nu = jax.tree.map(lambda n, g: moment(n, g * g, beta2), state.nu, grads)
        steps = jnp.maximum(count, 1).astype(jnp.float32)
        bias1, bias2 = 1 - beta1**steps, 1 - beta2**steps  # [L]

        def direction(m: jax.Array, n: jax.Array, weight: jax.Array) -> jax.Array:
            step = (m / wide(bias1, m)) / (jnp.sqrt(n / wide(bias2, n)) + eps)
            return jnp.where(wide(present, m), step + weight_decay * weight, 0.0)

        return jax.tree.map(direction, mu, nu, params), PresentAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
