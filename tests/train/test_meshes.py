"""The same losses and gradients on one device and on eight, however they are arranged."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign.adapters import Lora
from jaxalign.sharding import make_mesh, put_batch, shard_tree
from jaxalign.train import setup
from tests.tiny import ASSETS, few

MESHES = {
    "8x1": (8, 1, 1, 1),
    "1x8": (1, 8, 1, 1),
    "4x2": (4, 2, 1, 1),
    "2x2x2": (2, 2, 2, 1),
    "2x1x1x4": (2, 1, 1, 4),
    "1x2x2x2": (1, 2, 2, 2),
}


def gradients(config, shape, monkeypatch):
    """{phase: (gradient, metrics)} of one update on a mesh."""
    devices = jax.devices()[: int(np.prod(shape))]
    monkeypatch.setattr(bases, "make_mesh", lambda *_: make_mesh(*shape, devices=devices))
    run = setup.prepare(config)
    state = run.state.replace(step=run.state.step + 1)  # terms of every second update count
    found = {}
    with jax.set_mesh(run.mesh):
        for name, stream in run.train.items():
            batch = put_batch(run.mesh, stream.stack([0, 1]), stacked=True)
            key = jax.random.key(7)
            gradient, metrics = run.step.gradient(name, state, run.frozen, batch, key)
            found[name] = jax.device_get((gradient, metrics))
        # Base weights really are split, or the test would prove little.
        kernel = run.frozen.base["blocks"]["mlp"]["up"]["kernel"]
        whole = kernel.addressable_shards[0].data.size == kernel.size
        assert whole == (np.prod(shape[1:]) == 1)
    return found


def warm_adapters(monkeypatch):
    """B is zero at the start: gives it values, or every gradient of A would be zero.

    No random ones: compiling fourteen draws for every mesh took longer than the steps.
    """
    init = Lora.init

    def warm(*args):
        return jax.tree.map(
            lambda w: w + 0.03 * jnp.cos(jnp.arange(w.size) ** 1.5).reshape(w.shape), init(*args)
        )

    monkeypatch.setattr(Lora, "init", warm)


@pytest.fixture(scope="module")
def alone():
    return {}


@pytest.mark.parametrize(
    ("negatives", "mesh"),
    few(product(("group", "global"), MESHES), ("group", "2x2x2"), ("global", "1x2x2x2")),
)
def test_meshes_agree_with_one_device(configure, monkeypatch, alone, mesh, negatives):
    config = configure(f"align.negatives={negatives}", "align.group=4", "lora.dropout=0.1")
    warm_adapters(monkeypatch)
    if negatives not in alone:
        alone[negatives] = gradients(config, (1, 1, 1, 1), monkeypatch)
    assert_close(gradients(config, MESHES[mesh], monkeypatch), alone[negatives])


@pytest.mark.parametrize("mesh", few(MESHES, "2x2x2"))
def test_terms_that_compare_rows_in_their_order(configure, monkeypatch, alone, mesh):
    """Rows end to end are moved between devices for equal lengths, not out of a term's group."""
    term = "{objective: contrastive, phase: %s, options: {view: %s, group: 4}}"
    config = configure(
        "align.objective=cka", "align.every=joint", "batch.size=16", "batch.pairs=16",
        "batch.buckets=[]", "batch.max_length=256", "lora.dropout=0",  # end to end
        f"objectives=[{term % ('task', 'text')}, {term % ('align', 'pairs')}]",
    )  # fmt: skip
    warm_adapters(monkeypatch)
    if "ordered" not in alone:
        alone["ordered"] = gradients(config, (1, 1, 1, 1), monkeypatch)
    assert_close(gradients(config, MESHES[mesh], monkeypatch), alone["ordered"])


def assert_close(ours, expected):
    for phase, (gradient, metrics) in expected.items():
        for name, value in metrics.items():
            np.testing.assert_allclose(ours[phase][1][name], value, rtol=2e-5, atol=2e-6)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(ours[phase][0]), strict=True):
            scale = np.abs(a).max() + 1e-8
            np.testing.assert_allclose(b / scale, a / scale, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", few(("prefix", "prompt", "pool"), "pool"))
@pytest.mark.parametrize(
    "mesh",
    ["1x2x2x2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("8x1", "2x1x1x4"))],
)
def test_virtual_tokens_on_a_mesh(configure, monkeypatch, alone, mesh, kind):
    """Three of them: with the text they are as many tokens as no `seq` axis divides."""
    config = configure(f"adapter.kind={kind}", "adapter.num_virtual_tokens=3", "align.group=4")
    if kind not in alone:
        alone[kind] = gradients(config, (1, 1, 1, 1), monkeypatch)
    assert_close(gradients(config, MESHES[mesh], monkeypatch), alone[kind])


@pytest.mark.parametrize("mesh", ["2x2x2", pytest.param("8x1", marks=pytest.mark.slow)])
def test_two_prompts_on_a_mesh(configure, monkeypatch, alone, mesh):
    """A student and its teacher; with virtual tokens, which begin apart from the base."""
    config = configure(
        "task.weight=0", "task.kind=intent", "align.rows=prompts", "align.objective=distil",
        f"align.train=[{ASSETS}/dev.en.jsonl, {ASSETS}/dev.de.jsonl]", "align.valid=[]",
        "adapter.kind=prompt", "adapter.num_virtual_tokens=3", "align.options.teacher=base",
    )  # fmt: skip
    if "prompts" not in alone:
        alone["prompts"] = gradients(config, (1, 1, 1, 1), monkeypatch)
    assert_close(gradients(config, MESHES[mesh], monkeypatch), alone["prompts"])


def test_adapters_are_whole_and_weights_are_split(configure):
    config = configure()
    run = setup.prepare(config)
    assert run.mesh.size == 8
    shardings = shard_tree(run.mesh, run.frozen.base)
    assert jax.tree.leaves(shardings)[0].mesh == run.mesh
    for leaf in jax.tree.leaves(run.state):
        assert leaf.sharding.is_fully_replicated
