"""Micro-batches of an update, each padded by itself, give what they gave stacked."""

import jax
import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign.adapters import Lora
from jaxalign.sharding import make_mesh, put_batch, rows_here
from jaxalign.train import setup
from tests.train.worker import warm

NUMBERS = range(3)


@pytest.fixture
def prepare(configure, monkeypatch):
    """words -> a run on two devices, with factors none of which is zero."""
    monkeypatch.setattr(Lora, "init", warm(Lora.init))
    mesh = make_mesh(1, 2, 1, 1, devices=jax.devices()[:2])
    monkeypatch.setattr(bases, "make_mesh", lambda *_: mesh)
    words = ("batch.size=2", "batch.pairs=2", "align.group=2", "batch.accumulate=6")
    return lambda *more: setup.prepare(configure("lora.targets=[q,down]", *words, *more))


def equal(found, wanted, tolerance):
    """Gradients and logs of one phase agree."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(b).max() + 1e-8
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, rtol=0)


def test_each_padded_to_its_own_length(prepare):
    run = prepare("batch.buckets=[12,16,20,24,32,40,128]")
    with jax.set_mesh(run.mesh):
        for name, stream in run.train.items():
            assert run.alone(name)
            places = rows_here(run.mesh, stream.size)
            batches = run.batches(name, NUMBERS, places)
            assert len({one[0].shape for one in batches}) > 1, "all of one length prove nothing"
            whole = put_batch(run.mesh, stream.stack(NUMBERS, places), stacked=True)
            wanted = run.step.phase(name, run.state, run.frozen, whole, None)
            batches = put_batch(run.mesh, batches, stacked=True)
            found = run.step.phase(name, run.state, run.frozen, batches, None)
            assert found[1]["micro_losses"].shape == (3,)
            equal(jax.device_get(found), jax.device_get(wanted), 1e-6)


@pytest.mark.slow
def test_of_one_length_they_are_stacked_and_dropout_is_the_same_either_way(prepare):
    run = prepare("lora.dropout=0.2", "batch.buckets=[128]")
    key = jax.random.key(3)
    with jax.set_mesh(run.mesh):
        for name, stream in run.train.items():
            places = rows_here(run.mesh, stream.size)
            batches = put_batch(run.mesh, run.batches(name, NUMBERS, places), stacked=True)
            assert batches[0].shape == (3, 2, 128)
            wanted = run.step.phase(name, run.state, run.frozen, batches, key)
            ones = [stream.stack([number], places) for number in NUMBERS]
            ones = put_batch(run.mesh, ones, stacked=True)
            found = run.step.phase(name, run.state, run.frozen, ones, key)
            equal(jax.device_get(found), jax.device_get(wanted), 1e-6)
