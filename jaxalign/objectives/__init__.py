"""What is minimised: pure functions of what the model exposes.

An objective takes the states of a phase and its batch and returns a `Loss`: a sum, a count and
named sums to log. It knows neither the model nor the schedule; a mark says what it needs
(`declare`). One's own is named by its Python path and called the same way:

    def my_objective(states, batch, *, strength=1.0): ...    # -> Loss
    resolve('my_package.losses:my_objective')                # task.objective, align.objective
"""

from __future__ import annotations

from collections.abc import Callable

from jaxalign.named import find
from jaxalign.objectives.cka import cka, drift
from jaxalign.objectives.contrastive import contrastive
from jaxalign.objectives.declare import Objective, bind, both_sides, declare
from jaxalign.objectives.distil import distil
from jaxalign.objectives.language_matching import language_matching
from jaxalign.objectives.language_model import language_model
from jaxalign.objectives.lens import lens
from jaxalign.objectives.states import FINAL, TOKENS, Loss, Needs, States, Tap, View

OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "language_model": language_model,
    "contrastive": contrastive,
    "cka": cka,
    "drift": drift,
    "language_matching": language_matching,
    "lens": lens,
    "distil": distil,
}

__all__ = [
    "FINAL", "OBJECTIVES", "TOKENS", "Loss", "Needs", "Objective", "States", "Tap", "View", "bind",
    "both_sides", "declare", "resolve",
]  # fmt: skip


def resolve(name: str) -> Callable[..., Loss]:
    """The objective of this registry name or `package.module:function` path.

    Raises:
      UserError: neither, or a path that leads to no function.
    """
    return find(name, OBJECTIVES, "objective")
