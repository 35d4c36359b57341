"""Validation: the losses of all phases and what a phase measures besides.

values = validate(run, state)      # {'eval/task_loss', 'eval/align_loss', 'eval/loss', ...}
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxalign.sharding import put_batch, rows_here
from jaxalign.train.phases import facts_of
from jaxalign.train.state import TrainState


def validate(run: Any, state: TrainState) -> dict[str, float]:
    """Evaluates every phase that has validation rows; dropout is off.

    `eval/loss` is the sum of the phases' losses, which is what the paper's code stops on. With
    `optim.average: tokens` a loss is its sum over its count; with `microbatch` it is averaged over
    batches, weighted by their rows in `eval/loss` and plainly in `eval/<phase>_loss` (as the
    original's trainer does).

    Returns:
      `eval/task_loss`, `eval/align_loss`, `eval/loss`, each term's logs, and what a phase measures
      itself, such as `eval/retrieval` of pairs.
    """
    values: dict[str, float] = {}
    whole = 0.0
    for name, stream in run.valid.items():
        number = min(stream.epoch_batches, run.config.train.eval_batches or stream.epoch_batches)
        terms, rows, states = [], [], []
        places = rows_here(run.mesh, stream.size)
        for index in range(number):
            run.look_up()
            batch = put_batch(run.mesh, stream.batch(index, places))
            losses, pooled = run.evaluate[name](state.trained, run.frozen, batch)
            terms.append(losses)
            rows.append(stream.real_rows(index))
            states.append((batch.rows, pooled))
        losses = jax.device_get(terms)
        share, plain = _average(run, name, losses, np.array(rows, float))
        values[f"eval/{name}_loss"] = plain
        whole += share
        values |= _logs(name, losses)
        facts = facts_of(run.config, name)
        if facts.scores:
            gathered = process_allgather(states, tiled=True)
            values |= facts.measure(run.config, stream, gathered)
    return values | ({"eval/loss": whole} if run.valid else {})


def _average(run: Any, name: str, losses: list, rows: np.ndarray) -> tuple[float, float]:
    """(share of eval/loss, the phase's own loss), weighted sums over the terms."""
    share = plain = 0.0
    for term in run.phases[name].terms:
        sums = np.array([float(loss[term.name].sum) for loss in losses])
        counts = np.array([float(loss[term.name].count) for loss in losses])
        if run.config.optim.average == "tokens":
            mean = sums.sum() / max(counts.sum(), 1.0)
            share += term.share * mean
            plain += term.share * mean
        else:
            means = sums / np.maximum(counts, 1.0)
            share += term.share * float(np.average(means, weights=rows))
            plain += term.share * float(means.mean())
    return float(share), float(plain)


def _logs(phase: str, losses: list) -> dict[str, float]:
    found = {}
    for term in losses[0]:
        count = max(sum(float(loss[term].count) for loss in losses), 1.0)
        for what in losses[0][term].logs:
            total = sum(float(loss[term].logs[what]) for loss in losses)
            found[f"eval/{phase}/{term}/{what}"] = total / count
    return found
