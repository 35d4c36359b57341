"""A command line from a dataclass: what is not said keeps its default, what is said is checked."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from jaxalign.arguments import (
    Configured,
    Named,
    declare,
    named,
    needed,
    option,
    read,
    word,
    words,
)
from jaxalign.bounds import from_home
from jaxalign.cli import COMMANDS, main, options_of
from jaxalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Own(Configured):
    """Options of every kind."""

    place: str = needed("where", "PLACE")
    number: int = option(3, "how many", lowest=0)
    share: float | None = option(None, "how much", number=True, above=0, highest=1)
    kind: str = option("a", "which", choices=("a", "b"))
    many: Sequence[str] = option([], "again and again")
    fast: bool = option(False, "at once")
    entrants: Sequence[Named] = named(adapter="trained", predictions="written")

    def run(self) -> None:
        """Does nothing."""


@dataclass(frozen=True, kw_only=True)
class Bare:
    """No settings."""

    one: str = word("first")
    more: Sequence[str] = words("rest", "MORE")

    def run(self) -> None:
        """Does nothing."""


def parse(options, *given):
    parser = argparse.ArgumentParser(prog="own")
    declare(parser, options)
    args, rest = parser.parse_known_args(given)
    return read(options, vars(args), rest)


def test_what_is_not_said_keeps_its_default():
    assert parse(Own, "run.yaml", "--place", "here") == Own(config="run.yaml", place="here")


def test_what_is_said():
    found = parse(
        Own, "run.yaml", "a=1", "--place", "p", "--adapter", "x=A", "--many", "1", "--predictions",
        "B", "--adapter", "A=B=C", "--share", "0.5", "--many", "2", "--fast", "--kind", "b", "b=2",
    )  # fmt: skip
    assert list(found.settings) == ["a=1", "b=2"]
    assert list(found.entrants) == [
        Named("x", "A", "adapter"), Named("", "B", "predictions"), Named("A", "B=C", "adapter"),
    ]  # fmt: skip
    assert found.many == ["1", "2"] and found.fast and found.kind == "b" and found.share == 0.5


@dataclass(frozen=True, kw_only=True)
class Optional:
    """A configuration that need not be there."""

    config: str | None = words("which", "CONFIG", "?")
    settings: Sequence[str] = words("settings", "key=value")
    explain: str = option("", "of what")

    def run(self) -> None:
        """Does nothing."""


def test_settings_stand_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = ["--place", "p"]
    for given in (
        ["a=1", "run.yaml", "b=2", *place], ["a=1", *place, "run.yaml", "b=2"],
        [*place, "a=1", "b=2", "run.yaml"], ["run.yaml", *place, "a=1", "b=2"],
    ):  # fmt: skip
        assert parse(Own, *given) == Own(config="run.yaml", settings=["a=1", "b=2"], place="p")
    long = f"task.train=[{'x' * 5000}]"
    assert parse(Own, long, "run.yaml", *place).settings == [long]
    for given in (["a=1"], ["a=1", "--explain", "x"], ["--explain", "x", "a=1"]):
        found = parse(Optional, *given)
        assert found.config is None and found.settings == ["a=1"]
    assert parse(Optional, "a=1", "--explain", "x", "run.yaml").config == "run.yaml"
    assert parse(Own, "a=1", *place).config == "a=1"  # whoever loads it says that it is no file
    (tmp_path / "lr=1.yaml").touch()
    found = parse(Own, "a=1", "lr=1.yaml", *place)
    assert found.config == "lr=1.yaml" and found.settings == ["a=1"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("c",), "--place"),
        (("c", "--place", "p", "--number", "-1"), "a whole number, 0 or more"),
        (("c", "--place", "p", "--share", "0"), "above 0"),
        (("c", "--place", "p", "--kind", "c"), "invalid choice: 'c'"),
    ],
)
def test_what_cannot_be(given, says, capsys):
    with pytest.raises(SystemExit):
        parse(Own, *given)
    assert says in capsys.readouterr().err


def test_a_command_without_settings_takes_no_further_words():
    with pytest.raises(UserError, match="'b=2': this command takes no further words"):
        read(Bare, {"one": "a"}, ["b=2"])
    assert parse(Bare, "a") == Bare(one="a")


# Of every command, the words that name a file or a folder.
PLACES = {
    "config", "study", "source", "model", "adapter", "adapters", "base", "into_base", "out", "json",
    "search", "data", "parallel", "vectors", "items", "scores",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_may_begin_at_home(name):
    for one in dataclasses.fields(options_of(name)):
        how = next((one.metadata[key] for key in ("words", "option") if key in one.metadata), {})
        place = one.name in PLACES and how and how.get("action") != "store_true"
        assert (how.get("type") is from_home) == bool(place), one


def test_paths_begin_at_home_and_texts_do_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parse(Own, "~/run.yaml", "--place", "~", "--adapter", "a=~/A", "--many", "~/m", "b=~/c")
    assert (found.config, found.place, found.many) == ("/home/me/run.yaml", "~", ["~/m"])
    assert found.entrants == (Named("a", "/home/me/A", "adapter"),)
    assert list(found.settings) == ["b=~/c"]  # `config.load` knows which settings are paths


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([*name.split(), "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: jaxalign {name} [-h]" in shown and COMMANDS[name][0] in shown
    assert options_of(name).run.__doc__
