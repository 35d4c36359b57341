"""Virtual tokens stand in front of a text as words would: made of words, they give the same.

A soft prompt that is the embeddings of some tokens, and a prefix that is their keys and values, in
every layout of rows: states, pooled vectors, gradients of what is trained.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import Pool, Prefix, Prompt
from jaxalign.model.attention import causal
from jaxalign.model.decoder import Decoder
from jaxalign.objectives import FINAL, TOKENS, Tap
from jaxalign.train.phases.build import Phase
from jaxalign.train.phases.walk import Pass
from tests.model.test_shared import SPECS, flat, padded

P = 3
WORDS = np.array([11, 5, 700])  # what stands in front


def of_words(kind, decoder, params, words=WORDS):
    """The adapter whose virtual tokens are these words, and its tree."""
    spec, place = decoder.spec, jnp.arange(P)[None]
    if kind == "prompt":
        return Prompt(P), {"prompt": params["embed"][words] * spec.embed_scale}
    if kind == "pool":  # one prompt
        pool = {"keys": params["embed"][:1], "prompts": params["embed"][words][None]}
        return Pool(P, 1), {"pool": pool}
    cache = decoder.empty_cache(1, P, jnp.float32)
    _, cache = decoder.extend(
        params, None, words[None], cache, slot=0, positions=place, mask=causal(P), places=place
    )
    both = {"k": cache.keys, "v": cache.values}
    own = {name: x[:, 0].swapaxes(1, 2) for name, x in both.items()}  # [L, P, K, H]
    return Prefix(P), {"blocks": {"attention": {"prefix": own}}}


def model(kind, name):
    spec = SPECS[name]
    plain = Decoder(spec)
    params = plain.init(jax.random.key(1))
    adapter, trained = of_words(kind, plain, params)
    return plain, Decoder(spec, adapter), params, trained


@pytest.mark.parametrize(
    ("kind", "name"),
    [("prefix", "llama"), ("prefix", "windows"), ("prompt", "windows"), ("pool", "llama")],
)
def test_words_in_front(kind, name):
    """Padded rows: whole states, pooled ones, a pass that stops, and nothing of the vectors."""
    plain, decoder, params, trained = model(kind, name)
    tokens = np.random.default_rng(0).integers(3, plain.spec.vocab, (2, 9))
    longer = np.concatenate([np.repeat(WORDS[None], 2, axis=0), tokens], axis=1)
    weights = jnp.full((1, 2, 9), 1 / 9).at[:, 1, 6:].set(0)
    behind = jnp.pad(weights, ((0, 0), (0, 0), (P, 0)))
    whole = plain.forward(params, None, longer, taps=(2,), pool_weights=behind, whole=(0, 1))
    found = decoder.forward(params, trained, tokens, taps=(2,), pool_weights=weights, whole=(0, 1))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)  # noqa: E731
    close(found.hidden, whole.hidden[:, P:])
    close(found.pooled[2], whole.pooled[2])
    for layer, states in found.whole.items():
        close(states, whole.whole[layer][:, P:])
    early = decoder.forward(params, trained, tokens, taps=(2,), pool_weights=weights, stop=2)
    assert early.hidden is None
    close(early.pooled[2], whole.pooled[2])
    states = decoder.forward(params, trained, tokens, taps=(1,), sows="states").pooled[1]
    assert states.shape[1] == 9
    # Without what is trained it is the base.
    np.testing.assert_array_equal(
        decoder.forward(params, None, tokens).hidden, plain.forward(params, None, tokens).hidden
    )


@pytest.mark.parametrize(
    ("kind", "name", "layout"),
    [
        ("prefix", "windows", "local"),
        pytest.param("prefix", "llama", "packed", marks=pytest.mark.slow),
        pytest.param("prompt", "windows", "local", marks=pytest.mark.slow),
        ("prompt", "windows", "stem"),
        ("prompt", "llama", "packed"),
    ],
)
def test_words_in_front_of_shared_sequences(kind, name, layout):
    """Texts that share a sequence, or its start, see the same as each by itself; slopes too."""
    _, decoder, params, trained = model(kind, name)
    batch = flat(decoder.spec.vocab, 17)
    index, rows = batch.pop("index"), batch.pop("rows")
    if layout == "packed":  # texts end to end, nothing in common
        batch = {name: x for name, x in packed(rows).items() if name != "index"}
        index = packed(rows)["index"]
    reach = 7 if layout == "local" else 0
    real = index >= 0
    places = jnp.asarray(np.maximum(index, 0)).reshape(2, 4, -1)
    tokens = jnp.asarray(padded(rows))
    above = jax.random.normal(jax.random.key(4), (*tokens.shape, decoder.spec.dim))
    above = above * real[..., None]

    def of_rows(trained):
        hidden = decoder.forward(params, trained, tokens).hidden
        return jnp.sum(hidden * above), hidden

    def of_sequences(trained):
        hidden = decoder.forward(params, trained, reach=reach, **batch).hidden
        hidden = jax.vmap(lambda x, at: x[at])(hidden, places).reshape(above.shape)
        return jnp.sum(hidden * above), hidden

    (_, hidden), gradient = jax.value_and_grad(of_rows, has_aux=True)(trained)
    (_, found), slopes = jax.value_and_grad(of_sequences, has_aux=True)(trained)
    np.testing.assert_allclose(
        np.asarray(found)[real], np.asarray(hidden)[real], rtol=2e-4, atol=2e-5
    )
    for ours, theirs in zip(jax.tree.leaves(slopes), jax.tree.leaves(gradient), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def packed(rows):
    """The rows in two sequences of four, and where each is."""
    length = max(sum(map(len, rows[:4])), sum(map(len, rows[4:]))) + 2
    tokens, segments, positions = (np.zeros((2, length), np.int32) for _ in range(3))
    index = np.full((len(rows), max(map(len, rows))), -1)
    for sequence in range(2):
        at = 0
        for number, row in enumerate(rows[4 * sequence : 4 * sequence + 4], start=1):
            here = slice(at, at + len(row))
            tokens[sequence, here], segments[sequence, here] = row, number
            positions[sequence, here] = np.arange(len(row))
            index[4 * sequence + number - 1, : len(row)] = np.arange(at, at + len(row))
            at += len(row)
    return {"tokens": tokens, "segments": segments, "positions": positions, "index": index}


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_gradients_of_rows_are_summed_in_float32(kind):
    """Of many equal rows in bfloat16: as often what one row gives, rounded once."""
    _, decoder, params, trained = model(kind, "llama")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    @partial(jax.jit, static_argnums=1)
    def slope(tree, rows):
        tokens = jnp.broadcast_to(jnp.arange(6), (rows, 6))
        run = lambda t: jnp.sum(decoder.forward(params, t, tokens).hidden.astype(jnp.float32))  # noqa: E731
        return jax.grad(run)(tree)

    one, many = slope(trained, 1), slope(trained, 63)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert np.linalg.norm(63 * a - b) < 3e-4 * np.linalg.norm(b)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "pool"])
def test_no_virtual_tokens_are_the_base(kind):
    plain = Decoder(SPECS["llama"])
    params = plain.init(jax.random.key(1))
    adapter = {"prefix": Prefix(0), "prompt": Prompt(0), "pool": Pool(0)}[kind]
    trained = adapter.init(plain.spec, jax.random.key(0), params)
    tokens = np.arange(10).reshape(2, 5)
    np.testing.assert_allclose(
        Decoder(plain.spec, adapter).forward(params, trained, tokens).hidden,
        plain.forward(params, None, tokens).hidden,
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


# --- the pool -------------------------------------------------------------------------------------


def pool_of(size=5, seed=0):
    spec = SPECS["llama"]
    params = Decoder(spec).init(jax.random.key(1))
    adapter = Pool(P, size, 0.2)
    return adapter, params, adapter.init(spec, jax.random.key(seed), params)


def test_a_pool_is_what_numpy_says():
    adapter, params, trained = pool_of()
    tokens = np.random.default_rng(0).integers(3, 900, (3, 7))
    asked = np.arange(7) < np.array([7, 4, 1])[:, None]
    x = np.asarray(params["embed"])[tokens].astype(np.float64)
    keys, prompts = (np.asarray(trained["pool"][n], np.float64) for n in ("keys", "prompts"))
    expected = []
    for row, own in zip(x, asked, strict=True):
        query = row[own].mean(axis=0)
        cosines = keys @ query / np.linalg.norm(keys, axis=1) / np.linalg.norm(query)
        shares = np.exp(cosines / 0.2)
        expected.append(np.tensordot(shares / shares.sum(), prompts, 1))
    found = adapter.prompt(trained, params["embed"][tokens], jnp.asarray(asked))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_a_pool_does_not_matter():
    adapter, params, trained = pool_of()
    turned = jax.tree.map(lambda x: x[jnp.array([3, 0, 4, 1, 2])], trained)
    tokens = np.arange(12).reshape(2, 6)
    run = lambda tree: Decoder(SPECS["llama"], adapter).forward(params, tree, tokens).hidden  # noqa: E731
    np.testing.assert_allclose(run(turned), run(trained), rtol=1e-5, atol=1e-6)


def test_one_prompt_is_a_soft_prompt():
    adapter, params, trained = pool_of(1)
    tokens = np.arange(12).reshape(2, 6)
    soft = {"prompt": trained["pool"]["prompts"][0]}
    np.testing.assert_allclose(
        Decoder(SPECS["llama"], adapter).forward(params, trained, tokens).hidden,
        Decoder(SPECS["llama"], Prompt(P)).forward(params, soft, tokens).hidden,
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


def test_keys_and_prompts_have_a_gradient():
    """Also where a row of the batch is empty."""
    adapter, params, trained = pool_of()
    decoder = Decoder(SPECS["llama"], adapter)
    tokens = np.arange(12).reshape(2, 6)
    asked = np.array([[1, 1, 1, 0, 0, 0], [0] * 6])

    def loss(tree):
        return jnp.sum(jnp.sin(decoder.forward(params, tree, tokens, asked=asked).hidden))

    for leaf in jax.tree.leaves(jax.grad(loss)(trained)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6


# --- what it costs --------------------------------------------------------------------------------


def test_least_work():
    """Vectors are tokens; keys and values are products with each token, and two more slopes."""
    spec, task = SPECS["llama"], Tap(FINAL, TOKENS)
    phase = Phase(None, (), (Pass(("text",), (task,), answers=("text",)),))
    of = partial(phase.least_flops, spec, 4, answers={"text": 8})
    plain = of(10, adapter=0)
    assert of(10, adapter=Prompt(P).multiplied(spec), vectors=P) == of(10 + P, adapter=0)
    pairs = P * spec.heads * spec.head_dim * spec.layers  # of a token, its scores and its mixture
    assert of(10, adapter=Prefix(P).multiplied(spec)) - plain == 40 * 12 * pairs
    laid = phase.least_flops(spec, 1, 40, 0, {"text": 8}, seen=10, vectors=P)
    assert laid == phase.least_flops(spec, 1, 40 + P, 0, {"text": 8}, seen=10 + 2 * P)
    scores = 40 * 6 * spec.layers * spec.heads * spec.head_dim * 10  # no weight is in them
    assert (of(10, adapter=0, whole=True) - scores) / (plain - scores) == pytest.approx(1.5)
