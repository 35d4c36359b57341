"""Who takes part in an evaluation, and the folder that each one's answers get.

entrants = [Entrant('base', kind='base'), Entrant('sft', 'runs/a'), Entrant('sft', 'runs/b')]
folder_names(entrants)                          # ['base', 'sft_1', 'sft_2']
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxalign.checksums import SUMS
from jaxalign.errors import UserError
from jaxalign.evaluate.report import FILES, PICTURE
from jaxalign.terminal import visible

LONGEST = 100  # bytes of a name: a file's may have 255, with what is put behind it
TAKEN = {*FILES, PICTURE, SUMS}


# Parts of a path that do not tell one system from another.
UNNAMED = ("adapter", "predictions.jsonl", "/", ".", "..")


@dataclass(frozen=True)
class Entrant:
    """One set of answers: a base's, an adapter's, or a file's."""

    name: str
    source: str = ""  # adapter folder or hub name, or a file of predictions; empty: the bare base
    kind: str = "adapter"  # base | few_shot | adapter | predictions
    guessed: bool = False  # whether its name was taken from its path


def name_of(path: str) -> str:
    """What to call a system that was given by its path alone: runs/sft/adapter is `sft`, and so is
    runs/sft/predictions.jsonl."""
    parts = [part for part in Path(path).parts if part not in UNNAMED]
    # What is behind the dot of a folder is a part of its name: lr0.001.
    return re.sub(r"\.(jsonl|json|txt)$", "", parts[-1]) if parts else path


def folder_names(entrants: Sequence[Entrant]) -> list[str]:
    """A folder name for each: its name, numbered where it comes more than once.

    Raises:
      UserError: a name that is a path, empty, too long, not printable or a report's; names that
        would share a folder; one name of several that nobody called seeds of one system.
    """
    names = [entrant.name for entrant in entrants]
    for name in names:
        check_name(name)
        _check_seeds([entrant for entrant in entrants if entrant.name == name])
    found = [
        name if names.count(name) == 1 else f"{name}_{names[: at + 1].count(name)}"
        for at, name in enumerate(names)
    ]
    # Some file systems take A and a for one name.
    folded = [name.casefold() for name in found]
    for name in found:
        if folded.count(name.casefold()) > 1:
            raise UserError(
                f"two systems would write to the folder {name!r}; give one another name: "
                "--adapter NAME=PATH"
            )
    return found


def _check_seeds(same: Sequence[Entrant]) -> None:
    """Runs of one name are averaged: only where somebody gave all of them this name."""
    first, *others = same
    for other in others:
        bare = {first.kind, other.kind} & {"base", "few_shot"}
        if first.guessed or other.guessed or bare:
            both = " and ".join(one.source or f"the {one.kind}" for one in (first, other))
            kind = other.kind if other.source else first.kind
            raise UserError(
                f"{both} would both be called {first.name!r}, as seeds of one system are; write "
                f"--{kind} NAME=PATH"
            )


def check_name(name: str) -> None:
    """Refuses a system name that cannot be a folder of its own inside the output.

    Raises:
      UserError: naming what is wrong with it.
    """
    what = ""
    if not name.strip():
        what = "is empty"
    elif set(name) & set("/\\") or name.startswith("."):
        what = "is a path or begins with a dot"
    elif any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        what = "holds characters that cannot be printed"
    elif len(name.encode("utf-8", "surrogatepass")) > LONGEST:
        what = f"has more than {LONGEST} bytes"
    elif name.casefold() in {taken.casefold() for taken in TAKEN}:
        what = "is the name of a report"
    if what:
        shown = visible(name) if len(name) <= LONGEST else f"{visible(name[:40])}..."
        raise UserError(
            f"{shown!r} cannot name a system, as it {what}; its answers get a folder of that name: "
            "write NAME=PATH with a plain name"
        )
