"""DoRA: the paper's formula, the same gradients as PEFT's, and the normal way through a run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign.adapters import Dora, dora
from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.frozen.projection import Projection
from jaxalign.generate import Decoding, generate
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.model.decoder import Decoder
from jaxalign.sharding import make_mesh, shard_tree
from jaxalign.train import setup
from jaxalign.train.loop import train
from tests.adapters.variants import EVERYWHERE, LAYERS, VARIANTS, random_tree
from tests.hf.conftest import LLAMA, hf_model

DORA = VARIANTS["dora"]


def by_numpy(x, mask, kernel, bias, a, b, m):
    """Liu et al. 2024, eq. 5, and PEFT's dropout: the base's own part is not dropped."""
    scale = DORA.scale
    flat, update = kernel.reshape(12, 10), a.reshape(12, 4) @ b.reshape(4, 10)
    gain = m.ravel() / np.linalg.norm(flat + scale * update, axis=0)
    x, dropped = x.reshape(-1, 12), (x if mask is None else x * mask).reshape(-1, 12)
    changed = (gain - 1) * (dropped @ flat) + gain * scale * (dropped @ update)
    return (x @ flat + bias.ravel() + changed).reshape(2, 2, 5)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_papers_formula(drops, dtype, monkeypatch):
    numbers = np.random.default_rng(0)

    def draw(*shape):
        return numbers.standard_normal(shape).astype(dtype).astype(np.float64)

    kernel, bias, x = draw(3, 4, 2, 5), draw(2, 5), draw(2, 3, 4)
    a, b, m = draw(3, 4, 4), draw(4, 2, 5), 2 + np.abs(draw(2, 5))
    mask = 2 * numbers.integers(0, 2, x.shape) if drops else None
    factors = {"a": a[None], "b": b[None], "m": m[None]}
    factors = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), factors)
    kernels = jnp.asarray(kernel[None], dtype)
    gain = dora.gains(kernels, factors, np.float32([DORA.scale]), 2)[0]
    own = {"a": factors["a"][0], "b": factors["b"][0], "gain": gain}
    q, x = Projection(kernels[0], jnp.asarray(bias, dtype), inputs=2), jnp.asarray(x, dtype)
    if drops:
        monkeypatch.setattr("jaxalign.adapters.lora.drop", lambda x, rate, key: x * mask)
    ours = DORA.project(x, {"q": q(x)}, {"q": q}, {"q": own}, None)["q"]
    assert ours.dtype == dtype
    expected = by_numpy(np.float64(x), mask, kernel, bias, a, b, m)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(
        ours.astype(jnp.float32), expected, atol=tolerance * np.abs(expected).max(), rtol=0
    )


def test_magnitudes_begin_as_the_bases_columns():
    params = Decoder(LLAMA).init(jax.random.key(0))
    lora = DORA.init(LLAMA, jax.random.key(1), params)
    o = np.asarray(params["blocks"]["attention"]["o"]["kernel"])
    np.testing.assert_allclose(
        lora["blocks"]["attention"]["o"]["m"], np.sqrt((o**2).sum((1, 2))), rtol=1e-6
    )
    assert lora["blocks"]["attention"]["k"]["m"].shape == (LAYERS, 2, 8)


def test_a_column_of_zeros_stays_zero():
    kernel = jnp.ones((1, 3, 2)).at[:, :, 1].set(0)
    factors = {"a": jnp.ones((1, 3, 1)), "b": jnp.zeros((1, 1, 2)), "m": dora.lengths(kernel, 1)}
    gain = dora.gains(kernel, factors, np.ones(1, np.float32), 1)
    np.testing.assert_array_equal(gain, [[1, 0]])


def test_lengths_count_as_constants():
    """The gradient of A is what it would be were the length not a function of A."""
    kernel = jax.random.normal(jax.random.key(0), (1, 3, 2))
    factors = {"a": jnp.ones((1, 3, 1)), "b": jnp.ones((1, 1, 2)), "m": jnp.ones((1, 2))}

    def loss(factors):
        return dora.gains(kernel, factors, np.ones(1, np.float32), 1).sum()

    gradient = jax.grad(loss)(factors)
    assert not gradient["a"].any() and not gradient["b"].any() and gradient["m"].all()


def test_early_stops_measure_only_the_blocks_they_run():
    params = Decoder(LLAMA).init(jax.random.key(0))
    lora = random_tree(DORA, LLAMA)
    whole = DORA.per_block(params, lora)
    part = DORA.per_block(params, lora, 2)
    for left, right in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(left, right[:2])
    text = str(jax.make_jaxpr(lambda lora: DORA.per_block(params, lora, 2))(lora))
    assert "length=2" in text and "length=3" not in text


# --- against PEFT -------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", ["qwen2_tied", pytest.param("llama3_scaled", marks=pytest.mark.slow)]
)
def test_gradients_are_pefts(tmp_path, name):
    import torch
    from peft import PeftModel

    model = hf_model(name)
    model.save_pretrained(tmp_path / "base")
    spec = load_spec(tmp_path / "base")
    lora = random_tree(DORA, spec)
    save_peft(tmp_path / "a", lora, spec, DORA)
    wrapped = PeftModel.from_pretrained(model, tmp_path / "a", is_trainable=True).train()
    torch.set_num_threads(1)  # they wait for each other longer than such products take
    tokens = torch.arange(24).reshape(2, 12)
    logits = wrapped(tokens).logits
    torch.sin(logits).mean().backward()
    params = load_params(tmp_path / "base", spec, jnp.float32)
    decoder = Decoder(spec, DORA)

    def loss(lora):
        out = decoder.logits(params, decoder.forward(params, lora, tokens.numpy()).hidden)
        return jnp.sin(out).mean(), out

    (_, ours), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)
    theirs = logits.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)
    layers = wrapped.base_model.model.model.layers
    compared = 0
    for part, sites in gradient["blocks"].items():
        for target, factors in sites.items():
            for block in range(LAYERS):
                module = getattr(layers[block], {"attention": "self_attn", "mlp": "mlp"}[part])
                module = getattr(module, f"{target}_proj")
                a, b, m = (factors[key][block] for key in "abm")
                for left, right in (
                    (a.reshape(-1, 4).T, module.lora_A["default"].weight.grad),
                    (b.reshape(4, -1).T, module.lora_B["default"].weight.grad),
                    (m.ravel(), module.lora_magnitude_vector["default"].weight.grad),
                ):
                    right = right.numpy()
                    assert np.abs(right).max() > 0
                    np.testing.assert_allclose(
                        left, right, atol=2e-5 * np.abs(right).max(), rtol=1e-4
                    )
                    compared += 1
    assert compared == 7 * LAYERS * 3


# --- through the house --------------------------------------------------------------------------


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(bases, "make_mesh", lambda *_: make_mesh(devices=jax.devices()[:1]))


def test_trained_and_written(configure, base, one_device, capsys):
    result = train(configure("lora.variant=dora", "train.steps=3", "train.eval_every=0"))
    spec = load_spec(base)
    lora, adapter = load_peft(result.adapter, spec)
    assert adapter == Dora(4, 16.0, 0.1)
    start = adapter.init(spec, jax.random.key(0), load_params(base, spec, jnp.float32))
    moved = lora["blocks"]["mlp"]["up"]["m"] - start["blocks"]["mlp"]["up"]["m"]
    assert 1e-3 < np.abs(moved).max() < 0.2  # magnitudes are trained, from the base's on
    assert "vLLM refuses DoRA" in capsys.readouterr().out
    other = configure(f"adapter.start={result.adapter}", "lora.dropout=0.1")
    with pytest.raises(UserError, match=r"has dora True, the configuration False"):
        setup.prepare(other)


@pytest.mark.slow
def test_resumed(configure, tmp_path, one_device, monkeypatch):
    whole, parted = (
        configure("lora.variant=dora", "lora.ranks.q=2", f"output={tmp_path / name}")
        for name in ("whole", "parted")
    )
    expected, step, calls = train(whole), setup.TrainStep.__call__, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(setup.TrainStep, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        train(parted)
    monkeypatch.setattr(setup.TrainStep, "__call__", step)
    result = train(parted)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = (Path(run.adapter, name).read_bytes() for run in (result, expected))
        assert ours == theirs
    for words, said in (
        (["lora.variant=lora", "lora.ranks.q=2"], r"lora\.variant=dora, now it is lora"),
        (["lora.variant=dora"], r"lora\.ranks\.q=2, now it is nothing"),
    ):
        with pytest.raises(UserError, match=said):
            train(configure(*words, f"output={parted.output}"))


def test_patterns_go_on_training(configure, base, tmp_path, one_device):
    """Words cannot say which block has which rank; the adapter that is gone on from can."""
    spec = load_spec(base)
    table = EVERYWHERE | {("q", 2): (2, 8.0), ("down", 1): (4, 2.0)}
    del table["o", 3]
    adapter = Lora.of_table(table, spec.layers)
    save_peft(tmp_path / "start", random_tree(adapter, spec, size=0.02), spec, adapter)
    config = configure(f"adapter.start={tmp_path / 'start'}", "lora.alpha=8", "lora.dropout=0.0")
    before, _ = load_peft(tmp_path / "start", spec)
    after, found = load_peft(train(config).adapter, spec)
    assert found == adapter
    assert np.abs(after["blocks"]["attention"]["o"]["a"][:2]).max() > 0
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), before, after)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_split_weights_are_measured_whole(mesh):
    params = Decoder(LLAMA).init(jax.random.key(0))
    adapter = VARIANTS["dora_patterns"]
    lora, tokens = random_tree(adapter, LLAMA), jnp.arange(32).reshape(8, 4)
    run = jax.jit(lambda params, lora: Decoder(LLAMA, adapter).forward(params, lora, tokens).hidden)
    alone = run(params, lora)
    mesh = make_mesh(*mesh)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shard_tree(mesh, params))
        theirs = run(split, jax.device_put(lora, shard_tree(mesh, lora)))
    np.testing.assert_allclose(theirs, alone, atol=1e-5 * float(jnp.abs(alone).max()), rtol=0)


def test_generation():
    """With a cache a prompt is continued as the whole forward pass continues it."""
    params = jax.tree.map(lambda w: w * 8, Decoder(LLAMA).init(jax.random.key(0)))
    adapter = VARIANTS["dora_uneven"]
    lora = jax.tree.map(jnp.asarray, random_tree(adapter, LLAMA, size=0.5))
    decoder = Decoder(LLAMA, adapter)
    (answer,) = generate(
        decoder, params, adapter.settle(params, lora), [[5, 6, 7]], Decoding(8), stop_ids=(-1,)
    )

    @jax.jit
    def following(text):  # [1, T]: what follows each token, whatever stands behind it
        return jnp.argmax(decoder.logits(params, decoder.forward(params, lora, text).hidden), -1)

    text = [5, 6, 7, *answer]
    assert answer == following(jnp.array([text]))[0, 2:-1].tolist()
    (bare,) = generate(Decoder(LLAMA), params, None, [[5, 6, 7]], Decoding(8), stop_ids=(-1,))
    assert bare != answer
