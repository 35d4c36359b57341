"""What one program of a plan is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxalign.plan.attends import Attends


@dataclass(frozen=True)
class Job:
    """What a program is called with."""

    lower: Callable[[], Any]
    what: str
    given: Any  # arrays besides the weights and the state
    made: Any = ()  # arrays that it makes besides those of a layer
    attends: Attends | None = None  # None: hardly anything
    tokens: int = 0
    times: int = 1  # micro-batches of one call
    least: float = 0.0  # FLOPs of one of them, on all chips
    mean: float = 1.0  # as of `programs.Program`, and so is `counted`
    counted: float | None = None
