"""Cross-entropy on the answer, without logits that nobody asked for.

Only positions that predict an answer token reach the head: they are gathered first, then pass it
in chunks whose logits are recomputed in the backward pass, so at most one chunk of [tokens, V]
float32 exists at a time.

    loss = language_model(states, batch)        # sum over answer tokens, count of them
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.objectives.states import Loss, TaskStates
from jaxalign.sharding import constrain

IGNORE = -100
CHUNK_LOGITS = 1 << 24  # float32 logits alive at once: 64 MiB


def language_model(states: TaskStates, batch: Any) -> Loss:
    """Token cross-entropy of the answers (natural log).

    Args:
      states: hidden [B, T, D] after the final norm, head [V, D], soft_cap of the logits.
      batch: `answer_at` [B, A], the position that predicts each answer token; `answers` [B, A]
        token ids, -100 where there is none.

    Returns:
      Sum and count over answer tokens; logs `accuracy` (argmax hits, teacher forced).
    """
    # A one-hot product picks rows exactly and, unlike a gather, splits and transposes cheaply.
    places = jnp.arange(states.hidden.shape[1])
    pick = (batch.answer_at[:, :, None] == places).astype(states.hidden.dtype)  # [B, A, T]
    hidden = jnp.einsum("BAT,BTD->BAD", pick, states.hidden)
    return cross_entropy(hidden, states.head, batch.answers, states.soft_cap)


def cross_entropy(
    hidden: jax.Array, head: jax.Array, answers: jax.Array, soft_cap: float = 0.0
) -> Loss:
    """Cross-entropy of hidden [B, A, D] through head [V, D] against answers [B, A].

    Args:
      soft_cap: c, where the model's logits are c·tanh(logits / c) (Gemma 2, section 2.2); 0: none.
    """
    batch, width, _ = hidden.shape
    chunk = max(1, min(width, CHUNK_LOGITS // (batch * head.shape[0])))
    while width % chunk:
        chunk -= 1
    if chunk == width:
        total, hits = _chunk(hidden, head, answers, soft_cap)
    else:

        def split(x: jax.Array) -> jax.Array:  # [B, A, ...] -> [A/chunk, B, chunk, ...]
            return jnp.moveaxis(x.reshape(batch, width // chunk, chunk, *x.shape[2:]), 1, 0)

        @jax.checkpoint
        def body(carry: Any, piece: Any) -> Any:
            total, hits = _chunk(piece[0], head, piece[1], soft_cap)
            return (carry[0] + total, carry[1] + hits), None

        zero = jnp.zeros((), jnp.float32)
        (total, hits), _ = jax.lax.scan(body, (zero, zero), (split(hidden), split(answers)))
    count = jnp.sum(answers != IGNORE).astype(jnp.float32)
    return Loss(total, count, {"accuracy": hits})


def _chunk(
    hidden: jax.Array, head: jax.Array, answers: jax.Array, soft_cap: float
) -> tuple[jax.Array, jax.Array]:
    logits = jnp.einsum("BAD,VD->BAV", hidden, head, preferred_element_type=jnp.float32)
    logits = constrain(logits, "B A V")
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    real = answers != IGNORE
    wanted = jnp.where(real, answers, 0)[..., None]
    right = jnp.take_along_axis(logits, wanted, axis=-1)[..., 0]
    top = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    normaliser = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    hits = jnp.sum(jnp.where(real, right >= top, False).astype(jnp.float32))
    return jnp.sum(jnp.where(real, normaliser - right, 0.0)), hits
