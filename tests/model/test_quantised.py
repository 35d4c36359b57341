"""Weights in 8 and 4 bits: how far from the wide ones, how small, and nothing else changes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign.adapters.dora import Dora
from jaxalign.adapters.lora import Lora
from jaxalign.config import load
from jaxalign.demo import ASSETS
from jaxalign.errors import UserError
from jaxalign.frozen.quantised import KINDS, NF4, Quantised, group_of, is_quantised, quantise, widen
from jaxalign.generate import Decoding, generate
from jaxalign.hf.load import abstract_params, load_params, load_spec
from jaxalign.hf.peft import load_peft
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from jaxalign.plan.cost import measure
from jaxalign.sharding import make_mesh, shard_tree
from jaxalign.train import setup
from jaxalign.train.loop import train
from tests.adapters.variants import VARIANTS, random_tree
from tests.hf.conftest import LLAMA
from tests.programs import OPTIMISED
from tests.tiny import base, configure, few, rows

__all__ = ["base", "configure", "rows"]

SPEC = dataclasses.replace(LLAMA, dim=128, ffn=192, head_dim=32)
TOKENS = np.arange(24).reshape(2, 12)


def leaf(x):
    return isinstance(x, Quantised)


@jax.jit
def wide_again(params):
    return jax.tree.map(lambda w: widen(w, jnp.float32), params, is_leaf=leaf)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base on disk."""
    folder = tmp_path_factory.mktemp("base")
    params = jax.tree.map(lambda w: w * 4, Decoder(SPEC).init(jax.random.key(0)))
    save_base(folder, params, SPEC)
    return folder


@pytest.fixture(scope="module")
def small(folder):
    """kind -> its parameters."""
    spec = load_spec(folder)
    return {kind: load_params(folder, spec, jnp.float32, quantize=kind) for kind in KINDS}


# --- the numbers --------------------------------------------------------------------------------


def test_nf4_is_the_published_table():
    """Appendix E of QLoRA: quantiles of N(0, 1), 8 above zero and 7 below, largest made 1."""
    from scipy.stats import norm

    end = 0.9677083
    above = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    levels = np.sort([*below, 0.0, *above])
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=2e-7)
    assert len(NF4) == 16 and list(NF4) == sorted(NF4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_stored_comes_back(kind):
    """Numbers on the grid, scales that bfloat16 holds: bit by bit, zeros and all."""
    numbers = np.random.default_rng(0)
    grid = {"int8": np.arange(-127, 128), "int4": np.arange(-7, 8), "nf4": np.float32(NF4)}[kind]
    weight = grid[numbers.integers(0, len(grid), (2, 256, 3))].astype(np.float32)
    group = 256 if kind == "int8" else 64
    blocks = weight.reshape(2, 256 // group, group, 3)
    blocks[:, :, 0] = grid.max()  # every group reaches its end
    blocks *= 2.0 ** numbers.integers(-6, 3, (2, 256 // group, 1, 3))
    blocks[1, -1, :, 2] = 0
    small = quantise(jnp.asarray(weight), kind, 1)
    np.testing.assert_array_equal(small.widen(jnp.float32), weight)
    assert small.shape == weight.shape and small.ndim == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "inputs"), [((2, 96, 5), 1), ((2, 3, 32, 4), 2), ((2, 64, 3, 4), 1)]
)
def test_errors_are_those_of_the_grid(kind, shape, inputs):
    """Against NumPy, number by number: the nearest on the grid of the group's scale."""
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    small = quantise(jnp.asarray(weight), kind, inputs)
    length = shape[inputs]
    group = length if kind == "int8" else group_of(length)
    split = weight.reshape(*shape[:inputs], length // group, group, *shape[inputs + 1 :])
    scales = np.expand_dims(np.asarray(small.scales, np.float32), inputs + 1)
    largest = np.abs(split).max(axis=inputs + 1, keepdims=True)
    most = {"int8": 127, "int4": 7, "nf4": 1}[kind]
    np.testing.assert_allclose(scales * most, largest, rtol=1e-6 if kind == "int8" else 2**-8)
    grid = np.arange(-most, most + 1) if kind != "nf4" else np.float32(NF4)
    nearest = np.abs(split[..., None] - (grid * scales[..., None])).argmin(-1)
    expected = (grid[nearest] * scales).reshape(shape)
    np.testing.assert_allclose(small.widen(jnp.float32), expected, rtol=1e-6, atol=0)


def test_groups():
    assert [group_of(n) for n in (4096, 14336, 48, 96, 80, 2)] == [64, 64, 48, 48, 40, 2]
    with pytest.raises(ValueError, match="an axis of 7 numbers cannot be stored two in a byte"):
        group_of(7)


def test_nf4_is_nearer_to_normal_weights_than_int4():
    weight = jax.random.normal(jax.random.key(0), (1, 1024, 64))
    error = {}
    for kind in KINDS:
        off = quantise(weight, kind, 1).widen(jnp.float32) - weight
        error[kind] = float(jnp.sqrt(jnp.mean(off**2)))
    assert error["int8"] < 0.01 < error["nf4"] < error["int4"] < 0.12


# --- in a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.27), ("int4", 0.16), ("nf4", 0.16)])
def test_bytes(small, kind, most):
    wide = sum(x.size * 4 for x in jax.tree.leaves(abstract_params(SPEC, jnp.float32)["blocks"]))
    assert sum(x.nbytes for x in jax.tree.leaves(small[kind]["blocks"])) < most * wide
    assert is_quantised(small[kind]) and not is_quantised(wide_again(small[kind]))
    kernel = small[kind]["blocks"]["attention"]["o"]["kernel"]
    assert leaf(kernel) and kernel.shape == (3, 4, 32, 128)
    assert kernel.nbytes == kernel.values.nbytes + kernel.scales.nbytes
    expected = abstract_params(SPEC, jnp.float32, kind)
    assert jax.tree.structure(expected) == jax.tree.structure(small[kind])
    for left, right in zip(jax.tree.leaves(expected), jax.tree.leaves(small[kind]), strict=True):
        assert (left.shape, left.dtype) == (right.shape, right.dtype)


@pytest.mark.parametrize(
    ("kind", "name", "remat"),
    [
        pytest.param("int8", "lora", "none", marks=pytest.mark.slow),
        pytest.param("int4", "lora", "dots", marks=pytest.mark.slow),
        ("nf4", "dora_patterns", "full"),
    ],
)
def test_runs_and_learns_as_the_widened_weights_do(small, kind, name, remat):
    params = small[kind]
    adapter = VARIANTS[name]
    decoder, lora = Decoder(SPEC, adapter, remat), random_tree(adapter, SPEC)

    @partial(jax.jit, compiler_options=OPTIMISED)
    @partial(jax.value_and_grad, has_aux=True)
    def run(lora, params):
        hidden = decoder.forward(params, lora, TOKENS).hidden
        return jnp.sin(hidden).mean(), hidden

    ((_, ours), one), ((_, theirs), two) = run(lora, params), run(lora, wide_again(params))
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(jnp.abs(theirs).max()), rtol=0)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.abs(right).max() > 0
        np.testing.assert_allclose(left, right, atol=1e-6 * float(np.abs(right).max()), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dora_begins_at_the_rounded_columns(small, kind, folder):
    """Lengths of the stored weights, not of the wide ones: a fresh DoRA changes nothing."""
    adapter, params = Dora(4, 8.0, 0.0, ("o", "down")), small[kind]
    lora = jax.jit(partial(adapter.init, SPEC))(jax.random.key(1), params)
    wide, rounded = load_params(folder, SPEC, jnp.float32), wide_again(params)
    for part, name, inputs in (("attention", "o", (1, 2)), ("mlp", "down", (1,))):
        m, ours, theirs = (
            np.asarray(tree["blocks"][part][name][leaf])
            for tree, leaf in ((lora, "m"), (rounded, "kernel"), (wide, "kernel"))
        )
        np.testing.assert_allclose(m, np.sqrt(np.square(ours).sum(inputs)), rtol=1e-6)
        assert np.abs(m / np.sqrt(np.square(theirs).sum(inputs)) - 1).max() > 1e-4

    @partial(jax.jit, static_argnums=0)
    def run(adapter, lora, params):
        return Decoder(SPEC, adapter).forward(params, lora, TOKENS).hidden

    bare, fresh = run(None, None, params), run(adapter, lora, params)
    np.testing.assert_allclose(fresh, bare, atol=1e-5 * float(jnp.abs(bare).max()), rtol=0)


def test_not_far_from_the_base():
    """On the demo's base, which has learnt something: a random one forgives less."""
    folder = ASSETS / "base"
    spec = load_spec(folder)
    tokens = np.random.default_rng(0).integers(3, spec.vocab, (8, 24))
    decoder = Decoder(spec)

    @jax.jit
    def logits(params):
        return decoder.logits(params, decoder.forward(params, None, tokens).hidden)

    wide = logits(load_params(folder, spec, jnp.float32))
    error = {}
    for kind in KINDS:
        ours = logits(load_params(folder, spec, jnp.float32, quantize=kind))
        error[kind] = float(jnp.abs(ours - wide).mean() / jnp.abs(wide).mean())
    assert 0.001 < error["int8"] < 0.01 < min(error["int4"], error["nf4"])
    assert max(error.values()) < 0.1


@pytest.mark.parametrize("remat", ["none", "dots", "names", "full"])
def test_nothing_wide_is_kept(small, remat):
    """What the backward pass keeps of the weights is what is stored, not what it is widened to."""
    lora = random_tree(VARIANTS["lora"], SPEC)
    decoder = Decoder(SPEC, VARIANTS["lora"], remat)

    def loss(lora, params):
        return decoder.forward(params, lora, TOKENS).hidden.sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(lora, small["nf4"]))
    # A stack of wide kernels would be [L, D, F] or the like, in floats.
    assert "u8[3,64,192]" in text
    assert "f32[3,128,192]" not in text and "f32[3,192,128]" not in text


@pytest.mark.parametrize(
    ("kind", "mesh"),
    few([("int8", (1, 8, 1)), ("int4", (1, 2, 4)), ("nf4", (2, 2, 2))], ("nf4", (2, 2, 2))),
)
def test_split_over_a_mesh(small, folder, kind, mesh):
    adapter = VARIANTS["dora"]
    lora = random_tree(adapter, SPEC)
    tokens = jnp.arange(64).reshape(8, 8)
    run = jax.jit(lambda params, lora: Decoder(SPEC, adapter).forward(params, lora, tokens).hidden)
    alone = run(small[kind], lora)
    mesh = make_mesh(*mesh)
    wide = shard_tree(mesh, abstract_params(SPEC, jnp.float32))
    params = load_params(folder, SPEC, jnp.float32, wide, quantize=kind)
    expected = shard_tree(mesh, abstract_params(SPEC, jnp.float32, kind))
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert left.sharding.is_equivalent_to(right, left.ndim)
    values = params["blocks"]["mlp"]["up"]["kernel"].values
    assert values.addressable_shards[0].data.size < values.size
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(small[kind]), strict=True):
        np.testing.assert_array_equal(left, right)
    with jax.set_mesh(mesh):
        theirs = run(params, jax.device_put(lora, shard_tree(mesh, lora)))
    np.testing.assert_allclose(theirs, alone, atol=2e-5 * float(jnp.abs(alone).max()), rtol=0)


def test_weights_travel_as_they_are_stored(folder):
    mesh, tokens, sent = make_mesh(1, 8), jnp.arange(512).reshape(8, 64) % 50, {}
    wide = shard_tree(mesh, abstract_params(SPEC, jnp.float32))

    def loss(params, x):
        return Decoder(SPEC).forward(params, None, tokens).hidden.sum() + x

    with jax.set_mesh(mesh):
        for kind in ("none", "int8"):
            params = load_params(folder, SPEC, jnp.float32, wide, quantize=kind)
            text = jax.jit(loss).lower(params, 0.0).compile().as_text()
            sent[kind] = measure(text).collectives["all-gather"].bytes
    assert sent["int8"] < 0.35 * sent["none"]


def test_generation(small):
    params, adapter = small["nf4"], VARIANTS["dora"]
    decoder, lora = Decoder(SPEC, adapter), random_tree(adapter, SPEC)
    lora = adapter.settle(params, jax.tree.map(jnp.asarray, lora))
    prompts = [[5, 6, 7], [9]]
    ours = generate(decoder, params, lora, prompts, Decoding(6), stop_ids=(-1,))
    theirs = generate(decoder, wide_again(params), lora, prompts, Decoding(6), stop_ids=(-1,))
    assert ours == theirs


# --- through the house --------------------------------------------------------------------------


def test_merging_is_refused(small):
    adapter = Lora(4)
    lora = adapter.init(SPEC, jax.random.key(0))
    with pytest.raises(UserError, match=r"model\.quantize: an adapter cannot be merged into a qua"):
        adapter.merge(small["int8"], lora)


def test_settings_that_contradict_each_other():
    with pytest.raises(UserError, match=r"model\.quantize: nf4 weights cannot be trained"):
        load(None, ["model.quantize=nf4", "trainable=full"])
    with pytest.raises(UserError, match=r"generate\.adapter: an adapter cannot be merged into"):
        load(None, ["model.quantize=int8", "generate.adapter=merged"])
    with pytest.raises(UserError, match=r"'fp4' is not among none, int8, int4, nf4"):
        load(None, ["model.quantize=fp4"])
    assert load(None, ["model.quantize=nf4"]).config.model.stored == "bfloat16 nf4"


@pytest.mark.slow
def test_a_run(configure, base, monkeypatch):
    monkeypatch.setattr(bases, "make_mesh", lambda *_: make_mesh(devices=jax.devices()[:1]))
    config = configure("model.quantize=nf4", "train.steps=4", "train.eval_every=2")
    run = setup.prepare(config)
    assert is_quantised(run.frozen.base) and not is_quantised(run.state)
    result = train(config)
    lora, _ = load_peft(result.adapter, load_spec(base))
    assert np.abs(lora["blocks"]["mlp"]["down"]["b"]).max() > 1e-3
    other = configure("model.quantize=none", "train.steps=8")
    with pytest.raises(UserError, match=r"model\.quantize=nf4, now it is none"):
        train(other)
