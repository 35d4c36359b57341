"""AlignX's second term: are two texts in one language? A small head should know it from the states.

    L = mean over all ordered pairs (i, j) of CE(MLP([e_i; e_j]), language_i = language_j)

(arXiv 2509.24338.) e are the texts of a batch of translations: of each row the source and the
answer. Each is the mean, after the final norm, of the states that *predict* its tokens (one token
earlier than the tokens). The head is a SwiGLU MLP without bias, 2D -> 128 -> 2.

As in the released code a text is compared with itself, too, and the classes are not balanced.
Different: that code averages over all pairs of a device; here over those of texts that are there.
The head starts from normal numbers by 1/sqrt(inputs), our choice; it is trained next to the
adapter, kept in checkpoints and not exported.

    objectives: [{objective: language_matching, weight: 0.4}]      # of the phase `task`
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.objectives.declare import Count, declare
from jaxalign.objectives.states import ANSWER, FINAL, USER, Loss, Needs, States, Tap

TAPS = Tap(FINAL, "predicts_prompt"), Tap(FINAL, "predicts_answer")


def start(spec: Any, key: jax.Array, width: int, **_: Any) -> dict[str, jax.Array]:
    """The head as it begins: `gate`, `up` [2 D, width] and `down` [width, 2], float32."""
    sizes = {"gate": (2 * spec.dim, width), "up": (2 * spec.dim, width), "down": (width, 2)}
    return {
        name: jax.random.normal(jax.random.fold_in(key, number), size) * size[0] ** -0.5
        for number, (name, size) in enumerate(sizes.items())
    }


@declare(lambda **_: {"text": Needs(TAPS)}, head=start)
def language_matching(states: States, batch: Any, *, head: Any, width: Count = 128) -> Loss:
    """Cross-entropy of "one language" over all ordered pairs of a batch's texts.

    Args:
      states: `TAPS` [B, D] float32 of task rows.
      batch: `roles` [B, T]; `prompt_language`, `answer_language` [B, 1].
      head: as `start` makes it.

    Returns:
      Sum and count over pairs [2B, 2B] of texts with tokens; logs `accuracy` (a tie is not a hit).
    """
    texts = jnp.concatenate([states.text.taps[tap] for tap in TAPS])  # [2B, D]
    spoken = jnp.concatenate([batch.prompt_language, batch.answer_language])[:, 0]
    there = jnp.concatenate([jnp.any(batch.roles == role, -1) for role in (USER, ANSWER)])
    dim = texts.shape[-1]

    def both(weights: jax.Array) -> jax.Array:
        """[e_i; e_j] @ weights, [2B, 2B, width]."""
        return (texts @ weights[:dim])[:, None] + (texts @ weights[dim:])[None]

    logits = (jax.nn.silu(both(head["gate"])) * both(head["up"])) @ head["down"]  # [2B, 2B, 2]
    same = (spoken[:, None] == spoken[None]).astype(jnp.int32)
    counts = (there[:, None] & there[None]).astype(jnp.float32)
    right = jnp.take_along_axis(logits, same[..., None], axis=-1)[..., 0]
    other = jnp.take_along_axis(logits, 1 - same[..., None], axis=-1)[..., 0]
    losses = jax.nn.softplus(other - right)
    hits = jax.lax.stop_gradient(jnp.sum(counts * (right > other)))
    return Loss(jnp.sum(counts * losses), jnp.sum(counts), {"accuracy": hits})
