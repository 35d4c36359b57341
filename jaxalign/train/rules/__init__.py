"""Gradient rules: from the micro-batches of a phase to one gradient.

    mean      the mean over micro-batches, one after the other (`rule.py`)
    cached    that of all micro-batches as one large batch (`cached.py`)
    maml      that of the loss after a few steps on other rows of the same language (`meta.py`);
              `fomaml`: without its second derivatives; `reptile`: the way that these steps go

    gradient, metrics = RULES['mean'].gradient(phase, trained, frozen, batches, key, 'tokens', 0)

A rule is a row of RULES; `task.rule` and `align.rule` choose one.
"""

from __future__ import annotations

from jaxalign.train.rules.cached import cached_gradient
from jaxalign.train.rules.meta import FOMAML, MAML, REPTILE
from jaxalign.train.rules.rule import Records, Rule, add_gradients, mean, mean_gradient, one_by_one

__all__ = ["RULES", "Records", "Rule", "add_gradients", "mean_gradient"]

RULES: dict[str, Rule] = {
    "mean": one_by_one(mean),
    "cached": Rule(cached_gradient),
    "maml": MAML,
    "fomaml": FOMAML,
    "reptile": REPTILE,
}
