"""How an objective says what it needs: by a mark on its function.

    @declare(lambda layer, **_: both_sides(Needs((Tap(layer, 'last'),))), settings='layer')
    def mine(states, batch, *, layer): ...

The lambda gets all options of the function and returns what is read of each side. `settings` names
options that the settings of the phase fill, where the user gives none.
"""

from __future__ import annotations

import difflib
import inspect
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.bounds import Bounds
from jaxalign.errors import UserError, brief
from jaxalign.objectives.states import FINAL, Loss, Needs, States
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
    own: str = ""  # `module:function` if the user wrote it; its errors become sentences

    def loss(self, states: States, batch: Any, **head: Any) -> Loss:
        """Its loss; `head` is what it trains next to the adapter.

        Raises:
          UserError: the user's function fails, or gives something else than a `Loss` of numbers.
        """
        if not self.own:
            return self.function(states, batch, **head)
        with _told(self.own, self.function.func):
            found = self.function(states, batch, **head)
        if not isinstance(found, Loss):
            raise UserError(
                f"{self.own} returns {type(found).__name__}, not a jaxalign.objectives.Loss"
            )
        logs = {f"logs[{name!r}]": value for name, value in found.logs.items()}
        for name, value in {"sum": found.sum, "count": found.count, **logs}.items():
            if not isinstance(value, jax.Array | np.generic | np.ndarray | int | float):
                raise UserError(f"{self.own}: Loss.{name} is {brief(value)}; give one number")
            if shape := jnp.shape(value):
                raise UserError(f"{self.own}: Loss.{name} has the shape {shape}; give one number")
        return found


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
    declared = _declared(function)
    filled = {n: value for n, value in settings.items() if n in declared.settings}
    if declared.needs is None:
        _check_layer(options, key, otherwise)
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
    own = name if ":" in name else ""
    with _told(f"{key}: {own}", function) if own else nullcontext():
        needs = otherwise if declared.needs is None else declared.needs(**every)
        if not isinstance(needs, Mapping) or not all(isinstance(n, Needs) for n in needs.values()):
            raise UserError(
                f"{key}: the mark of {name} gives {brief(needs)} instead of the Needs of each side "
                "(docs/objectives.md#what-it-needs)"
            )
        return Objective(
            partial(function, **given),
            needs,
            partial(declared.head, **every) if declared.head else None,
            {option: one for option, one in given.items() if isinstance(one, Subspace)},
            declared.group(**every),
            declared.ordered(**every),
            declared.by_token,
            own,
        )


def _declared(function: Any) -> Declared:
    """The mark of a function, also behind `functools.wraps`, `jax.jit` and `functools.partial`."""
    while function is not None:
        if (found := getattr(function, "declared", None)) is not None:
            return found
        function = getattr(function, "__wrapped__", None) or getattr(function, "func", None)
    return Declared()


@contextmanager
def _told(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Whatever fails in a function of the user's is one sentence, which names its line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", "")
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        where = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{name} fails: {type(error).__name__}: {reason}{where}; --debug shows all of it"
        ) from error


def _check_layer(options: Mapping[str, Any], key: str, otherwise: Mapping[str, Needs]) -> None:
    """Whether a function without a mark asks for the layer that it gets."""
    layers = {tap.layer for needs in otherwise.values() for tap in needs.taps} - {FINAL}
    if layers and "layer" in options and options["layer"] not in layers:
        raise UserError(
            f"{key}.layer: {brief(options['layer'])} contradicts align.layer={layers.pop()}, which "
            "is what a function without a mark gets; set align.layer, or mark the function "
            "(docs/objectives.md#what-it-needs)"
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
    except (TypeError, ValueError):  # written in C
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
        if option in taken:
            _check_kind(_kind(function, taken[option]), value, f"{key}.{option}", name)
    missing = [n for n, p in taken.items() if p.default is p.empty and n not in options
               and p.kind is not p.VAR_POSITIONAL]  # fmt: skip
    if missing:
        raise UserError(f"{key}: {name} needs the option {missing[0]!r}; add it")
    return {n: p.default for n, p in taken.items() if p.default is not p.empty}


def _kind(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """What a signature says of an option: its annotation, or else the kind of its default."""
    kind, default = parameter.annotation, parameter.default
    if kind is parameter.empty:
        found = type(default)
        return {int: float}.get(found, found) if found in KINDS else None
    one = SimpleNamespace(__annotations__={"kind": kind})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(one, names, include_extras=True)["kind"]
    except Exception:  # it names what is not there, as imports under TYPE_CHECKING
        return None


def _check_kind(kind: Any, value: Any, key: str, name: str) -> None:
    """Refuses a value that is not of this kind; kinds that say nothing of a setting take any."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (Union, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return
    kinds = tuple(one for one in kinds if one is not NoneType)
    if any(_fits(one, value) for one in kinds):
        return
    if len(kinds) == 1 and (rule := _bounds(kinds[0])) is not None:
        rule.check(key, value)  # which has words of its own
    wanted = " or ".join(map(_phrase, kinds))
    raise UserError(f"{key}: {brief(value)} should be {wanted}, as {name} declares it")


def _fits(kind: Any, value: Any) -> bool:
    if (rule := _bounds(kind)) is None:
        return kind not in KINDS or _is_a(value, kind)
    try:
        rule.check("", value)
    except UserError:
        return False
    return True


def _phrase(kind: Any) -> str:
    if (rule := _bounds(kind)) is None:
        return f"of the kind {kind.__name__}"
    return " or ".join(map(repr, rule.choices)) or rule.phrase()


def _bounds(kind: Any) -> Bounds | None:
    """What `Literal["a", "b"]` and `Annotated[float, Bounds(...)]` say of an option."""
    if typing.get_origin(kind) is Literal:
        return Bounds(choices=typing.get_args(kind))
    return next((one for one in typing.get_args(kind)[1:] if isinstance(one, Bounds)), None)


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
