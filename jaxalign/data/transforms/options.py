"""A transform's options: a dataclass with bounds, as the settings of a run are.

@dataclass
class Options:
    rate: float = setting(1.0, "share of the units", lowest=0, highest=1)

read(Options, {"rate": 0.5}).rate
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxalign.data.sources import nearest
from jaxalign.errors import UserError, brief

Options = TypeVar("Options")


def read(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """The options that are given, checked, and the defaults of the others.

    Raises:
        UserError: an unknown option, or a value that it cannot have.
    """
    fields = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, value in options.items():
        if name not in fields:
            raise UserError(
                f"{name} is not an option, which are {', '.join(fields)}{nearest(name, fields)}"
            )
        default = fields[name].default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{name}: {brief(value)} should be true or false")
        fields[name].metadata["about"].bounds.check(name, value)
        if isinstance(default, str) and not isinstance(value, str):
            raise UserError(f"{name}: {brief(value)} should be text")
    return kind(**options)
