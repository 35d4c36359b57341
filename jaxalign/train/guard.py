"""A run that diverges ends as one: too many updates in a row that were not finite, and why.

The step skips such updates on the device by itself (`step.py`). Here they are counted, a fixed
number of updates behind the device: no update waits for the count, and all processes, which see
the same numbers at the same place, come to the same decision.

    guard = Guard(run, log)
    state, metrics = step(state, ...)
    guard.update(step, state, batches, metrics)
    guard.diverged                                   # then guard.sentence(store) says why
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxalign import compiler
from jaxalign.errors import UserError
from jaxalign.sharding import replicated
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.metrics import Log
from jaxalign.train.phases import facts_of
from jaxalign.train.phases.build import lost_rows
from jaxalign.train.resume import Progress
from jaxalign.train.setup import Run
from jaxalign.train.state import TrainState
from jaxalign.train.watch import IN_FLIGHT

NAMED = 5  # rows in a sentence
ALL = ""  # updates of any phase


@dataclass(frozen=True)
class Cause:
    """What was not finite."""

    step: int  # of the update
    text: str
    advice: str
    weights: bool = False  # nothing was finite: the state before the update is not usable
    skipped: bool = True  # else no update was tried: a look at the end


class Guard:
    """Counts the updates that were skipped in a row: of all, and of each phase, as one phase may
    learn while the other one never does."""

    def __init__(self, run: Run, log: Log, key: jax.Array | None) -> None:
        self._run, self._log, self._key = run, log, key
        self._limit = run.config.train.max_skipped
        self._in_flight: deque[tuple[int, Any, Any]] = deque()  # (step, batches, metrics)
        # Of the updates skipped in a row, up to the last looked at: of all (ALL), of each phase.
        self._causes: dict[str, list[Cause]] = {name: [] for name in (ALL, *run.active)}
        self._learnt: set[str] = set()  # phases with an update that was not skipped
        self._unseen = set(run.active)
        self._look: dict[str, Callable] = {}

    @property
    def doubtful(self) -> bool:
        """Whether nothing finite comes from the state as it is: it should not be kept."""
        return any(cause.weights for cause in self._causes[ALL])

    @property
    def diverged(self) -> bool:
        """Whether so many were skipped in a row that the run should end."""
        return any(len(causes) >= self._limit for causes in self._causes.values())

    def update(self, step: int, state: TrainState, batches: Any, metrics: Any) -> None:
        """Takes an update, and looks at the one that is over by now.

        Raises:
          UserError: the first gradient of a phase is zero.
        """
        for name in self._unseen & batches.keys():
            _check_first(self._run, name, float(metrics[f"{name}/grad_norm"]))
        self._unseen -= batches.keys()
        self._in_flight.append((step, batches, metrics))
        self._count(state, IN_FLIGHT)

    def settle(self, state: TrainState) -> None:
        """Looks at all updates so far; waits for the device."""
        self._count(state, 0)

    def last_look(self, state: TrainState, batches: Any, step: int, progress: Progress) -> bool:
        """Whether the run has diverged, at its end: what it hands over must give a finite loss."""
        self.settle(state)
        if self.diverged or self.doubtful or self._idle:
            return True
        if progress.best is not None:  # what is handed over was validated
            return False
        if progress.waited:
            text = "no validation had finite losses"
            self._causes[ALL].append(Cause(step, text, LOWER, weights=True, skipped=False))
            return True
        found: dict[str, Any] = {}
        for name, batch in (batches or {}).items():
            _, logs = self._run.step.phase(name, state, self._run.frozen, batch, self._key)
            found[f"{name}/loss"] = logs["loss"]
        if all(math.isfinite(value) for value in found.values()):
            return False
        cause = replace(self._cause(state, step, batches, found), skipped=False)
        self._causes[ALL] += [cause] if cause.weights else []
        return cause.weights

    def sentence(self, store: Checkpoints) -> str:
        """Why the run ended; drops the checkpoint from which nothing finite came."""
        name, causes = max(self._causes.items(), key=lambda one: len(one[1]))
        first = next((cause for cause in causes if cause.weights), causes[0])
        if first.weights:
            store.forget_from(first.step - first.skipped)
        store.wait()
        kept = "no checkpoint is kept" if store.latest is None else f"step {store.latest} is kept"
        where = f"after update {first.step}"
        if first.skipped:
            whose = f"{name} updates" if name else "updates"
            where = f"{len(causes)} {whose} in a row were skipped, from update {first.step} on"
        return f"diverged: {where}: {first.text}; {kept}; {first.advice}"

    @property
    def _idle(self) -> set[str]:
        """Phases of which every update was skipped, and not for the sake of single rows."""
        idle = set(self._run.active) - self._learnt
        return {name for name in idle if any(cause.weights for cause in self._causes[name])}

    def _count(self, state: TrainState, behind: int) -> None:
        while len(self._in_flight) > behind:
            step, batches, metrics = self._in_flight.popleft()
            names = (ALL, *batches)
            if not int(metrics["skipped"]):
                self._learnt |= batches.keys()
                self._causes |= {name: [] for name in names}
                continue
            cause = self._cause(state, step, batches, metrics)
            for name in names:
                self._causes[name].append(cause)
            self._log.event("skipped", step, {"why": cause.text})
            if len(self._causes[ALL]) == 1:
                self._log.message(f"update {step} is skipped: {cause.text}")

    def _cause(self, state: TrainState, step: int, batches: Any, metrics: Mapping) -> Cause:
        """By the state after the update, which is the one before it where nothing came between."""
        found = jax.device_get(dict(metrics))
        numbers = ("loss", "grad_norm")
        for name, batch in batches.items():
            if all(math.isfinite(found.get(f"{name}/{what}", 0.0)) for what in numbers):
                continue
            stacks = batch if isinstance(batch, list) else [batch]
            look = partial(self._lost(name), state.trained, self._run.frozen)
            each = jax.device_get([look(stack) for stack in stacks])
            lost = np.concatenate([where for where, _ in each])  # [n, B]
            rows = np.concatenate([numbers for _, numbers in each])
            if lost.all():
                return Cause(step, f"no {name} row has finite states", LOWER, weights=True)
            if lost.any():
                return Cause(step, self._rows(name, rows[lost]), "look at these rows")
            text = f"the {name} loss or its gradient is not finite, though all states are"
            return Cause(step, text, LOWER, weights=True)
        return Cause(step, "the parameters would not be finite after it", LOWER)

    def _rows(self, name: str, numbers: np.ndarray) -> str:
        rows = self._run.train[name].rows
        origins = [rows[number].origin for number in np.unique(numbers[numbers >= 0])]
        more = f" and {len(origins) - NAMED} more" if len(origins) > NAMED else ""
        return f"states of {name} rows are not finite: {', '.join(origins[:NAMED])}{more}"

    def _lost(self, name: str) -> Callable:
        """(trained, frozen, batches) -> (lost [n, B] bool, the stream's rows there)."""
        if name not in self._look:
            run = self._run
            phase, whole = run.phases[name], replicated(run.mesh)
            options = compiler.options(run.mesh.devices.flat[0])

            @partial(jax.jit, compiler_options=options, out_shardings=(whole, whole))
            def look(trained: Any, frozen: Any, batches: Any) -> Any:
                def one(_: Any, batch: Any) -> Any:
                    return None, lost_rows(phase.states(trained, frozen, batch, None))

                return jax.lax.scan(one, None, batches)[1], batches.rows

            self._look[name] = look
        return self._look[name]


LOWER = "lower optim.learning_rate in another output, or try model.dtype=float32"


def _check_first(run: Run, name: str, norm: float) -> None:
    """At the first update of a phase: do the trained parameters receive a gradient at all?"""
    if norm != 0:  # what is not finite is skipped and counted
        return
    raise UserError(facts_of(run.config, name).unmoved(run.config))
