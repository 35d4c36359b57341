"""Validation: both losses and how well parallel sentences find each other.

values = validate(run, state)      # {'eval/task_loss', 'eval/align_loss', 'eval/loss', ...}
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxalign.objectives.contrastive import similarities
from jaxalign.objectives.states import PairStates
from jaxalign.sharding import put_batch, rows_here
from jaxalign.train.state import TrainState


def validate(run: Any, state: TrainState) -> dict[str, float]:
    """Evaluates every phase that has validation rows; dropout is off.

    `eval/loss` is the sum of the phases' losses, which is what the paper's code stops on. With
    `optim.average: tokens` a loss is its sum over its count; with `microbatch` it is averaged over
    batches, weighted by their rows in `eval/loss` and plainly in `eval/<phase>_loss` (as the
    original's trainer does).

    Returns:
      `eval/task_loss`, `eval/align_loss`, `eval/loss`, each term's logs, and for pairs
      `eval/retrieval`: the share of sources whose target is the nearest of all validation targets.
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
        if name == "align":
            values["eval/retrieval"] = _retrieval(stream, states, run.config.align.layer)
    return values | ({"eval/loss": whole} if run.valid else {})


def _average(run: Any, name: str, losses: list, rows: np.ndarray) -> tuple[float, float]:
    """(share of eval/loss, the phase's own loss), weighted sums over the terms."""
    share = plain = 0.0
    for term in run.phases[name].terms:
        sums = np.array([float(loss[term.name].sum) for loss in losses])
        counts = np.array([float(loss[term.name].count) for loss in losses])
        if run.config.optim.average == "tokens":
            mean = sums.sum() / max(counts.sum(), 1.0)
            share += term.weight * mean
            plain += term.weight * mean
        else:
            means = sums / np.maximum(counts, 1.0)
            share += term.weight * float(np.average(means, weights=rows))
            plain += term.weight * float(means.mean())
    return float(share), float(plain)


def _logs(phase: str, losses: list) -> dict[str, float]:
    found = {}
    for term in losses[0]:
        count = max(sum(float(loss[term].count) for loss in losses), 1.0)
        for what in losses[0][term].logs:
            total = sum(float(loss[term].logs[what]) for loss in losses)
            found[f"eval/{phase}/{term}/{what}"] = total / count
    return found


def _retrieval(stream: Any, states: list[tuple[Any, PairStates]], layer: int) -> float:
    """Top-1 retrieval by cosine, source to target, among all validation pairs.

    Several languages may share an English target: finding its copy is finding it. Another sentence
    that is as near is not: of a model that has collapsed, nothing is found.

    Args:
      states: of every batch, the stream's row numbers and both sides' states, over all processes.
    """
    gathered = process_allgather(states, tiled=True)
    rows = np.concatenate([numbers for numbers, _ in gathered])
    source, target = (
        np.concatenate([getattr(pooled, side)[layer] for _, pooled in gathered])[rows >= 0]
        for side in ("source", "target")
    )
    same = np.unique([row.target.tobytes() for row in stream.rows], return_inverse=True)[1]
    sentence = same[rows[rows >= 0]]
    hits = 0
    for first in range(0, len(source), 1024):
        block = np.asarray(
            similarities(jnp.asarray(source[first : first + 1024]), jnp.asarray(target))
        )
        own = sentence[first : first + len(block), None] == sentence
        right, other = (
            np.max(block, axis=-1, initial=-np.inf, where=chosen) for chosen in (own, ~own)
        )
        hits += int((right > other).sum())
    return hits / max(len(source), 1)
