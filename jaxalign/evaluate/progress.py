"""A bar over answers: rows, tokens a second, time left; silent where nobody watches.

with Progress('answers', 250) as bar:
    bar.advance(32, tokens=610)
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from jaxalign.multihost import is_main


class Progress:
    """One bar, on the first process of a run."""

    def __init__(self, title: str, rows: int, mode: str = "auto") -> None:
        shown = mode == "auto" and sys.stdout.isatty() and is_main()
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not shown,
        )
        self._task = self._bar.add_task(title, total=rows, rate="")
        self._began, self._tokens = time.monotonic(), 0

    def advance(self, rows: int, tokens: int) -> None:
        """More rows are finished, with so many new tokens."""
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(self._task, advance=rows, rate=f"{rate:,.0f} tokens/s")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
