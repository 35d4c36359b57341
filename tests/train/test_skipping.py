"""An update that is not finite leaves the state as it was, and counts; inside the compiled step."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.objectives import Loss, Needs, Objective, States, Tap, View
from jaxalign.train.optim import make_optimiser
from jaxalign.train.phases.align import retrieval
from jaxalign.train.phases.build import Phase, Term
from jaxalign.train.schedule import learning_rate
from jaxalign.train.state import TrainState
from jaxalign.train.step import make_train_step

LAYERS, WIDTH = 3, 4
TAP = Tap(1)


class Rows(NamedTuple):
    x: jax.Array  # [B, L, D]
    # As of a batch of the data: padded rows, one in each sequence.
    rows: None = None
    flat: None = None


def squares(states, batch):
    found = states.text.taps[TAP]
    return Loss(jnp.sum(found**2), jnp.asarray(found.size, jnp.float32), {})


def infinite(states, batch):
    """A loss that is not finite though its gradient is."""
    broken = jnp.any(batch.x < 0)
    found = squares(states, batch)
    return found._replace(sum=found.sum + jax.lax.stop_gradient(jnp.where(broken, jnp.inf, 0.0)))


def build(objective=squares, rate=None, mask=None, **options):
    rate = rate or (lambda step: jnp.asarray(0.1))

    def states(w, frozen, batch, key):
        return States(
            {"text": View(batch.x[:, :, 0] > 0, {TAP: batch.x * w["blocks"]["a"] + 1}, {})}
        )

    phase = Phase(states, (Term("own", Objective(objective, {"text": Needs((TAP,))})),))
    optimiser = make_optimiser(rate, layer_mask=mask, **options)
    start = {"blocks": {"a": jnp.linspace(0.5, 1.5, LAYERS * WIDTH).reshape(LAYERS, WIDTH)}}
    step = make_train_step({"task": phase}, optimiser, rate=rate, layer_mask=mask)
    return step, TrainState.create(start, optimiser)


def rows(number, bad=None):
    x = np.random.default_rng(number).uniform(0.5, 1, (1, 2, LAYERS, WIDTH)).astype(np.float32)
    if bad is not None:
        x[0, 1, 0, 0] = bad
    return {"task": Rows(x)}


def run(step, state, batches):
    counts = []
    for batch in batches:
        state, metrics = step(state, None, batch, None)
        counts.append(int(metrics["skipped"]))
    return jax.device_get(state), counts


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("missing", ["zero", "skip"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # 1e30: its square overflows
def test_a_bad_row_changes_nothing(bad, missing):
    step, state = build(missing=missing)
    broken, counts = run(step, state, [rows(1), rows(2, bad), rows(3)])
    assert counts == [0, 1, 0] and broken.step == 3
    step, state = build(missing=missing)
    whole, counts = run(step, state, [rows(1), rows(3)])
    assert counts == [0, 0]
    assert_same(broken.trained, whole.trained)
    clock = optax.tree_utils.tree_get_all_with_path(broken.optimiser, "count")
    # Adam has seen two gradients; the schedule is three updates on.
    assert {int(np.max(count)) for _, count in clock} == {2, 3}


def test_a_loss_alone_that_is_not_finite():
    step, state = build(infinite)
    before = jax.device_get(state.trained)
    after, counts = run(step, state, [rows(1, -1.0)])
    assert counts == [1]
    assert_same(after.trained, before)


@pytest.mark.parametrize("rate", [np.inf, np.nan])
def test_parameters_that_would_overflow(rate):
    step, state = build(rate=lambda step: jnp.asarray(rate, jnp.float32))
    before = jax.device_get((state.trained, state.optimiser[2]))
    after, counts = run(step, state, [rows(1), rows(2)])
    assert counts == [1, 1]
    assert_same((after.trained, after.optimiser[2]), before)


def test_the_schedule_counts_updates():
    rate = learning_rate("linear", 1.0, 4, 0)
    step, state = build(rate=rate)
    seen = []
    for batch in [rows(1), rows(2, np.nan), rows(3)]:
        state, metrics = step(state, None, batch, None)
        seen.append(float(metrics["learning_rate"]))
    assert seen == [1.0, 0.75, 0.5]
    assert int(state.optimiser[-1].count) == 3


def test_blocks_that_are_not_trained_count_nowhere():
    mask = jnp.array([1.0, 0.0, 1.0])
    step, state = build(mask=mask, clip_norm=0.0)
    gradient, _ = step.gradient("task", state, None, rows(1)["task"], None)
    of_blocks = gradient["blocks"]["a"]
    assert not of_blocks[1].any() and of_blocks[0].all()
    norm = float(jnp.linalg.norm(of_blocks))
    _, metrics = step(state, None, rows(1), None)
    assert float(metrics["task/grad_norm"]) == float(metrics["grad_norm"]) == pytest.approx(norm)


def test_a_collapsed_model_retrieves_nothing():
    """Rows 0 and 1 have the same target, which counts as found by either."""
    same = np.ones((4, 3), np.float32)
    apart, tied = (np.eye(4, dtype=np.float32)[rows] for rows in ([0, 0, 1, 2], [0, 0, 1, 1]))
    texts = [SimpleNamespace(target=np.array([n], np.int32)) for n in (7, 7, 8, 9)]
    stream = SimpleNamespace(rows=texts)
    for vectors, share in ((same, 0.0), (apart, 1.0), (tied, 0.5)):
        states = [(np.arange(4), {side: {Tap(2): vectors} for side in ("source", "target")})]
        assert retrieval(stream, states, Tap(2)) == share
