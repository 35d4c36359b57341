"""What may come of an input: a result that holds its promise, or one sentence; nothing else.

A target has a strategy for its inputs and a function that reads one and asserts what must hold of
the result. `judge` runs it under a limit of time and says how it ended.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxalign.errors import UserError
from tests.fuzz.odd import long_numbers

SECONDS = 5.0  # of processor time for one input; a machine shared with others takes longer by clock
ENDS = ("accepted", "refused", "crash", "hang", "wrong")


@dataclass(frozen=True)
class Target:
    """Something that reads what a stranger wrote."""

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], None]  # (input, an empty folder); asserts
    share: float = 1.0  # of the inputs, fewer for what is slow


@dataclass
class Tally:
    """How the inputs of one target ended."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)  # the inputs that ended as none should

    def row(self, name: str) -> str:
        """The line of a table."""
        return f"| {name} | {self.ends.total()} | " + " | ".join(
            str(self.ends[end]) for end in ENDS
        ) + " |"  # fmt: skip


class _Hang(BaseException):
    """Too long."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """SECONDS of this thread: the timer counts those of JAX's threads, too, and is set again.

    A signal that comes late raises nothing, or it would end whatever runs then. It stays ignored
    afterwards: what a process does without a handler is to die of it.
    """
    began, watching = time.thread_time(), True

    def stop(*_: Any) -> None:
        if not watching:
            return
        left = SECONDS - (time.thread_time() - began)
        if left <= 0:
            raise _Hang
        signal.setitimer(signal.ITIMER_PROF, max(left, 0.05))

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)


def judge(target: Target, value: Any) -> tuple[str, str]:
    """(one of ENDS, what went wrong)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _limited():
                target.read(value, Path(folder))
        except UserError as error:
            sentence = str(error)
            if "\n" in sentence or not sentence.strip() or len(sentence) > 2000:
                return "wrong", f"not one sentence: {sentence[:300]!r}"
            return "refused", ""
        except _Hang:
            return "hang", ""
        except AssertionError:
            return "wrong", traceback.format_exc(limit=-3)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # panics of libraries in Rust, too
            return "crash", traceback.format_exc(limit=-4)
        return "accepted", ""


def fuzz(target: Target, number: int) -> Tally:
    """Runs `number` inputs, the same ones each time."""
    tally = Tally()

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def run(value: Any) -> None:
        end, why = judge(target, value)
        tally.ends[end] += 1
        if end in ("crash", "hang", "wrong") and len(tally.faults) < 5:
            tally.faults.append(f"{target.name}: {end} of {_shown(value)}\n{why}")

    run()
    return tally


def _shown(value: Any) -> str:
    with long_numbers():
        return f"{value!r:.600}"


def table(tallies: dict[str, Tally]) -> str:
    """Markdown: target, inputs, and how they ended."""
    total = Tally(sum((tally.ends for tally in tallies.values()), Counter()))
    lines = [f"| target | inputs | {' | '.join(ENDS)} |", "|---|" + "---:|" * (len(ENDS) + 1)]
    lines += [tally.row(name) for name, tally in tallies.items()]
    return "\n".join([*lines, total.row("all")])
