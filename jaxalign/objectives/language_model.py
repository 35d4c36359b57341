"""Cross-entropy on the answer, without logits that nobody asked for.

Only positions that predict an answer token reach the head: they are gathered first, then pass it
in chunks, so at most one chunk of [tokens, V] float32 exists at a time. A chunk's logits give its
share of the loss and, in the same visit, of the gradient: nothing is computed twice.

    loss = language_model(states, batch)        # sum over answer tokens, count of them
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.objectives.declare import declare
from jaxalign.objectives.states import Loss, Needs, States
from jaxalign.sharding import constrain, devices, platform

IGNORE = -100
CHUNK_LOGITS = 1 << 24  # float32 logits alive at once on a device: 64 MiB
# A GPU reads the head from memory for each chunk: on an H100 updates of Llama 3 8B are 5 % faster
# with 512 MiB (docs/gpu.md). A smaller GPU takes less: this share of its memory, in powers of two,
# so that equal cards agree.
GPU_LOGITS, GPU_SHARE = 1 << 27, 1 / 96


def at_once(where: str | None = None, memory: float | None = None) -> int:
    """Float32 logits that a device holds at once; None: of the mesh in use, of this machine."""
    if (where or platform()) != "gpu":
        return CHUNK_LOGITS
    if memory is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    share = 1 << max(0, int(GPU_SHARE * memory / 4).bit_length() - 1)
    return max(CHUNK_LOGITS, min(GPU_LOGITS, share))


@declare(lambda **_: {"text": Needs(answers="trained")})
def language_model(states: States, batch: Any) -> Loss:
    """Token cross-entropy of the answers (natural log).

    Args:
      states: final states [B, A, D] at the places that predict an answer token, head [V, D],
        soft_cap of the logits.
      batch: `answers` [B, A] token ids, -100 where there is none.

    Returns:
      Sum and count over answer tokens; logs `accuracy` (teacher forced: tokens whose logit is above
      every other one; a tie is not a hit).
    """
    assert states.text.answers is not None and states.head is not None  # as declared
    return cross_entropy(states.text.answers, states.head, batch.answers, states.soft_cap)


def cross_entropy(
    hidden: jax.Array, head: jax.Array, answers: jax.Array, soft_cap: float = 0.0
) -> Loss:
    """Cross-entropy of hidden [B, A, D] through head [V, D] against answers [B, A].

    Args:
      soft_cap: c, where the model's logits are c·tanh(logits / c) (Gemma 2, section 2.2); 0: none.
    """
    batch, width, _ = hidden.shape
    # Logits are split over the whole mesh: rows over data, the vocabulary over the rest.
    chunk = max(1, min(width, at_once() * devices() // (batch * head.shape[0])))
    while width % chunk:
        chunk -= 1
    total, hits = _through(hidden, head, answers, soft_cap, chunk)
    count = jnp.sum(answers != IGNORE).astype(jnp.float32)
    return Loss(total, count, {"accuracy": hits})


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _through(
    hidden: jax.Array, head: jax.Array, answers: jax.Array, soft_cap: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, hits), in chunks of so many columns of A."""

    def body(_: Any, piece: Any) -> Any:
        total, hits, _ = _visit(piece[0], head, piece[1], soft_cap, slopes="none")
        return None, (total, hits)

    _, (totals, hits) = jax.lax.scan(body, None, (_split(hidden, chunk), _split(answers, chunk)))
    return jnp.sum(totals), jnp.sum(hits)


def _forward(hidden: Any, head: Any, answers: Any, soft_cap: float, chunk: int) -> Any:
    """The same, and its gradients: by `head` only where it is trained."""
    pieces = (_split(hidden.value, chunk), _split(answers.value, chunk))
    weights = head.value

    def body(by_head: Any, piece: Any) -> Any:
        total, hits, slopes = _visit(piece[0], weights, piece[1], soft_cap, slopes="logits")
        by_hidden = jnp.einsum("BAV,VD->BAD", slopes, weights)
        if by_head is not None:
            wide = {"preferred_element_type": jnp.float32}
            by_head = by_head + jnp.einsum("BAV,BAD->VD", slopes, piece[0], **wide)
        return by_head, (total, hits, constrain(by_hidden, "B T D"))

    start = jnp.zeros(weights.shape, jnp.float32) if head.perturbed else None
    by_head, (totals, hits, by_hidden) = jax.lax.scan(body, start, pieces)
    by_hidden = jnp.moveaxis(by_hidden, 0, 1).reshape(hidden.value.shape)
    by_head = None if by_head is None else by_head.astype(weights.dtype)
    return (jnp.sum(totals), jnp.sum(hits)), (by_hidden, by_head)


def _backward(soft_cap: float, chunk: int, kept: Any, slopes: Any) -> Any:
    by_hidden, by_head = kept
    slope = slopes[0]  # the hits have none
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    scaled = lambda x: None if x is None else (slope * x).astype(x.dtype)  # noqa: E731
    return scaled(by_hidden), scaled(by_head), None


_through.defvjp(_forward, _backward, symbolic_zeros=True)


def _visit(
    hidden: jax.Array, head: jax.Array, answers: jax.Array, soft_cap: float, slopes: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(sum of losses, hits, slopes of the sum by the logits before the cap) of one chunk.

    Args:
      slopes: `logits` [B, A, V] in the states' dtype, or `none`.
    """
    # Rows are gathered where the head is split over the vocabulary: each device then sees all
    # rows of its data shard and its share of the words.
    logits = jnp.einsum("BAD,VD->BAV", hidden, head, preferred_element_type=jnp.float32)
    logits = constrain(logits, "B A V", "logits")
    inner = jnp.tanh(logits / soft_cap) if soft_cap else logits
    logits = soft_cap * inner if soft_cap else logits
    real = answers != IGNORE
    wanted = jnp.where(real, answers, 0)[..., None] == jnp.arange(head.shape[0])  # [B, A, V]
    right = jnp.sum(jnp.where(wanted, logits, 0.0), axis=-1)
    top = jnp.max(logits, axis=-1)
    powers = jnp.exp(logits - top[..., None])
    whole = jnp.sum(powers, axis=-1)
    alone = jnp.sum(logits == top[..., None], axis=-1) == 1  # else all words are as likely
    hits = jnp.sum((real & (right >= top) & alone).astype(jnp.float32))
    total = jnp.sum(jnp.where(real, top + jnp.log(whole) - right, 0.0))
    if slopes == "none":
        return total, hits, None
    slope = powers / whole[..., None] - wanted
    slope = slope * (1 - inner * inner) if soft_cap else slope
    slope = jnp.where(real[..., None], slope, 0.0).astype(hidden.dtype)
    return total, hits, constrain(slope, "B A V", "logits")


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, A, ...] -> [A / chunk, B, chunk, ...]."""
    pieces = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return jnp.moveaxis(pieces, 1, 0)
