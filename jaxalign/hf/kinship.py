"""What is said of an adapter and a base that it may not belong to.

other_name('some/base', 'models/mine', 'runs/a')     # 'runs/a names some/base as its base, ...'
other_rounding('nf4', 'none', 'runs/a')              # 'runs/a was trained on nf4 weights ...'
"""

from __future__ import annotations

from jaxalign.errors import UserError
from jaxalign.hf.find import may_be_same


def another_base(what: str, path: str, named: str) -> UserError:
    """The sentence where `what` was trained on other weights than the base at `path` has."""
    return UserError(
        f"{what} was trained on another base than {path} (it was {named}, with other weights); "
        "give that base by --base MODEL or as model.path"
    )


def other_name(named: str, path: str, shown: str) -> str:
    """A sentence where `shown` names another base than the one at `path`; else ''."""
    if not named or may_be_same(named, path):
        return ""
    return (
        f"{shown} names {named} as its base, not {path}; the shapes agree, but an update learnt on "
        "one base means little on another"
    )


def other_rounding(had: str, has: str, shown: str) -> str:
    """A sentence where the base of `shown` was rounded otherwise in training; else ''.

    Args:
      had: its `model.quantize` then; empty: unknown.
      has: the one of now.
    """
    if not had or had == has:
        return ""
    then, now = ("full" if kind == "none" else kind for kind in (had, has))
    return (
        f"{shown} was trained on {then} weights of its base (model.quantize) and is used with "
        f"{now} ones here, which it fits less well (docs/quantize.md)"
    )
