"""Distillation: behind one prompt the model answers as a teacher does behind another.

FILTER (Fang et al. 2021, arXiv 2009.05166), after github.com/yuwfan/FILTER at 6dac390. A row is one
answer behind two prompts (`data/prompts.py`), such as one command in two languages:

    p_t = softmax(z_teacher / T)        p_s = softmax(z_student / T)
    L = T^2 * mean over the answer's tokens of sum p_t (log p_t - log p_s)

That is torch's kl_div(log p_s, p_t, reduction="batchmean") * T^2; its slope by z_student is
T (p_s - p_t). No gradient flows into the teacher, which is one of

    online    the model itself at this update, without dropout
    start     the adapter that training started from (`adapter.start`), or the base where none was
    base      the frozen base

Released code: the teacher's logits are written to disk by models of a first phase that read the
student's own prompt (`start` with `align.pivot=''`), averaged over several; the English prompt's
are an option there. T is 0.1 for classes, 6 for answers, 1 for tags; for classes the mean is over
the vocabulary, too, which makes the loss smaller by their number. Beside it counts the student's
own cross-entropy, with 1 - alpha and alpha of this term. Here: one teacher, at each token of the
answer with the tokens before it given. FILTER's fusion of both texts within an encoder is not here
(`bilingual_prompt` puts them into one prompt).

    align: {rows: prompts, objective: distil, options: {teacher: online, temperature: 2.0}}
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign.objectives.chunked import columns, summed
from jaxalign.objectives.declare import Positive, declare
from jaxalign.objectives.language_model import through_head
from jaxalign.objectives.states import IGNORE, Loss, Needs, States
from jaxalign.sharding import constrain

TEACHERS = {"online": "stopped", "start": "start", "base": "reference"}  # -> `Needs.answers`


def _needs(teacher: str, **_: Any) -> dict[str, Needs]:
    return {"student": Needs(answers="trained"), "teacher": Needs(answers=TEACHERS[teacher])}


@declare(_needs, group=1)
def distil(
    states: States,
    batch: Any,
    *,
    teacher: Literal["online", "start", "base"] = "online",
    temperature: Positive = 1.0,
) -> Loss:
    """T^2 KL(teacher || student) of the answer's tokens, natural log.

    Args:
      states: final states [B, A, D] of both sides at the places that predict an answer token, head
        [V, D], soft_cap of the logits.
      batch: `answers` [B, A] token ids, -100 where there is none.
      teacher: a name of `TEACHERS`.
      temperature: T.

    Returns:
      Sum and count over answer tokens; logs `agreement`: tokens of which the student's first choice
      is the teacher's (a tie is none).
    """
    student, taught, head = states.student.answers, states.teacher.answers, states.head
    assert student is not None and taught is not None and head is not None  # as declared
    real = batch.answers != IGNORE
    # Two rows of logits for each token.
    chunk = columns(student.shape[1], 2 * student.shape[0] * head.shape[0])
    visit = partial(_visit, soft_cap=states.soft_cap, temperature=temperature)
    total, agreed = summed(visit, student, head, (taught, real), chunk)
    return Loss(total, jnp.sum(real).astype(jnp.float32), {"agreement": agreed})


def _visit(
    hidden: jax.Array,
    head: jax.Array,
    given: tuple[jax.Array, jax.Array],
    slopes: str,
    *,
    soft_cap: float,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(sum, agreements, slopes of the sum by the student's logits before the cap) of one chunk."""
    taught, real = given
    logits, inner = through_head(hidden, head, soft_cap)
    wanted, _ = through_head(taught, head, soft_cap)
    firsts = [x == jnp.max(x, axis=-1, keepdims=True) for x in (logits, wanted)]
    alone = [jnp.sum(first, axis=-1) == 1 for first in firsts]  # else all words are as likely
    same = jnp.any(firsts[0] & firsts[1], axis=-1) & alone[0] & alone[1]
    own, other = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (logits, wanted))
    student, teacher = jnp.exp(own), jnp.exp(other)
    # Both sum to 1: their difference adds nothing but what rounding took from the first part.
    apart = jnp.sum(teacher * (other - own) + (student - teacher), axis=-1)  # [B, c]
    total = temperature**2 * jnp.sum(jnp.where(real, apart, 0.0))
    agreed = jnp.sum((real & same).astype(jnp.float32))
    if slopes == "none":
        return total, agreed, None
    slope = temperature * (student - teacher)
    slope = slope * (1 - inner * inner) if soft_cap else slope
    slope = jnp.where(real[..., None], slope, 0.0).astype(hidden.dtype)
    return total, agreed, constrain(slope, "B A V", "logits")
