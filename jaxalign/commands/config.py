"""`jaxalign config`: settings with their origins, what they are for, systems of a comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxalign.arguments import option, words
from jaxalign.terminal import console, visible


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which settings to print."""

    config: str | None = words("the configuration, a YAML file", "CONFIG", "?", path=True)
    settings: Sequence[str] = words("settings, as in align.layer=16", "key=value")
    explain: str = option("", "print what a setting or a group of them is for", metavar="KEY")

    def run(self) -> None:
        """Prints a table."""
        from rich.table import Table
        from rich.text import Text

        columns: tuple[str, ...] = ("setting", "value", "origin")
        if self.explain:
            columns = ("setting", "default", "may be", "what it is for")
        table = Table(*columns, box=None, header_style="bold")
        for row, style in self._explained() if self.explain else self._origins():
            # As text: [a] in a value is not markup.
            table.add_row(*(Text(visible(cell)) for cell in row), style=style)
        console().print(table)

    def _explained(self) -> Iterator[tuple[Sequence[str], str]]:
        from jaxalign.settings.explain import explain

        yield from ((row, "") for row in explain(self.explain))

    def _origins(self) -> Iterator[tuple[Sequence[str], str]]:
        from jaxalign.config import load

        if self.config and _is_comparison(Path(self.config)):
            yield from _systems(self.config, self.settings)
            return
        for key, value, origin in load(self.config, self.settings).rows():
            yield (key, value, origin), "" if origin == "default" else "bold cyan"


def _is_comparison(file: Path) -> bool:
    """Whether a file is one of `jaxalign compare`: no configuration has systems."""
    try:
        return re.search(r"^systems:", file.read_text("utf-8"), re.MULTILINE) is not None
    except (OSError, ValueError):
        return False  # whoever loads it says what is wrong


def _systems(file: str, given: Sequence[str]) -> Iterator[tuple[Sequence[str], str]]:
    """What each stage of each system sets, and over which file."""
    from jaxalign.compare.study import read_study

    for name, stages in read_study(file, given).systems.items():
        for stage in stages:
            yield (name, " ".join(stage.words), str(stage.file)), ""
