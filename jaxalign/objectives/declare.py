"""How an objective says what it needs: by a mark on its function.

    @declare(lambda layer, **_: both_sides(Needs((Tap(layer, 'last'),))), settings='layer')
    def mine(states, batch, *, layer): ...

The lambda gets all options of the function and returns what is read of each side. `settings` names
options that the settings of the phase fill, where the user gives none.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from jaxalign.bounds import Bounds
from jaxalign.errors import UserError, brief
from jaxalign.objectives.states import Loss, Needs
from jaxalign.objectives.subspace import Subspace

Function = TypeVar("Function", bound=Callable[..., Loss])
KINDS = (bool, int, float, str)  # of options, checked where the function declares them
Positive = Annotated[float, Bounds(number=True, above=0)]
Share = Annotated[float, Bounds(number=True, lowest=0, highest=1)]
Count = Annotated[int, Bounds(number=True, whole=True, lowest=1)]
HEAD = "head"  # the argument in which a function with a head of its own receives it


@dataclass(frozen=True)
class Declared:
    """What a function's mark says."""

    needs: Callable[..., Mapping[str, Needs]] | None = None  # (**options) -> side -> Needs
    settings: frozenset[str] = frozenset()
    group: Callable[..., int] = lambda **_: 0  # (**options) -> `Objective.group`
    ordered: Callable[..., bool] = lambda **_: True  # (**options) -> `Objective.ordered`
    head: Callable[..., Any] | None = None  # (spec, key, **options) -> a tree of float32 arrays
    by_token: bool = False


@dataclass(frozen=True)
class Objective:
    """A function of (states, batch) with its options, and what it needs for them."""

    function: partial[Loss]  # its keywords are the options
    needs: Mapping[str, Needs]
    head: Callable[..., Any] | None = field(default=None)  # (spec, key) -> tree
    measured: Mapping[str, Subspace] = field(default_factory=dict)  # options: {file: x.npz}
    group: int = 0  # consecutive rows that its loss compares; 1: each alone; 0: the whole batch
    ordered: bool = True  # the order of the rows that it compares matters
    by_token: bool = False  # it adds up tokens and does not ask which rows they are of


def declare(
    needs: Callable[..., Mapping[str, Needs]],
    *,
    settings: str = "",
    group: int | Callable[..., int] = 0,
    ordered: bool | Callable[..., bool] = False,
    head: Callable[..., Any] | None = None,
    by_token: bool = False,
) -> Callable[[Function], Function]:
    """Marks an objective.

    Args:
      needs: (**options) -> side -> Needs.
      settings: options, separated by blanks, that take the phase's setting of the same name.
      group: how many consecutive rows the loss compares with each other, or (**options) -> that
        number. 1: the loss of a row depends on that row alone; 0: on the whole batch. Smaller
        micro-batches leave groups whole (`jaxalign plan`).
      ordered: whether the order of the rows that the loss compares matters, or (**options) -> that.
        Where it does not, rows change places within their group, so that each device has as many
        tokens. Of a function without a mark it matters.
      head: (spec, key, **options) -> arrays trained next to the adapter; the function receives
        them as `head`. They are kept in checkpoints and not exported.
      by_token: the loss adds up answer tokens and does not ask which rows they are of. Where rows
        are end to end, it gets the answers as they stand there, `states.text.answers` [W, A, D] and
        `batch.answers` [W, A], and no `batch.answer_at`; else each row's own, [B, A].
    """

    def mark(function: Function) -> Function:
        names = frozenset(settings.split())
        function.declared = Declared(  # type: ignore[attr-defined]
            needs, names, _of(group), _of(ordered), head, by_token
        )
        return function

    return mark


def both_sides(needs: Needs) -> dict[str, Needs]:
    """The same of the sources and of the targets of sentence pairs."""
    return {"source": needs, "target": needs}


def bind(
    function: Callable[..., Loss],
    name: str,
    options: Mapping[str, Any],
    key: str,
    settings: Mapping[str, Any],
    otherwise: Mapping[str, Needs],
    *,
    main: bool = True,
) -> Objective:
    """The function with its options, which fit its signature, and what it needs for them.

    Args:
      function: (states, batch, **options) -> Loss.
      name: of the function, for sentences.
      options: keyword arguments.
      key: the setting that holds them, for sentences.
      settings: what the phase offers to functions that ask for it.
      otherwise: the needs of a function without a mark.
      main: the phase's own objective, whose options may not contradict the phase's settings; a
        further term may look at another layer.

    Raises:
      UserError: an unknown option, one that is missing, one of a wrong kind, one that says
        something else than the setting that it takes.
    """
    declared: Declared = getattr(function, "declared", Declared())
    filled = {n: value for n, value in settings.items() if n in declared.settings}
    for option in filled.keys() & options.keys() if main else ():
        if options[option] != filled[option]:
            where = f"{key.rpartition('.')[0]}.{option}"
            raise UserError(
                f"{key}.{option}: {brief(options[option])} contradicts {where}="
                f"{filled[option]}; set {where} alone"
            )
    given = filled | dict(options)
    defaults = _check(function, name, given, key, {HEAD} if declared.head else set())
    every = defaults | given
    return Objective(
        partial(function, **given),
        otherwise if declared.needs is None else declared.needs(**every),
        partial(declared.head, **every) if declared.head else None,
        {option: one for option, one in given.items() if isinstance(one, Subspace)},
        declared.group(**every),
        declared.ordered(**every),
        declared.by_token,
    )


def _of(value: Any) -> Callable[..., Any]:
    """(**options) -> the value, which may be such a function."""
    return value if callable(value) else lambda **_: value


def _check(
    function: Callable[..., Loss], name: str, options: Mapping[str, Any], key: str, own: set[str]
) -> dict[str, Any]:
    """The defaults of the function's options, which `options` fit; `own` are not the user's."""
    try:
        parameters = inspect.signature(function).parameters
        kinds = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, ValueError):  # written in C, or annotated with what is not there
        return {}
    # What comes behind states and batch.
    taken = {
        n: p
        for n, p in list(parameters.items())[2:]
        if p.kind is not p.VAR_KEYWORD and n not in own
    }
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option, value in options.items():
        if option not in taken and not anything:
            near = difflib.get_close_matches(option, taken, 1, 0.0)
            known = f"; did you mean {near[0]!r}?" if near else "; it takes none"
            raise UserError(f"{key}: {name} takes no option {brief(option)}{known}")
        wanted = kinds.get(option)
        if (rule := _bounds(wanted)) is not None:
            rule.check(f"{key}.{option}", value)
        elif wanted in KINDS and not _is_a(value, wanted):
            raise UserError(
                f"{key}.{option}: {brief(value)} should be of the kind {wanted.__name__}, as "
                f"{name} declares it"
            )
    missing = [n for n, p in taken.items() if p.default is p.empty and n not in options
               and p.kind is not p.VAR_POSITIONAL]  # fmt: skip
    if missing:
        raise UserError(f"{key}: {name} needs the option {missing[0]!r}; add it")
    return {n: p.default for n, p in taken.items() if p.default is not p.empty}


def _bounds(kind: Any) -> Bounds | None:
    """What `Literal["a", "b"]` and `Annotated[float, Bounds(...)]` say of an option."""
    if typing.get_origin(kind) is Literal:
        return Bounds(choices=typing.get_args(kind))
    return next((one for one in typing.get_args(kind)[1:] if isinstance(one, Bounds)), None)


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
