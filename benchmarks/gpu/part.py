"""What every part shares: its options, the time it has left, and rows that survive a failure.

    part = Part(__doc__)
    part.measure('task 16 x 2,048', lambda: {'seconds': 1.9}, need=40)

A row is written to the part's JSON as soon as it is known, so that a part that is stopped keeps
what it has. A row that fails holds the error instead, and the next one is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))  # the checkout, whether it is installed or not
BEGAN = time.monotonic()

Row = dict[str, Any]
LONGEST_REASON = 300  # characters of an error


class Part:
    """One part's options, clock and rows."""

    def __init__(self, doc: str, more: Callable[[argparse.ArgumentParser], Any] | None = None):
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawTextHelpFormatter
        )
        parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU")
        parser.add_argument("--quick", action="store_true", help="fewer rows")
        parser.add_argument("--full", action="store_true", help="more rows")
        parser.add_argument("--seconds", type=float, default=600.0, help="time for this part")
        parser.add_argument("--out", type=Path, help="JSON of the rows")
        parser.add_argument("--rows", default="", help="only rows named so; several with ';'")
        parser.add_argument("--model", type=Path, help="real weights: a Hugging Face folder")
        if more:
            more(parser)
        self.options = parser.parse_args()
        self.rehearse, self.quick = self.options.rehearse, self.options.quick
        self.full = self.options.full
        self.rows: list[Row] = []
        if self.rehearse:
            os.environ["JAX_PLATFORMS"] = "cpu"

    @property
    def left(self) -> float:
        """Seconds that this part still has."""
        return self.options.seconds - (time.monotonic() - BEGAN)

    def measure(self, what: str, measure: Callable[[], Row], need: float = 0.0) -> Row:
        """The row of `measure()`, or of why there is none; `need` is what it takes in seconds."""
        if not any(word in what for word in self.options.rows.split(";")):
            return {}
        need = 0.0 if self.rehearse else need
        if self.left < need:
            return self.keep({"what": what, "skipped": f"{self.left:.0f} s left, {need:.0f} need"})
        began = time.monotonic()
        try:
            found = measure()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found = {"error": f"{type(error).__name__}: {lines[0]}"[:LONGEST_REASON]}
        return self.keep({"what": what, **found, "took": round(time.monotonic() - began, 1)})

    def keep(self, row: Row) -> Row:
        """A row that is known."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.options.out:
            fresh = self.options.out.with_suffix(".new")
            fresh.write_text(json.dumps(self.rows), "utf-8")
            fresh.replace(self.options.out)
        return row


def median_seconds(run: Callable[[], Any], most: int = 5, budget: float = 8.0) -> float:
    """Of up to `most` runs, at least two; `run` waits for the device itself."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < most and sum(seconds) < budget):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def need_gpu(part: Part) -> None:
    """Ends the part where JAX finds no GPU."""
    import jax

    if not part.rehearse and jax.default_backend() != "gpu":
        sys.exit("JAX finds no GPU here; --rehearse runs tiny shapes on the CPU")
