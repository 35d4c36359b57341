"""A bar over answers: rows, tokens a second, time left; silent where nobody watches.

with Bar('answers', 250) as bar:
    bar.advance(32, tokens=610)
"""

from __future__ import annotations

import time
from types import TracebackType

from jaxalign.terminal import bars


class Bar:
    """One bar, on the first process of a run."""

    def __init__(self, title: str, rows: int, mode: str = "auto") -> None:
        self._bar = bars("{task.fields[rate]}", mode=mode)
        self._task = self._bar.add_task(title, total=rows, rate="")
        self._began, self._tokens = time.monotonic(), 0

    def advance(self, rows: int, tokens: int) -> None:
        """More rows are finished, with so many new tokens."""
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(self._task, advance=rows, rate=f"{rate:,.0f} tokens/s")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
