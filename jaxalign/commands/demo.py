"""`jaxalign demo`: the shipped base with and without alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxalign.arguments import option, words


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where the demo goes, and how often it is run."""

    out: str = option("runs/demo", "folder to write", path=True)
    settings: Sequence[str] = words("settings, as in train.steps=100", "key=value")
    seeds: int = option(1, "runs of each kind", lowest=1)

    def run(self) -> None:
        """Trains, measures and prints the tables."""
        from jaxalign import multihost
        from jaxalign.programs import keep_programs

        multihost.settle_platform()
        keep_programs()
        from jaxalign.demo.run import demo

        demo(self.out, self.seeds, self.settings)
