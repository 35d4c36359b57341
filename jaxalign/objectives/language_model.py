"""Cross-entropy on the answer, without logits that nobody asked for.

Only positions that predict an answer token reach the head: they are gathered first, then pass it
in chunks (`chunked`).

    loss = language_model(states, batch)        # sum over answer tokens, count of them
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.objectives.chunked import columns, summed
from jaxalign.objectives.declare import Share, declare
from jaxalign.objectives.states import IGNORE, Loss, Needs, States
from jaxalign.sharding import constrain


@declare(lambda view, **_: {view: Needs(answers="trained")}, group=1, by_token=True)
def language_model(
    states: States, batch: Any, *, view: str = "text", label_smoothing: Share = 0.0
) -> Loss:
    """Token cross-entropy of the answers (natural log).

    Args:
      states: final states [B, A, D] at the places that predict an answer token (or [W, A, D]),
        head [V, D], soft_cap of the logits.
      batch: `answers` [B, A] token ids, -100 where there is none (or [W, A]).
      view: the side whose answers are predicted: `text`; of rows of two prompts `student`.
      label_smoothing: e: the loss is (1 - e) of the token's and e of the mean over all tokens of
        the vocabulary, as torch's CrossEntropyLoss has it.

    Returns:
      Sum and count over answer tokens; logs `accuracy` (teacher forced: tokens whose logit is above
      every other one; a tie is not a hit).
    """
    answers, head = states.views[view].answers, states.head
    assert answers is not None and head is not None  # as declared
    return cross_entropy(answers, head, batch.answers, states.soft_cap, label_smoothing)


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    answers: jax.Array,
    soft_cap: float = 0.0,
    label_smoothing: float = 0.0,
) -> Loss:
    """Cross-entropy of hidden [B, A, D] through head [V, D] against answers [B, A].

    Args:
      soft_cap: c, where the model's logits are c·tanh(logits / c) (Gemma 2, section 2.2); 0: none.
      label_smoothing: as of `language_model`.
    """
    chunk = columns(hidden.shape[1], hidden.shape[0] * head.shape[0])
    visit = partial(_visit, soft_cap=soft_cap, smoothing=label_smoothing)
    total, hits = summed(visit, hidden, head, answers, chunk)
    count = jnp.sum(answers != IGNORE).astype(jnp.float32)
    return Loss(total, count, {"accuracy": hits})


def through_head(
    hidden: jax.Array, head: jax.Array, soft_cap: float
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, c, V] float32 after the cap, and tanh of them before it: its slope's inner part.

    Rows are gathered where the head is split over the vocabulary: each device then sees all rows
    of its data shard and its share of the words.
    """
    logits = jnp.einsum("BAD,VD->BAV", hidden, head, preferred_element_type=jnp.float32)
    logits = constrain(logits, "B A V", "logits")
    inner = jnp.tanh(logits / soft_cap) if soft_cap else logits
    return soft_cap * inner if soft_cap else logits, inner


def _visit(
    hidden: jax.Array,
    head: jax.Array,
    answers: jax.Array,
    slopes: str,
    *,
    soft_cap: float,
    smoothing: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(sum of losses, hits, slopes of the sum by the logits before the cap) of one chunk."""
    logits, inner = through_head(hidden, head, soft_cap)
    words = head.shape[0]
    real = answers != IGNORE
    wanted = jnp.where(real, answers, 0)[..., None] == jnp.arange(words)  # [B, A, V]
    right = jnp.sum(jnp.where(wanted, logits, 0.0), axis=-1)
    top = jnp.max(logits, axis=-1)
    powers = jnp.exp(logits - top[..., None])
    whole = jnp.sum(powers, axis=-1)
    alone = jnp.sum(logits == top[..., None], axis=-1) == 1  # else all words are as likely
    hits = jnp.sum((real & (right >= top) & alone).astype(jnp.float32))
    if smoothing:
        right = (1 - smoothing) * right + smoothing * jnp.mean(logits, axis=-1)
        wanted = (1 - smoothing) * wanted + smoothing / words
    total = jnp.sum(jnp.where(real, top + jnp.log(whole) - right, 0.0))
    if slopes == "none":
        return total, hits, None
    slope = powers / whole[..., None] - wanted
    slope = slope * (1 - inner * inner) if soft_cap else slope
    slope = jnp.where(real[..., None], slope, 0.0).astype(hidden.dtype)
    return total, hits, constrain(slope, "B A V", "logits")
