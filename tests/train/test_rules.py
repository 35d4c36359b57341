"""Gradient rules and ways to combine gradients, against plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.settings import abouts
from jaxalign.train import setup
from jaxalign.train.apply import make_update
from jaxalign.train.combine import COMBINE
from jaxalign.train.loop import train
from jaxalign.train.phases import PHASES
from jaxalign.train.phases.build import terms_loss
from jaxalign.train.rules import RULES
from jaxalign.train.state import TrainState
from tests.tiny import few
from tests.train.test_loop import lines

MICRO = 3


def relative(ours, theirs):
    ours, theirs = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (ours, theirs)
    )
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def warm(trained):
    """B is zero at the start, and with it every gradient of A."""
    return jax.tree.map(
        lambda w: w + 0.03 * jnp.cos(jnp.arange(w.size) ** 1.5).reshape(w.shape), trained
    )


@pytest.mark.parametrize("drops", few((False, True), True))
def test_cached_is_one_large_batch(configure, drops):
    words = ("align.negatives=global", "align.rule=cached", f"lora.dropout={0.1 * drops}")
    run = setup.prepare(configure(*words, "mesh.fsdp=1", "mesh.data=8"))
    phase, trained = run.phases["align"], warm(run.state.trained)
    stacked = run.train["align"].stack(range(MICRO))
    key = jax.random.key(3) if drops else None

    def whole(trained):
        """The definition: all states, then one loss of them."""
        parts = []
        for number in range(MICRO):
            batch = jax.tree.map(lambda x, n=number: x[n], stacked)
            own = None if key is None else jax.random.fold_in(key, number)
            parts.append(phase.states(trained, run.frozen, batch, own))
        views = jax.tree.map(lambda *x: jnp.concatenate(x), *(one.views for one in parts))
        batch = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:]), stacked)
        return terms_loss(phase, parts[0]._replace(views=views), batch)[0]

    with jax.set_mesh(run.mesh):
        value, wanted = jax.jit(jax.value_and_grad(whole))(trained)
        rule = lambda t: RULES["cached"].gradient(phase, t, run.frozen, stacked, key, "tokens")  # noqa: E731
        found, metrics = jax.jit(rule)(trained)
    assert relative(found, wanted) < 1e-5
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    assert float(metrics["contrastive/count"]) == MICRO * run.train["align"].size
    assert metrics["micro_losses"].shape == (MICRO,)


@pytest.mark.slow
def test_a_cached_run_sees_more_negatives(configure):
    """The loss of one batch of 16 is nearer ln 16 than that of two batches of 8 is."""
    found = {}
    for rule in ("mean", "cached"):
        config = configure(
            f"align.rule={rule}", "align.negatives=global", "task.weight=0", "train.steps=2",
            "train.eval_every=0", "align.valid=[]", "align.temperature=10", f"output={rule}",
            "checkpoint.every=100",
        )  # fmt: skip
        config.output = configure().output + rule
        train(config)
        found[rule] = lines(config, "train")[0]["align/loss"]
    assert found["mean"] == pytest.approx(np.log(8), abs=0.05)
    assert found["cached"] == pytest.approx(np.log(16), abs=0.05)


def gradients(against):
    """Two gradients with a given cosine."""
    a, b = {"x": jnp.array([1.0, 0.0]), "y": jnp.array([[2.0]])}, None
    b = {"x": jnp.array([against, 3.0]), "y": jnp.array([[0.0]])}
    return [a, b]


def dot(a, b):
    return float(sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)))


@pytest.mark.parametrize("way", COMBINE)
def test_without_conflict_all_ways_are_the_sum(way):
    a, b = gradients(0.5)
    total = COMBINE[way]([a, b])
    np.testing.assert_allclose(total["x"], [1.5, 3.0])
    np.testing.assert_allclose(total["y"], [[2.0]])


def test_with_conflict_the_sum_conflicts_with_neither():
    a, b = gradients(-4.0)
    assert dot(COMBINE["weighted"]([a, b]), a) > 0 > dot(a, b)
    total = COMBINE["pcgrad"]([a, b])
    assert dot(total, a) >= -1e-5 and dot(total, b) >= -1e-5
    # By hand: each less its part against the other.
    share, back = dot(a, b) / dot(b, b), dot(a, b) / dot(a, a)
    for name in a:
        wanted = a[name] - share * b[name] + b[name] - back * a[name]
        np.testing.assert_allclose(total[name], wanted, rtol=1e-5, atol=1e-6)


def test_task_first_leaves_the_task_alone():
    a, b = gradients(-4.0)
    total = COMBINE["task_first"]([a, b])
    assert dot(total, a) == pytest.approx(dot(a, a), rel=1e-5)


@pytest.mark.parametrize("names", [("task", "align"), ("align", "second")])
def test_the_first_phase_is_first_in_a_compiled_update(names):
    """JAX sorts the keys of what a compiled function is given."""
    a, b = ({"blocks": one} for one in gradients(-4.0))
    optimiser = optax.sgd(1.0)
    update = jax.jit(make_update(optimiser, "joint", None, "task_first"), static_argnums=3)
    state = TrainState.create(jax.tree.map(jnp.zeros_like, a), optimiser)
    given, losses = dict(zip(names, (a, b), strict=True)), dict.fromkeys(names, jnp.zeros(()))
    after, _ = update(state, given, losses, tuple((name, 1) for name in names))
    assert -dot(after.trained, a) == pytest.approx(dot(a, a), rel=1e-5)


def test_settings_name_every_row():
    """The settings, which import nothing, list the same names."""
    choices = {key: about.bounds.choices for key, about in abouts()}
    assert set(choices["align.rule"]) | set(choices["task.rule"]) == set(RULES)
    assert set(choices["optim.combine"]) == set(COMBINE)
    assert set(choices["objectives.phase"]) == set(PHASES)
