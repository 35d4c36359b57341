"""Trials shared out among the processes that work at a comparison.

    scores = each(study, trials, score)      # trial -> what `score` gives

Each process takes the next trial that no other one holds. A trial is held by a lock of the kernel,
which ends with its process; where a process dies, another one goes on with its trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxalign.compare.study import Study
from jaxalign.compare.trial import Trial, cost, finished, outcome
from jaxalign.errors import UserError
from jaxalign.lock import held
from jaxalign.terminal import say

Done = TypeVar("Done")
LOCKS = "locks"  # folder in the output


def each(
    study: Study, trials: Sequence[Trial], do: Callable[[Trial], Done], what: str = ""
) -> dict[Trial, Done]:
    """Does every trial, or waits until another process has and does what is left of it.

    Args:
      do: trains a trial and measures it; what is done already costs it next to nothing.
      what: begins the line before each trial that is not finished.

    Returns:
      What `do` gave, in the order of `trials`.
    """
    done: dict[Trial, Done] = {}
    for wait in (False, True):
        for number, trial in enumerate(trials):
            if trial in done:
                continue
            with claim(study, trial.place("").as_posix(), wait) as mine:
                if mine:
                    if not finished(study, trial):
                        left = [one for one in trials[number:] if not finished(study, one)]
                        about = _remaining(study, trials, left)
                        say(f"{what}{trial} ({len(left)} of {len(trials)} to train{about})")
                    done[trial] = do(trial)
    return {trial: done[trial] for trial in trials}


@contextmanager
def claim(study: Study, what: str, wait: bool) -> Iterator[bool]:
    """Holds a part of a comparison; False where another process does and `wait` is not set.

    Raises:
      UserError: nothing can be written to the output.
    """
    file = Path(study.output, LOCKS, f"{what}.lock")
    try:
        with held(file) as mine:
            if mine or not wait:
                yield mine
                return
        say(f"waiting for another process, which is working on {what}")
        with held(file, wait=True):
            yield True
    except OSError as error:
        if error.filename != str(file):  # of what is done meanwhile
            raise
        raise UserError(f"output: {file} cannot be written ({error.strerror})") from error


def _remaining(study: Study, trials: Sequence[Trial], left: Sequence[Trial]) -> str:
    took: dict[str, list[float]] = {}
    for trial in trials:
        if finished(study, trial):
            seconds = cost(outcome(study, trial).outputs)["wall_seconds"]
            took.setdefault(trial.system, []).append(seconds or 0.0)
    if not took:
        return ""
    every = [one for many in took.values() for one in many]
    total = sum(float(np.mean(took.get(one.system, every))) for one in left)
    return f"; about {timedelta(seconds=round(total))}, judging by the finished ones"
