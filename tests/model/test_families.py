"""Every family equals transformers in every layer; what sets it apart holds wherever it runs."""

import copy
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.peft import adapter_rows
from jaxalign.data.batch import NO_TARGET, TaskBatch
from jaxalign.hf.peft import load_peft
from jaxalign.model.attention import attend, causal, near
from jaxalign.model.decoder import Decoder
from jaxalign.model.layers import rms_norm
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import base_rows, get_leaf, sizes
from jaxalign.objectives import bind, chunked, language_model
from jaxalign.sharding import make_mesh, shard_tree
from jaxalign.train.phases.build import Term, build, full_weights, phase_loss
from jaxalign.train.state import Frozen
from tests.hf.conftest import LLAMA, random_params
from tests.hf.families import (
    EACH,
    LAYERS,
    LENGTHS,
    MODELS,
    WINDOW,
    family_config,
    models,
    saved,
    texts,
)

# Of the largest number of a layer. Float32 sums of 32 to 64 products in another order, through
# four layers; the largest error measured over all families is written in docs/families.md.
TERM = Term("task", bind(language_model, "language_model", {}, "options", {}, {}))
BOUND = 1e-5
ALL = tuple(range(LAYERS + 1))


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """(transformers' model, our spec, our parameters)."""
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def wrapped(model, folder):
    """The model with a random adapter that peft made, and the same of ours."""
    import torch
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
    theirs = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.12)
    theirs.save_pretrained(folder / "adapter")
    return theirs.eval(), folder / "adapter"


def by_transformers(model, tokens, real):
    """Output of every layer [L+1, B, T, D] before any final norm, and logits [B, T, V]."""
    import torch

    kept = {}
    last = next(m for n, m in model.named_modules() if n.endswith(f"layers.{LAYERS - 1}"))
    hook = last.register_forward_hook(
        lambda *io: kept.update(last=io[2][0] if isinstance(io[2], tuple) else io[2])
    )
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(real.astype(int)),
            output_hidden_states=True,
        )
    hook.remove()
    layers = [*out.hidden_states[:LAYERS], kept["last"].reshape(out.hidden_states[0].shape)]
    return np.stack([layer.numpy() for layer in layers]), out.logits.numpy()


def by_us(decoder, tokens, **options):
    """What gives the same of ours for (params, lora)."""

    @jax.jit
    def run(params, lora):
        out = decoder.forward(params, lora, tokens, taps=ALL, sows="states", **options)
        return jnp.stack([out.pooled[tap] for tap in ALL]), decoder.logits(params, out.hidden)

    return lambda params, lora: [np.asarray(x) for x in run(params, lora)]


def assert_close(ours, theirs, what):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < BOUND, f"{what}: {error:.1e} of the largest number"


@pytest.mark.torch
@models(*EACH, slow=tuple(MODELS))
def test_every_layer_and_the_logits(pair, tmp_path):
    model, spec, params = pair
    adapted, folder = wrapped(model, tmp_path)
    lora, adapter = load_peft(folder, spec)
    tokens, real = texts()
    run = by_us(Decoder(spec, adapter), tokens)
    nothing = jax.tree.map(np.zeros_like, lora)
    found = []
    for what, theirs, ours in (("base", model, nothing), ("adapter", adapted, lora)):
        wanted, logits = by_transformers(theirs, tokens, real)
        states, our_logits = run(params, ours)
        for layer in ALL:
            assert_close(states[layer][real], wanted[layer][real], f"{what}, layer {layer}")
        assert_close(our_logits[real], logits[real], f"{what}, logits")
        found.append(logits[real])
    assert np.abs(found[0] - found[1]).max() > 0.1 * np.abs(found[0]).max()


# A fact, a model that has it, and its value in a family without it.
FACTS = [
    ("windows", "qwen2_window", ()),
    ("windows", "mistral", ()),
    ("windows", "gemma2", (0, WINDOW, 0, WINDOW)),
    ("windows", "gemma3", ()),
    ("local_rope_theta", "gemma3", 0.0),
    ("rope_scaling", "gemma3", None),
    ("attn_soft_cap", "gemma2", 0.0),
    ("logit_soft_cap", "gemma2", 0.0),
    ("embed_scale", "gemma2", 1.0),
    ("query_scalar", "gemma2", 0.0),
    ("norm_offset", "gemma2", 0.0),
    ("activation", "gemma2", "silu"),
    ("qk_norm", "qwen3", "none"),
    ("qk_norm", "olmo2", "none"),
]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fact", "pair", "without"),
    FACTS,
    indirect=["pair"],
    ids=[f"{fact}-{name}" for fact, name, _ in FACTS],
)
def test_every_fact_matters(pair, fact, without):
    """Parity says nothing of a fact that these models do not feel."""
    _, spec, params = pair
    assert getattr(spec, fact) != without
    other = dataclasses.replace(spec, **{fact: without})
    tokens, real = texts()
    logits = [
        np.asarray(d.logits(params, d.forward(params, None, tokens).hidden))[real]
        for d in (Decoder(spec), Decoder(other))
    ]
    assert np.abs(logits[0] - logits[1]).max() > 1000 * BOUND * np.abs(logits[0]).max()


@pytest.mark.torch
@models("gemma3", slow=("qwen2_window", "mistral", "gemma2"))
def test_a_window_is_so_many_tokens(pair):
    """A token changes the states of the next WINDOW - 1 in its layer and of no other."""
    _, spec, params = pair
    windowed = next(i for i, window in enumerate(spec.windows) if window)
    one = dataclasses.replace(spec, layers=1, windows=(spec.windows[windowed],))
    part = params | {"blocks": jax.tree.map(lambda w: w[windowed : windowed + 1], params["blocks"])}
    tokens, _ = texts()
    other = tokens[:1].copy()
    other[0, 10] = 4 + (tokens[0, 10] - 3) % 90
    a, b = (
        np.asarray(Decoder(one).forward(part, None, x, taps=(1,), sows="states").pooled[1][0])
        for x in (tokens[:1], other)
    )
    changed = np.flatnonzero(np.abs(a - b).max(axis=-1) > 0)
    assert changed.tolist() == list(range(10, 10 + WINDOW))


@pytest.mark.torch
@models("gemma3", slow=EACH)
def test_packed_segments_equal_rows_of_their_own(pair):
    _, spec, params = pair
    tokens, _ = texts()
    rows = [tokens[row, :length] for row, length in enumerate(LENGTHS)]
    packed = np.concatenate([*rows, np.zeros(4, int)])[None]
    segments = np.repeat([1, 2, 3, 0], [*LENGTHS, 4])[None]
    positions = np.concatenate([np.arange(n) for n in (*LENGTHS, 4)])[None]
    decoder = Decoder(spec)
    together = by_us(decoder, packed, segments=segments, positions=positions)
    whole, logits = together(params, None)
    alone, alone_logits = by_us(decoder, tokens)(params, None)
    start = 0
    for row, length in enumerate(LENGTHS):
        place = slice(start, start + length)
        assert_close(whole[:, 0, place], alone[:, row, :length], f"segment {row}")
        assert_close(logits[0, place], alone_logits[row, :length], f"logits of segment {row}")
        start += length


@pytest.mark.torch
@models(slow=("gemma3",))
def test_a_tap_is_pooled_and_nothing_above_it_runs(pair):
    _, spec, params = pair
    tokens, real = texts()
    weights = (real / real.sum(1, keepdims=True)).astype(np.float32)[None]
    states, _ = by_us(Decoder(spec), tokens)(params, None)
    upper = jax.tree.map(lambda w: w.at[2:].set(np.nan), params["blocks"])
    broken = params | {"blocks": upper}
    out = Decoder(spec).forward(broken, None, tokens, stop=2, taps=(0, 1, 2), pool_weights=weights)
    for tap in (0, 1, 2):
        mean = np.einsum("PBT,BTD->PBD", weights, states[tap])
        np.testing.assert_allclose(out.pooled[tap], mean, atol=BOUND * np.abs(mean).max())


# --- gradients ----------------------------------------------------------------------------------


def task_rows():
    """A batch that trains every second real token, and the labels that torch wants."""
    tokens, real = texts(1)
    labels = np.where(real & (np.arange(tokens.shape[1]) % 2 == 1), tokens, NO_TARGET)
    shifted = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], NO_TARGET)], axis=1)
    place = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return TaskBatch(tokens, real.astype(int), place, place, shifted), labels


def loss_of_torch(model, batch, labels):
    import torch

    model.zero_grad()
    loss = model(
        input_ids=torch.tensor(batch.tokens),
        attention_mask=torch.tensor(batch.segments),
        labels=torch.tensor(labels),
    ).loss
    loss.backward()
    return loss.item()


def assert_gradient(row, leaf, theirs, spec, size):
    """Layer by layer, against the largest number of this kind of tensor."""
    layers = range(spec.layers if row.stacked else 1)
    wanted = [theirs[row.name(layer)] for layer in layers]
    largest = max(np.abs(gradient).max() for gradient in wanted)
    assert largest > 0, row.path
    for layer, gradient in zip(layers, wanted, strict=True):
        ours = row.to_hf(np.asarray(leaf[layer] if row.stacked else leaf), size)
        # Backward sums run over the batch's 68 tokens besides.
        error = np.abs(ours - gradient).max() / largest
        assert error < 5 * BOUND, f"{row.name(layer)}: {error:.1e} of the largest number"


@pytest.mark.torch
@models("gemma2", slow=EACH)
def test_gradients_of_all_weights(pair, monkeypatch):
    model, spec, params = pair
    monkeypatch.setattr(chunked, "CPU_LOGITS", 8 * len(LENGTHS) * spec.vocab)  # 8 of 40 columns
    batch, labels = task_rows()
    decoder = Decoder(spec, remat="full", train_base=True)
    phase = build(decoder, (TERM,), weights=full_weights(jnp.float32))
    step = jax.jit(jax.value_and_grad(lambda p: phase_loss(phase, p, None, batch, None)[0]))
    loss, gradient = step(params)
    assert loss == pytest.approx(loss_of_torch(model, batch, labels), rel=1e-5)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for row in base_rows(spec):
        assert_gradient(row, get_leaf(gradient, row.path), theirs, spec, sizes(spec))


@pytest.mark.torch
@models("qwen3", slow=EACH)
def test_gradients_of_an_adapter(pair, tmp_path):
    model, spec, params = pair
    theirs, folder = wrapped(model, tmp_path)
    lora, adapter = load_peft(folder, spec)
    batch, labels = task_rows()
    phase = build(Decoder(spec, adapter), (TERM,))
    step = jax.jit(
        jax.value_and_grad(lambda lora: phase_loss(phase, lora, Frozen(params), batch, None)[0])
    )
    loss, gradient = step(jax.tree.map(jnp.asarray, lora))
    assert loss == pytest.approx(loss_of_torch(theirs, batch, labels), rel=1e-5)
    named = {
        name.replace(".default", ""): p.grad.numpy()
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    for target in adapter.targets:
        for row in adapter_rows(target):
            leaf = get_leaf(gradient, row.path)
            assert_gradient(row, leaf, named, spec, sizes(spec, adapter.r))


# --- the rest of the house ----------------------------------------------------------------------


@pytest.mark.torch
@models(slow=("gemma3", "olmo2"))
def test_a_mesh_gives_the_same_states(pair):
    _, spec, params = pair
    tokens, _ = texts()
    tokens = np.concatenate([tokens] * 3)[:8]
    states, logits = by_us(Decoder(spec), tokens)(params, None)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        there = jax.device_put(params, shard_tree(mesh, params))
        ours, our_logits = by_us(Decoder(spec), tokens)(there, None)
    assert_close(ours, states, "states")
    assert_close(our_logits, logits, "logits")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("qwen3", "qwen3.modeling_qwen3.Qwen3RMSNorm"),
        ("gemma2", "gemma2.modeling_gemma2.Gemma2RMSNorm"),
        ("gemma3", "gemma3.modeling_gemma3.Gemma3RMSNorm"),
        ("olmo2", "olmo2.modeling_olmo2.Olmo2RMSNorm"),
    ],
)
def test_norms_round_as_transformers_do(name, module, tmp_path):
    """In bfloat16 it shows whether the scale multiplies before or after the cast back."""
    import torch

    path, _, kind = module.rpartition(".")
    theirs = getattr(importlib.import_module(f"transformers.models.{path}"), kind)(64, eps=1e-6)
    torch.manual_seed(0)
    theirs.to(torch.bfloat16)
    with torch.no_grad():
        theirs.weight.normal_()
        x = torch.randn(200, 64).to(torch.bfloat16)
        wanted = theirs(x).float().numpy()
    spec = dataclasses.replace(saved(name, tmp_path)[1], norm_eps=1e-6)

    def agreement(spec):
        x_ours, scale = (
            jnp.asarray(t.detach().float().numpy(), jnp.bfloat16) for t in (x, theirs.weight)
        )
        return np.mean(np.asarray(rms_norm(x_ours, scale, spec), np.float32) == wanted)

    assert agreement(spec) > 0.999
    assert agreement(dataclasses.replace(spec, wide_norms=not spec.wide_norms)) < 0.9


@pytest.mark.torch
def test_embeddings_are_scaled_by_a_rounded_number(tmp_path):
    import torch

    model, spec, params = saved("gemma3", tmp_path, jnp.bfloat16)
    tokens, _ = texts()
    with torch.no_grad():
        wanted = model.to(torch.bfloat16).model.embed_tokens(torch.tensor(tokens)).float().numpy()
    np.testing.assert_array_equal(
        np.asarray(Decoder(spec).embed(params, tokens), np.float32), wanted
    )


@pytest.mark.parametrize("name", EACH)
def test_a_fresh_model_is_its_table(name):
    """`init` and the name table agree on what a family has."""
    spec = ModelSpec.from_hf(family_config(name).to_dict())
    params = jax.eval_shape(Decoder(spec).init, jax.random.key(0))
    for row in base_rows(spec):
        assert get_leaf(params, row.path).shape == row.shape(sizes(spec)), row.path
    assert len(jax.tree.leaves(params)) == len(base_rows(spec))


@pytest.mark.slow
def test_norms_begin_as_the_identity():
    spec = dataclasses.replace(LLAMA, layers=1, norms="around", norm_offset=1.0)
    params = Decoder(spec).init(jax.random.key(0))
    assert not params["norm"]["scale"].any()
    assert not params["blocks"]["mlp_post_norm"]["scale"].any()


def test_facts_that_change_nothing_leave_no_trace():
    """A window as long as the text is no window: the program is Llama's."""
    params = random_params(LLAMA)
    tokens = jnp.zeros((2, 16), int)

    def text(spec):
        run = Decoder(spec).forward
        return str(jax.make_jaxpr(lambda p: run(p, None, tokens).hidden)(params))

    plain = text(LLAMA)
    assert text(dataclasses.replace(LLAMA, windows=(16, 0, 16))) == plain
    assert text(dataclasses.replace(LLAMA, windows=(15, 0, 15))) != plain
    assert text(dataclasses.replace(LLAMA, query_scalar=8.0)) == plain  # H, which it is anyway
    assert "tanh" not in plain


def test_places_that_windows_need():
    spec = dataclasses.replace(LLAMA, windows=(2, 2, 2))
    params, decoder = random_params(spec), Decoder(spec)
    with pytest.raises(ValueError, match="need the places of the keys"):
        decoder.extend(
            params,
            None,
            jnp.zeros((1, 4), int),
            decoder.empty_cache(1, 4, jnp.float32),
            slot=0,
            positions=jnp.arange(4)[None],
            mask=causal(4),
        )


def test_near_counts_the_token_itself():
    place = jnp.arange(5)[None]
    seen = causal(5) & near(place, place, 2)
    assert seen[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_attention_equals_its_definition():
    numbers = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(numbers.standard_normal((2, 6, heads, 8)), jnp.float32) for heads in (4, 2, 2)
    )
    ours = attend(q, k, v, causal(6), "reference", scale=0.7)
    scores = np.einsum("BTKGH,BSKH->BKGTS", q.reshape(2, 6, 2, 2, 8), k) * 0.7
    scores = np.where(causal(6)[0], scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(2, 6, 4, 8)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
