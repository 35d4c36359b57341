"""What is minimised: pure functions of what the model exposes.

An objective takes the states of a phase and its batch and returns a `Loss`: a sum, a count and
named sums to log. It knows neither the model nor the schedule. One's own is named by its Python
path and called the same way:

    def my_objective(states, batch, *, strength=1.0): ...    # -> Loss
    objective = resolve('my_package.losses:my_objective')    # task.objective, align.objective
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jaxalign.errors import UserError, brief, first_line
from jaxalign.objectives.contrastive import contrastive
from jaxalign.objectives.language_model import language_model
from jaxalign.objectives.states import Loss, PairStates, TaskStates

OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "language_model": language_model,
    "contrastive": contrastive,
}

KINDS = (bool, int, float, str)  # of options, checked where the function declares them


def resolve(name: str) -> Callable[..., Loss]:
    """The objective of this registry name or `package.module:function` path.

    Raises:
      UserError: neither, or a path that leads to no function.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, _, function = name.partition(":")
    if not module or not function:
        near = difflib.get_close_matches(name, OBJECTIVES, 1, 0.0)[0]
        raise UserError(
            f"objective {name!r} is unknown; did you mean {near!r}? "
            "An objective of your own is written package.module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of somebody's own may fail in any way
        raise UserError(f"objective {name!r} cannot be imported: {first_line(error)}") from error
    if not callable(found):
        raise UserError(f"objective {name!r} is not a function but {brief(found)}")
    return found


def with_options(name: str, options: Mapping[str, Any], key: str) -> Callable[..., Loss]:
    """The objective with its options, which fit its signature.

    Args:
      name: as for `resolve`.
      options: keyword arguments.
      key: the setting that holds them, for the sentence.

    Raises:
      UserError: an unknown option, one that is missing, one of a wrong kind.
    """
    function = resolve(name)
    try:
        parameters = inspect.signature(function).parameters
        kinds = typing.get_type_hints(function)
    except (NameError, TypeError, ValueError):  # written in C, or annotated with what is not there
        return partial(function, **options)
    # What comes behind states and batch.
    taken = {n: p for n, p in list(parameters.items())[2:] if p.kind is not p.VAR_KEYWORD}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option, value in options.items():
        if option not in taken and not anything:
            near = difflib.get_close_matches(option, taken, 1, 0.0)
            known = f"; did you mean {near[0]!r}?" if near else "; it takes none"
            raise UserError(f"{key}: {name} takes no option {brief(option)}{known}")
        wanted = kinds.get(option)
        if wanted in KINDS and not _is_a(value, wanted):
            raise UserError(
                f"{key}.{option}: {brief(value)} should be of the kind {wanted.__name__}, as "
                f"{name} declares it"
            )
    missing = [n for n, p in taken.items() if p.default is p.empty and n not in options
               and p.kind is not p.VAR_POSITIONAL]  # fmt: skip
    if missing:
        raise UserError(f"{key}: {name} needs the option {missing[0]!r}; add it")
    return partial(function, **options)


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


__all__ = ["OBJECTIVES", "Loss", "PairStates", "TaskStates", "resolve", "with_options"]
