"""DALI: is each answer option, with its premise, nearest to its own translation?

An instance-level score: whether *this* question is aligned, to be set against whether the model
answers it.

    aligned = dali(english, welsh)                       # [items] bool, states [items, options, D]
    aligned.mean(), dali(english, welsh, variant="strong").mean()
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.probe.vectors import shape_of, unit

ITEMS = 512  # at a time on the accelerator


def dali(source: Any, target: Any, *, variant: str = "plain", rule: str = "all") -> np.ndarray:
    """Whether each item is aligned between two languages, [items] bool; the mean is the score.

    Item by item, S(i, j) is the cosine between premise + option i in the source language and
    premise + option j in the target language (Ravisankar et al. 2025, arXiv 2504.09378).
    All comparisons are strict.

    - `rule="all"`: the smallest S(i, i) beats the largest S(i, j), i != j: what the authors' code
      computes for Belebele. With two options it differs from the equation in the column also being
      looked at.
    - `rule="row"`: S(i, i) > S(i, j) for all i != j: the equation as printed.
    - `variant="strong"` (DALI_S): every S(i, i) also beats the cosines of different options within
      the source language and within the target language.

    Args:
      source, target: [items, options, D] floating point, states of premise + option at one layer
        (the paper: of the last token).
      variant: plain or strong.
      rule: all or row.

    Raises:
      UserError: unequal shapes, fewer than 2 options, bad states, or an unknown word.
    """
    shapes = shape_of(source), shape_of(target)
    if shapes[0] != shapes[1]:
        raise UserError(f"both languages must have the same items and options, not {shapes}")
    if shapes[0][1] < 2:
        raise UserError("an item needs at least 2 options")
    if variant not in ("plain", "strong"):
        raise UserError(f"DALI's variant is plain or strong, not {variant!r}")
    if rule not in ("all", "row"):
        raise UserError(f"DALI's rule is all or row, not {rule!r}")
    aligned = []
    for start in range(0, shapes[0][0], ITEMS):
        both = [
            jnp.asarray(side[start : start + ITEMS]).astype(jnp.float32)
            for side in (source, target)
        ]
        if not all(bool(jnp.isfinite(side).all()) for side in both):
            raise UserError("a state is not finite: extract in float32")
        aligned.append(np.asarray(_aligned(*both, variant, rule)))
    return np.concatenate(aligned)


@partial(jax.jit, static_argnames=("variant", "rule"))
def _aligned(source: jax.Array, target: jax.Array, variant: str, rule: str) -> jax.Array:
    x, y = unit(source), unit(target)  # [items, options, D]
    cosine = partial(jnp.einsum, "niD,njD->nij", precision=jax.lax.Precision.HIGHEST)
    own = jnp.eye(x.shape[1], dtype=bool)
    across = cosine(x, y)
    right = jnp.diagonal(across, axis1=1, axis2=2)  # [items, options]
    wrong = jnp.where(own, -jnp.inf, across)
    rivals = jnp.max(wrong, axis=2 if rule == "row" else (1, 2), keepdims=rule == "all")
    good = jnp.all(right > rivals.reshape(len(x), -1), axis=1)
    if variant == "strong":
        within = jnp.stack([jnp.where(own, -jnp.inf, cosine(z, z)) for z in (x, y)])
        good &= jnp.min(right, axis=1) > jnp.max(within, axis=(0, 2, 3))
    return good
