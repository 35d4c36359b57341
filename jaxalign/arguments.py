"""Command lines from dataclasses: the fields of a command's options are its words.

    @dataclass(frozen=True, kw_only=True)
    class Show(Configured):
        rows: int = option(3, "rows of each stream", lowest=0)

        def run(self) -> None: ...

    declare(parser, Show)                        # CONFIG [key=value ...] [--rows ROWS]
    read(Show, parser.parse_args(), rest).run()

What an option may be and its explanation stand next to its default, as those of a setting do.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jaxalign.bounds import Bounds, bounds_like, from_home
from jaxalign.errors import UserError

if TYPE_CHECKING:
    from jaxalign.settings import Config

UNBOUNDED = Bounds()


class Command(Protocol):
    """A command with its options: a dataclass that runs."""

    def run(self) -> int | None:
        """Does it; returns the exit code, None for 0."""


Options = TypeVar("Options", bound=Command)


@dataclass(frozen=True)
class Named:
    """A file or folder that may have been given a name: `--adapter sft=runs/sft/adapter`."""

    name: str  # empty: none was given
    path: str
    kind: str  # the option, such as adapter


# Fields -------------------------------------------------------------------------------------------


def word(text: str, metavar: str | None = None, *, path: bool = False) -> Any:
    """A word that must be there, by its place; `path`: it names a file or folder."""
    return field(metadata={"words": {"help": text, "metavar": metavar, **_kind(path)}})


def words(text: str, metavar: str, nargs: str = "*", *, path: bool = False) -> Any:
    """Any number of words, by their place; argparse's `nargs` may be + or ?, too."""
    least: Any = {"default": None} if nargs == "?" else {"default": ()}
    made = {"help": text, "metavar": metavar, "nargs": nargs, **_kind(path)}
    return field(**least, metadata={"words": made})


def needed(text: str, metavar: str | None = None, *, path: bool = False) -> Any:
    """An option that must be given."""
    made = {"help": text, "metavar": metavar, "required": True, **_kind(path)}
    return field(metadata={"option": made})


def option(default: Any, text: str, *, metavar: str | None = None, **bounds: Any) -> Any:
    """An option.

    Args:
      default: False makes it a switch; of a list it may be given several times.
      text: what it is for; the default is added to it.
      metavar: what its value is called.
      bounds: fields of `jaxalign.bounds.Bounds`.
    """
    rule = bounds_like(default, **bounds)
    made: dict[str, Any] = {"help": text, "metavar": metavar, **_kind(rule.path)}
    if default is False:
        made = {"help": text, "action": "store_true"}
    elif isinstance(default, list):
        return field(default=(), metadata={"option": {**made, "action": "append"}})
    elif rule.choices:
        made["choices"] = rule.choices
    elif rule.number:
        made["type"] = _number(rule)
    if default:
        made["help"] = f"{text} (default {default})"
    return field(default=default, metadata={"option": made})


def named(**texts: str) -> Any:
    """Options that may be given several times as [NAME=]PATH; their order is kept."""
    return field(default=(), metadata={"named": texts})


def _kind(path: bool) -> dict[str, Any]:
    """What argparse makes of a word: a path may start with `~`, also where no shell reads it."""
    return {"type": from_home} if path else {}


def _number(rule: Bounds) -> Callable[[str], Any]:
    def read_number(text: str) -> Any:
        try:
            value: Any = int(text) if rule.whole else float(text)
        except ValueError:
            value = text
        try:
            rule.check("", value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error
        return value

    return read_number


class _Collect(argparse.Action):
    """Appends a `Named`, whichever of several options it came with."""

    def __call__(self, parser: Any, args: Any, value: Any, flag: str | None = None) -> None:
        name, equals, path = str(value).partition("=")
        one = Named(name if equals else "", from_home(path or name), str(flag).lstrip("-"))
        setattr(args, self.dest, (*getattr(args, self.dest, ()), one))


# Commands -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Configured:
    """The words of a command that reads the configuration of a run."""

    config: str = word("the configuration, a YAML file", path=True)
    settings: Sequence[str] = words("settings, as in align.layer=16", "key=value")

    def load(self) -> Config:
        """The configuration, with the settings of the command line."""
        from jaxalign.config import load

        return load(self.config, self.settings).config


def declare(to: argparse.ArgumentParser, options: type[Command]) -> None:
    """Adds the fields of a dataclass to a parser."""
    for one in dataclasses.fields(options):  # type: ignore[arg-type]
        flag, unset = f"--{one.name.replace('_', '-')}", argparse.SUPPRESS
        if given := one.metadata.get("words"):
            to.add_argument(one.name, default=unset, **given)
        elif given := one.metadata.get("option"):
            to.add_argument(flag, default=unset, **given)
        for name, text in one.metadata.get("named", {}).items():
            to.add_argument(f"--{name}", default=unset, dest=one.name, action=_Collect,
                            metavar="[NAME=]PATH", help=text)  # fmt: skip


def read(options: type[Options], given: Mapping[str, Any], rest: Sequence[str]) -> Options:
    """The options that were given; what is left over is settings, wherever it stands.

    argparse takes the first word for CONFIG: it is the first one that is no setting.

    Args:
      options: the dataclass.
      given: what argparse found.
      rest: words that argparse did not place.

    Raises:
      UserError: the command takes no settings.
    """
    fields = {one.name: one for one in dataclasses.fields(options)}  # type: ignore[arg-type]
    found = {name: value for name, value in given.items() if name in fields}
    if rest and "settings" not in fields:
        raise UserError(f"{rest[0]!r}: this command takes no further words")
    place = next((one for one in fields.values() if _is_place(one)), None)
    if place and "settings" in fields:
        first = [found.pop(place.name)] if place.name in found else []
        words = [*first, *found.pop("settings", ()), *rest]
        least = 0 if place.default is dataclasses.MISSING else None
        at = next((i for i, word in enumerate(words) if not is_setting(word)), least)
        if at is not None and words:
            found[place.name] = from_home(words.pop(at))
        rest = words
    if rest:
        found["settings"] = [*found.get("settings", ()), *map(from_home, rest)]
    return options(**found)


def _is_place(one: dataclasses.Field[Any]) -> bool:
    """Whether a field is a single word by its place."""
    return "words" in one.metadata and one.metadata["words"].get("nargs", "?") == "?"


def without_dashes(option: str, options: type[Command]) -> str | None:
    """`align.layer=8` of `--align.layer=8`, which is no option; None where it is no setting.

    Args:
      option: a word that argparse does not know.
      options: those of the command; one that takes no settings has none to offer.
    """
    if "settings" not in {one.name for one in dataclasses.fields(options)}:  # type: ignore[arg-type]
        return None
    from jaxalign.config import is_known

    key, equals, value = option.lstrip("-").partition("=")
    return f"{key}={value if equals else 'VALUE'}" if is_known(key) else None


def is_setting(word: str) -> bool:
    """Whether a word is key=value, and not a file or folder that is called so."""
    return "=" in word and not os.path.exists(word)  # Path.exists raises where a name is too long
