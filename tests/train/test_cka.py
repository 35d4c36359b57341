"""TRepLiNa's terms through the real decoder and in a run: nothing but an objective and settings."""

import jax
import jax.numpy as jnp
import pytest

from jaxalign.train import setup
from jaxalign.train.loop import train
from jaxalign.train.phases.build import phase_loss
from tests.train.test_loop import lines


def test_a_fresh_adapter_has_not_drifted(configure):
    run = setup.prepare(configure("align.objective=drift", "lora.dropout=0"))
    phase, batch = run.phases["align"], run.train["align"].batch(0)
    assert [(one.model, one.sides) for one in phase.passes] == [
        ("trained", ("source", "target")), ("reference", ("source",)),
    ]  # fmt: skip
    loss = jax.jit(jax.value_and_grad(lambda t: phase_loss(phase, t, run.frozen, batch, None)[0]))
    with jax.set_mesh(run.mesh):
        value, gradient = loss(run.state.trained)
    assert float(value) < 1e-10  # two programs may order their sums differently
    assert all(float(jnp.abs(leaf).max()) < 1e-4 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_a_run_with_both_terms(configure):
    """CKA in every update, drift in every second."""
    config = configure(
        "align.objective=cka", "align.every=joint", "align.weight=0.5",
        "objectives=[{objective: drift, phase: align, weight: 0.05, every: 2}]",
        "train.steps=4", "train.eval_every=0", "align.valid=[]", "task.valid=[]",
        "checkpoint.every=100",
    )  # fmt: skip
    result = train(config)
    assert result.stopped == "finished"
    found = lines(config, "train")
    for number, line in enumerate(found, start=1):
        assert line["align/cka/cka"] == pytest.approx(1 - line["align/cka"], abs=1e-4)
        whole = 0.5 * line["align/cka"] + (0.05 * line["align/drift"] if number % 2 == 0 else 0)
        assert line["align/loss"] == pytest.approx(whole, rel=1e-3)
    assert found[-1]["align/drift"] > 0
