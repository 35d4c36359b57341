"""What a value may be, and what it is for: the facts that stand next to a setting's default.

    steps: int = setting(0, "updates; 0: from `train.epochs`", lowest=0)

    rule = Bounds(whole=True, lowest=1, besides=(-1,))
    rule.phrase()                        # 'a whole number, 1 or more, or -1'
    rule.check("mesh.data", 0)           # UserError: mesh.data: 0 should be a whole number, ...

The settings of a run, the options of the command line and the table in docs/configuration.md are
all checked and written by these facts.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import struct
from dataclasses import dataclass, field
from typing import Any

from jaxalign.errors import UserError, brief

COUNT = (
    2**31 - 1
)  # the largest whole number, where a setting names no other: devices count in int32


@dataclass(frozen=True)
class Bounds:
    """What one value may be; of a list or a dict, what each of its items may be."""

    choices: tuple[str, ...] = ()
    many: bool = False  # a list or a dict of such values
    free: bool = False  # values of any kind, as keyword arguments of one's own
    path: bool = False  # names of files or folders, read by `from_home`
    number: bool = False
    whole: bool = False  # a whole number
    lowest: float | None = None  # itself allowed, as is `highest`
    above: float | None = None  # itself not allowed, as is `below`
    highest: float | None = None
    below: float | None = None
    besides: tuple[Any, ...] = ()  # allowed as well: -1, or a word

    def check(self, key: str, value: Any) -> None:
        """Refuses what the value may not be.

        Raises:
          UserError: naming `key`, the value and what it should be.
        """
        if self.free:
            return
        if self.many:
            if not isinstance(value, list | tuple | dict):
                raise UserError(f"{key}: {brief(value)} should be a list or a mapping")
            one = dataclasses.replace(self, many=False)
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(value, dict):
                    check_text(key, name, nul="refused")
                one.check(f"{key}.{name}" if isinstance(value, dict) else f"{key}[{name}]", item)
        elif self.choices:
            if value not in self.choices:
                import difflib

                near = difflib.get_close_matches(str(value), self.choices, 1, 0.0)[0]
                raise UserError(
                    f"{key}: {brief(value)} is not among {', '.join(self.choices)}; did you mean "
                    f"{near}?"
                )
        elif self.number:
            if value not in self.besides and not self._fits(value):
                raise UserError(f"{key}: {brief(value)} should be {self.phrase(value)}")
        elif value is not None and not isinstance(value, str | bool):
            raise UserError(f"{key}: {brief(value)} should be text")
        else:
            check_text(key, value, nul="refused")

    def phrase(self, value: Any = None) -> str:
        """'a whole number, 1 or more'; names a bound of int32 only where `value` is beyond it."""
        parts = ["a whole number" if self.whole else "a number"]
        if self.lowest is not None and self.highest is not None:
            parts.append(f"from {self.lowest} to {self.highest}")
        else:
            parts += [f"{self.lowest} or more"] if self.lowest is not None else []
            parts += [f"above {self.above}"] if self.above is not None else []
            parts += [f"{self.highest} or less"] if self.highest is not None else []
            parts += [f"below {self.below}"] if self.below is not None else []
        if self.whole and self.highest is None and isinstance(value, int) and value > COUNT:
            parts.append(f"{COUNT} or less")
        elif len(parts) == 1 and not self.whole:
            parts = ["a finite number"]
        return ", or ".join([", ".join(parts), *map(str, self.besides)])

    def _fits(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        # 1e-60 is 0 and 1e60 is infinite for a device that computes in float32.
        seen = value if self.whole else as_float32(value)
        most = COUNT if self.whole and self.highest is None else self.highest
        return (
            (self.whole or math.isfinite(seen))
            and (self.lowest is None or value >= self.lowest)
            and (self.above is None or seen > self.above)
            and (most is None or value <= most)
            and (self.below is None or seen < self.below)
        )


@dataclass(frozen=True)
class About:
    """A setting's bounds and its explanation."""

    text: str  # Markdown
    see: str = ""  # a page of docs/ that says more: tpu.md#buckets
    bounds: Bounds = field(default_factory=Bounds)


def setting(default: Any, text: str, *, see: str = "", **bounds: Any) -> Any:
    """A dataclass field with its bounds and explanation.

    Args:
      default: the value; a list or a dict is copied for each instance.
      text: what it is for, in one line of Markdown.
      see: a page of docs/ that says more.
      bounds: fields of `Bounds`; `number` and `whole` follow from a default that is a number, and
        are given for the items of lists and dicts.
    """
    about = About(text, see, bounds_like(default, **bounds))
    made: dict[str, Any] = {"metadata": {"about": about}}
    if about.bounds.many:
        return field(default_factory=lambda: copy.deepcopy(default), **made)
    return field(default=default, **made)


def bounds_like(default: Any, **bounds: Any) -> Bounds:
    """The bounds of a value whose default is this; see `setting`."""
    numeric = isinstance(default, int | float) and not isinstance(default, bool)
    facts: dict[str, Any] = {
        "many": isinstance(default, list | dict),
        "number": numeric or bounds.get("whole", False),
        "whole": type(default) is int,
    }
    return Bounds(**(facts | bounds))


def from_home(value: Any) -> Any:
    """A path, or each of a list, with the home folder for `~` at its start; others as they are."""
    if isinstance(value, list):
        return [from_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def as_float32(value: float) -> float:
    """The float32 nearest to a number; infinite where there is none."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:  # of Python's float, or of float32
        return math.inf if value > 0 else -math.inf


def check_text(key: str, value: Any, nul: str = "kept") -> None:
    """Refuses text that no file, tokenizer or terminal takes: half a surrogate pair.

    Args:
      key: what the sentence calls it.
      value: anything; what is not text is passed over.
      nul: 'refused' where a system call would end at a NUL.

    Raises:
      UserError: naming `key`.
    """
    if not isinstance(value, str) or (value.isascii() and nul == "kept"):
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}: {brief(value)} has half of a character at position {error.start + 1} (a lone "
            "surrogate), which no file can hold; write it in UTF-8"
        ) from error
    if nul == "refused" and "\0" in value:
        raise UserError(f"{key}: {brief(value)} holds a NUL character; remove it")
