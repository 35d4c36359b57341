"""`jaxalign config`: every setting with its origin, or what settings are for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxalign.arguments import option, words
from jaxalign.terminal import console, visible


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which settings to print."""

    config: str | None = words("the configuration, a YAML file", "CONFIG", "?")
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

        given = [*filter(None, [self.config]), *self.settings]
        setting = given and "=" in given[0] and not Path(given[0]).exists()
        file = given.pop(0) if given and not setting else None
        for key, value, origin in load(file, given).rows():
            yield (key, value, origin), "" if origin == "default" else "bold cyan"
