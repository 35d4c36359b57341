"""The paper's alignment loss: parallel sentences find each other among their neighbours.

    L = - mean_i log( exp(cos(s_i, t_i) / tau) / sum_j exp(cos(s_i, t_j) / tau) )

(Liu & Niehues 2025, eq. 1), on states pooled over the tokens of one middle layer. The paper's code
is one-way: each source looks for its target, never the reverse.

    loss = contrastive(states, batch, layer=16, temperature=0.1)

With `view='text'` the two sides are the user's text and the answer of one task row, so that the
answer has read the text (AlignX, arXiv 2509.24338: rows of translation).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign.errors import UserError
from jaxalign.objectives.declare import Count, Positive, both_sides, declare
from jaxalign.objectives.pooling import Pooling
from jaxalign.objectives.standards import Form
from jaxalign.objectives.states import ANSWER, USER, Loss, Needs, States, Tap

SMALLEST_NORM = 1e-8


def similarities(source: jax.Array, target: jax.Array) -> jax.Array:
    """cos(source_i, target_j), [..., B, B] float32, for vectors [..., B, D]."""
    return jnp.einsum("...iD,...jD->...ij", _unit(source), _unit(target))


def _taps(view: str, layer: int, pooling: str, form: str) -> tuple[Tap, Tap]:
    """Where source and target are read."""
    pools = ("prompt", "answer") if view == "text" else (pooling, pooling)
    return Tap(layer, pools[0], form), Tap(layer, pools[1], form)


def _needs(view: str, layer: int, pooling: str, form: str, **_: Any) -> dict[str, Needs]:
    source, target = _taps(view, layer, pooling, form)
    if view == "text":
        return {"text": Needs((source, target))}
    return both_sides(Needs((source,)))


@declare(
    _needs,
    settings="layer pooling form temperature direction negatives group detach",
    group=lambda negatives, group, **_: 0 if negatives == "global" else group,
)
def contrastive(
    states: States,
    batch: Any,
    *,
    layer: int,
    pooling: Pooling = "mean",
    form: Form = "raw",
    temperature: Positive = 0.1,
    direction: Literal["one_way", "symmetric"] = "one_way",
    negatives: Literal["group", "global"] = "group",
    group: Count = 32,
    detach: Literal["none", "source", "target"] = "none",
    view: Literal["pairs", "text"] = "pairs",
    duplicates: Literal["keep", "mask"] = "keep",
) -> Loss:
    """InfoNCE between pooled sources and targets of one layer.

    Args:
      states: pooled vectors [B, D] float32 of both sides at `layer`; `form`: as `align.states`.
      batch: `source_mask`, `target_mask` [B, T]; a pair with an empty side is padding and is
        neither an anchor nor a candidate.
      direction: one_way (source -> target) or symmetric (mean of both ways).
      negatives: `group`: candidates are the targets of the same `group` consecutive pairs, which
        is what one device of the original sees; `global`: of the whole micro-batch.
      detach: the side through which no gradient flows: none, source, target.
      view: `pairs`, or `text`: prompt and answer of a task row, each pooled over its tokens.
      duplicates: candidates whose pair has the source or the target of the anchor's, and which are
        translations of it, too: `keep` (the paper's code) takes them for wrong ones, `mask` leaves
        them out.

    Returns:
      Sum and count over pairs. Logs: `retrieval` (sources whose own target is nearer than every
      candidate that is another sentence; a tie is not a hit), `duplicates` (pairs that have a copy
      of their own target among the other candidates), `cosine` of the true pairs, `norm` of the
      states, `spread` (1 - |mean of unit vectors|^2: 0 when all sentences have collapsed to one
      direction), `deviation` (standard deviation of the cosines of sources with other pairs'
      targets: far below the temperature, the loss is flat).
    """
    taps = _taps(view, layer, pooling, form)
    sides = (states.text,) * 2 if view == "text" else (states.source, states.target)
    source, target = (side.taps[tap] for side, tap in zip(sides, taps, strict=True))  # [B, D]
    if view == "text":
        masks = batch.roles == USER, batch.roles == ANSWER
        texts = batch.tokens, batch.tokens
    else:
        masks, texts = (batch.source_mask, batch.target_mask), (batch.source, batch.target)
    stop = jax.lax.stop_gradient
    source = stop(source) if detach == "source" else source
    target = stop(target) if detach == "target" else target
    real = jnp.any(masks[0] != 0, -1) & jnp.any(masks[1] != 0, -1)  # [B]
    size = source.shape[0] if negatives == "global" else min(group, source.shape[0])
    if source.shape[0] % size:
        raise UserError(
            f"contrastive: {source.shape[0]} rows are not a multiple of group={size}; set "
            "negatives=global or another group"
        )
    fold = lambda x: x.reshape(-1, size, *x.shape[1:])  # noqa: E731  [B, ...] -> [G, g, ...]
    source, target, real = fold(source), fold(target), fold(real)
    digests = [fold(_digest(*side)) for side in zip(texts, masks, strict=True)]  # each [G, g]
    # [G, g, g]: not copies of one sentence
    differ, others = (one[:, :, None] != one[:, None, :] for one in digests)
    wrong = differ & others if duplicates == "mask" else None

    cosine = similarities(source, target)  # [G, g, g]: row = source, column = target
    losses, hits = _rank(cosine / temperature, real, others, wrong)
    if direction == "symmetric":
        back, _ = _rank(jnp.swapaxes(cosine, 1, 2) / temperature, real, others, wrong)
        losses = (losses + back) / 2
    count = jnp.sum(real).astype(jnp.float32)
    add = lambda x: jnp.sum(jnp.where(real, x, 0.0))  # noqa: E731
    both = (
        _unit(jnp.concatenate([source, target], axis=-2))
        * jnp.concatenate([real, real], -1)[..., None]
    )
    centre = jnp.sum(both, axis=(0, 1)) / jnp.maximum(2 * count, 1.0)  # [D]
    logs = {
        "retrieval": add(hits),
        "duplicates": add(jnp.sum(~others & real[:, None, :], axis=-1) > 1),
        "cosine": add(jnp.diagonal(cosine, axis1=1, axis2=2)),
        "norm": add(jnp.linalg.norm(source, axis=-1)),
        "spread": (1.0 - jnp.sum(centre * centre)) * count,
        "deviation": _deviation(cosine, real) * count,
    }
    return Loss(add(losses), count, jax.tree.map(stop, logs))


def _deviation(cosine: jax.Array, real: jax.Array) -> jax.Array:
    """Standard deviation of cosine [G, g, g] over real pairs of different rows; 0 without any."""
    other = ~jnp.eye(cosine.shape[-1], dtype=bool)
    there = (real[:, :, None] & real[:, None, :] & other).astype(jnp.float32)
    number = jnp.maximum(jnp.sum(there), 1.0)
    mean = jnp.sum(there * cosine) / number
    return jnp.sqrt(jnp.sum(there * (cosine - mean) ** 2) / number)


def _rank(
    logits: jax.Array, real: jax.Array, others: jax.Array, wrong: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the diagonal among the `wrong` candidates (None: all), and whether
    it is above all others: both [G, g]."""
    there = real[:, None, :]
    if wrong is not None:
        there = there & (wrong | jnp.eye(wrong.shape[-1], dtype=bool))
    logits = jnp.where(there, logits, -jnp.inf)
    right = jnp.diagonal(logits, axis1=1, axis2=2)
    right = jnp.where(real, right, 0.0)
    # A group of padding alone has no candidate: its normaliser is kept finite, then dropped.
    logits = jnp.where(jnp.any(real, -1)[:, None, None], logits, 0.0)
    # A tie is not a hit: where all states have collapsed into one, nothing is found.
    hits = right > jnp.max(logits, axis=-1, initial=-jnp.inf, where=others)
    return jax.nn.logsumexp(logits, axis=-1) - right, hits


def _digest(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """[B] uint32 of rows [B, T]: those of equal sentences are equal, wherever they stand."""
    powers = jnp.cumprod(jnp.full(tokens.shape[-1], 0x9E3779B1, jnp.uint32))
    numbers = jnp.where(mask != 0, tokens + 1, 0).astype(jnp.uint32)
    place = jnp.maximum(jnp.cumsum(mask != 0, axis=-1) - 1, 0)  # within the sentence
    return jnp.sum(numbers * powers[place], axis=-1, dtype=jnp.uint32)


def _unit(x: jax.Array) -> jax.Array:
    # Each norm is clamped alone, as in torch's cosine_similarity; the inner maximum keeps the
    # gradient of a zero vector (a padded row) finite.
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.maximum(jnp.sqrt(jnp.maximum(squares, 1e-30)), SMALLEST_NORM)
