"""Lens: other languages say the same as the pivot, in states that are their own.

Zhao et al. 2024 (arXiv 2410.04407), after github.com/circle-hit/Lens at 2ffa3f0. The
subspace is that of `jaxalign prepare subspace` (w: what languages share, of length 1; U: where they
differ; d_l: from the pivot p to language l within U), h is after the final norm, D its width:

    bring  = |w'(h_p - h_l)|^2 / D                         h of a sentence's last token
    apart  = |U'(h_l - h_l,base) - target U' d_l|^2 / D    likewise
    retain = |m_p - m_p,base|^2 / D                        m: mean over the pivot's tokens
    L = bringing * bring + apart + retaining * retain

The paper's lambda 1, 2, 3 are `bringing`, `target`, `retaining`, all 1 there: lambda 2 multiplies
the shift that is aimed at, not the loss. At the start, where model and base are one, `retain` and
its gradient are 0.

Released code: `hidden_states[-1]`, which follows the final norm; the last position of left-padded
rows, but of right-padded ones when the subspace is measured, so that a short row's state is that of
padding; m is the mean over all positions, padding included; the sum over languages; blocks from
30 of 32 trained whole, the rest frozen; chat prompts, with a system turn when measuring alone.

Different here: real tokens alone; the mean over pairs, whatever their languages (that sum is
languages times as large); plain sentences unless the data is rendered; adapters in the last blocks
(`lora.layers`). The pivot is the target of every pair.

    align: {objective: lens, options: {subspace: {file: subspace.npz}}}
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.errors import UserError
from jaxalign.objectives.declare import declare
from jaxalign.objectives.states import FINAL, Loss, Needs, States, Tap
from jaxalign.objectives.subspace import Subspace

LAST, MEAN = Tap(FINAL, "last"), Tap(FINAL, "mean")


def _needs(subspace: Subspace, **_: Any) -> dict[str, Needs]:
    if not isinstance(subspace, Subspace):
        raise UserError(
            "lens: the option subspace should be {file: X.npz}, which jaxalign prepare subspace "
            "writes"
        )
    if (subspace.layer, subspace.pooling) != (LAST.layer, LAST.pool):
        raise UserError(
            f"lens: {subspace.file} was measured at layer {subspace.layer}, pooling "
            f"{subspace.pooling}; measure it with --layer final --pooling last"
        )
    return {"source": Needs((LAST,), reference=(LAST,)), "target": Needs((LAST, MEAN), (MEAN,))}


@declare(_needs, group=1)
def lens(
    states: States,
    batch: Any,
    *,
    subspace: Subspace,
    bringing: float = 1.0,
    target: float = 1.0,
    retaining: float = 1.0,
) -> Loss:
    """The three terms of sentence pairs whose targets are the pivot.

    Args:
      states: last [B, D] of both sides; mean [B, D] of the target; references of source and mean.
      batch: `source_language` [B], each a language of the subspace.
      subspace: of the same base, after the final norm, of last tokens.
      bringing: weight of `bring`.
      target: how far languages move, in shifts of the base.
      retaining: weight of `retain`.

    Returns:
      Sum over pairs, and their number; logs `bring`, `apart`, `retain`, without weights.

    Raises:
      UserError: something else than such a subspace.
    """
    base = {side: jax.lax.stop_gradient(view.reference) for side, view in states.views.items()}
    source, pivot = states.source.taps[LAST], states.target.taps[LAST]
    dim = source.shape[-1]
    # U's columns are orthonormal: lengths are the same in its coordinates.
    one_of = batch.source_language[:, None] == subspace.numbers  # [B, n]
    wanted = one_of.astype(jnp.float32) @ (subspace.shifts @ subspace.basis)  # [B, r]
    moved = (source - base["source"][LAST]) @ subspace.basis
    changed = states.target.taps[MEAN] - base["target"][MEAN]
    terms = {
        "bring": jnp.square((pivot - source) @ subspace.axis) / dim,
        "apart": jnp.sum(jnp.square(moved - target * wanted), axis=-1) / dim,
        "retain": jnp.mean(jnp.square(changed), axis=-1),
    }
    said, meant = (jnp.any(view.real != 0, axis=-1) for view in (states.source, states.target))
    there = (said & meant).astype(jnp.float32)  # [B]
    sums = {name: jnp.sum(values * there) for name, values in terms.items()}
    total = bringing * sums["bring"] + sums["apart"] + retaining * sums["retain"]
    return Loss(total, jnp.sum(there), jax.lax.stop_gradient(sums))
