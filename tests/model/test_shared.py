"""Texts with a common start, computed once, against the same texts as rows of their own.

States, pooled vectors and gradients; a stem with branches, texts end to end, windows that end
within the stem, soft caps; a cache that starts from a shared one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.model.attention import Before, attend, causal, chunks, cut, local, near, softmax
from jaxalign.model.decoder import Decoder
from jaxalign.model.front import Stem
from jaxalign.model.layers import Cache
from jaxalign.model.spec import ModelSpec
from tests.tiny import SPEC

STEM, BRANCHES = 9, (3, 2)  # nodes 1, and 2 and 4 that go on from it
# (the branch or None, own tokens) of each text; two sequences of them.
TEXTS = [[(None, 5), (0, 4), (1, 1), (0, 7)], [(1, 6), (1, 3), (None, 2), (0, 5)]]
SPECS: dict[str, ModelSpec] = {
    "llama": SPEC,
    "windows": dataclasses.replace(
        SPEC, family="gemma2", windows=(6, 0, 6), attn_soft_cap=2.0, norms="around", norm_offset=1.0
    ),
}


def texts(vocab: int) -> tuple[list, np.ndarray, list]:
    """Whole rows, the shared tokens, and each row's own part with what it sees of them."""
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(3, vocab, count)  # noqa: E731
    stem, branches = draw(STEM), [draw(count) for count in BRANCHES]
    rows, parts = [], []
    for sequence in TEXTS:
        parts.append([])
        for branch, count in sequence:
            more = branches[branch] if branch is not None else np.array([], int)
            own = draw(count)
            rows.append(np.concatenate([stem, more, own]))
            bits = 1 | (0 if branch is None else 2 << branch)
            parts[-1].append((own, bits, STEM + len(more)))
    return rows, np.concatenate([stem, *branches]), parts


def flat(vocab: int, length: int) -> dict:
    """What `forward` takes of the texts end to end behind their stem, and where each row is."""
    rows, shared, parts = texts(vocab)
    count = len(shared)
    nodes = np.repeat([1, 2, 4], [STEM, *BRANCHES])
    start = [np.arange(STEM), *(STEM + np.arange(n) for n in BRANCHES)]
    tokens, segments, sees, positions = (np.zeros((2, count + length), np.int32) for _ in range(4))
    index = np.full((len(rows), max(map(len, rows))), -1)
    tokens[:, :count], positions[:, :count] = shared, np.concatenate(start)
    sees[:, :count] = nodes | 1
    where = {node: np.flatnonzero(nodes == node) for node in (1, 2, 4)}
    row = 0
    for sequence, own in enumerate(parts):
        at = count
        for number, (words, bits, first) in enumerate(own, start=1):
            behind = slice(at, at + len(words))
            tokens[sequence, behind], segments[sequence, behind] = words, number
            sees[sequence, behind] = bits
            positions[sequence, behind] = first + np.arange(len(words))
            own_shared = [where[node] for node in (1, 2, 4) if bits & node]
            whole = np.concatenate([*own_shared, np.arange(at, at + len(words))])
            index[row, : len(whole)] = whole
            at, row = at + len(words), row + 1
    return {
        "tokens": jnp.asarray(tokens),
        "segments": jnp.asarray(segments),
        "positions": jnp.asarray(positions),
        "stem": Stem(jnp.asarray(nodes[None]), jnp.asarray(sees)),
        "index": index,
        "rows": rows,
    }


def padded(rows: list) -> np.ndarray:
    return np.stack([np.pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])


@pytest.mark.parametrize("reach", [0, 7])
@pytest.mark.parametrize("name", SPECS)
def test_states_and_gradients_are_those_of_the_rows(name, reach):
    spec = SPECS[name]
    adapter = Lora(4, 8.0, 0.0, ("q", "k", "v", "o", "up", "down", "gate"))
    decoder = Decoder(spec, adapter)
    params = decoder.init(jax.random.key(1))
    lora = adapter.init(spec, jax.random.key(2), params)
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), lora)
    batch = flat(spec.vocab, 17 if reach == 0 else 19)
    index, rows = batch.pop("index"), batch.pop("rows")
    real = index >= 0
    tokens = jnp.asarray(padded(rows))
    mean = real / real.sum(axis=1, keepdims=True)
    places = jnp.asarray(np.maximum(index, 0)).reshape(2, 4, -1)
    # The same weights, of each row over its sequence.
    weights = np.zeros((2, 4, batch["tokens"].shape[1]), np.float32)
    for row, (there, share) in enumerate(zip(index, mean, strict=True)):
        weights[row // 4, row % 4, there[there >= 0]] = share[there >= 0]
    above = jax.random.normal(jax.random.key(4), (*tokens.shape, spec.dim)) * real[..., None]

    def of_rows(lora):
        out = decoder.forward(params, lora, tokens, taps=(0, 2), pool_weights=mean[None])
        return jnp.sum(out.hidden * above) + jnp.sum(out.pooled[2][0]), (out.hidden, out.pooled)

    def of_flat(lora):
        out = decoder.forward(
            params, lora, taps=(0, 2), pool_weights=weights[None], reach=reach, **batch
        )
        hidden = jax.vmap(lambda x, at: x[at])(out.hidden, places).reshape(above.shape)
        pooled = {tap: found.reshape(1, 8, -1) for tap, found in out.pooled.items()}
        return jnp.sum(hidden * above) + jnp.sum(pooled[2][0]), (hidden, pooled)

    (_, (hidden, pooled)), gradient = jax.value_and_grad(of_rows, has_aux=True)(lora)
    (_, (found, means)), slopes = jax.value_and_grad(of_flat, has_aux=True)(lora)
    np.testing.assert_allclose(
        np.asarray(found)[real], np.asarray(hidden)[real], rtol=2e-4, atol=2e-5
    )
    for tap, expected in pooled.items():
        np.testing.assert_allclose(means[tap], expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(slopes), jax.tree.leaves(gradient), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_local_scores_are_those_of_all():
    """Texts of 1 to 6 tokens, a length that is no multiple of the chunk, a window of 3."""
    ids = np.repeat([1, 2, 3, 4, 5], [6, 1, 5, 6, 2])[None]
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, 20, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True)
    )
    place = jnp.arange(20)[None]
    for window in (3, 20):
        mask = causal(20, jnp.asarray(ids)) & near(place, place, window)
        there = local(jnp.asarray(ids), 6) & near(*chunks(place, 6), window)
        assert there.shape == (1, 4, 6, 12)
        np.testing.assert_allclose(
            attend(q, k, v, there), attend(q, k, v, mask), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("reach", [40, 70, 150])
def test_chunks_reach_as_far_as_a_text(reach):
    """Texts of every length up to the longest, several chunks back."""
    counts = [reach, 1, reach - 1, reach // 2, reach, 3]
    ids = jnp.asarray(np.repeat(np.arange(1, 7), counts)[None])
    length = sum(counts)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, length, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True)
    )
    chunk, back = cut(reach)
    assert chunk * back >= reach - 1 and chunk * (back + 1) <= 2 * (reach + 15)
    assert chunk % 16 == 0  # whole tiles of a chip
    there = local(ids, chunk, back)
    assert there.shape[2:] == (chunk, (back + 1) * chunk)
    np.testing.assert_allclose(
        attend(q, k, v, there), attend(q, k, v, causal(length, ids)), rtol=1e-5, atol=1e-6
    )


def test_a_softmax_in_parts_is_that_of_the_whole():
    x = (
        jax.random.normal(jax.random.key(0), (2, 3, 12))
        .at[0, :, 5:]
        .set(jnp.finfo(jnp.float32).min)
    )
    up = jax.random.normal(jax.random.key(1), x.shape)

    def parted(x):
        return jnp.concatenate(softmax([x[..., :5], x[..., 5:], x[..., :0]]), axis=-1)

    whole = jax.vjp(lambda x: jax.nn.softmax(x, axis=-1), x)
    parts = jax.vjp(parted, x)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(parts[1](up)[0], whole[1](up)[0], rtol=1e-5, atol=1e-7)


def test_one_prefix_for_all_rows_is_a_prefix_of_each():
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (
        jax.random.normal(key, (3, 4, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=False)
    )
    more = [jax.random.normal(key, (1, 5, 2, 8)) for key in keys[3:]]
    seen = jnp.ones((1, 4, 5), bool)
    each = [jnp.repeat(x, 3, axis=0) for x in more]
    mask = jnp.concatenate([seen, causal(4)], axis=2)
    whole = [jnp.concatenate(pair, axis=1) for pair in zip(each, (k, v), strict=True)]
    expected = attend(q, *whole, mask)
    for before in (more, each):
        found = attend(q, k, v, causal(4), before=Before(*before, seen))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_a_cache_goes_on_from_a_shared_one(name):
    """Prompt and three more tokens, one by one, of rows of different lengths."""
    spec = SPECS[name]
    decoder = Decoder(spec)
    params = decoder.init(jax.random.key(1))
    shared = np.random.default_rng(0).integers(3, spec.vocab, 8)
    own = np.random.default_rng(1).integers(3, spec.vocab, (3, 7))
    place = jnp.arange(len(shared))[None]
    _, cache = decoder.extend(
        params, None, jnp.asarray(shared[None]), decoder.empty_cache(1, 8, jnp.float32),
        slot=0, positions=place, mask=causal(8), places=place,
    )  # fmt: skip
    assert isinstance(cache, Cache)
    rows = decoder.empty_cache(3, 7, jnp.float32)
    found, at = [], 0
    for count in (4, 1, 1, 1):
        positions = 8 + at + jnp.arange(count)[None]
        mask = causal(7)[:, at : at + count, : at + count] if at == 0 else causal(7)[:, at : at + 1]
        places = 8 + jnp.arange(mask.shape[-1])[None]
        hidden, rows = decoder.extend(
            params, None, jnp.asarray(own[:, at : at + count]), rows, slot=at,
            positions=positions, mask=mask, places=places, shared=cache,
        )  # fmt: skip
        found.append(hidden)
        at += count
    whole = np.concatenate([np.repeat(shared[None], 3, axis=0), own], axis=1)
    expected = decoder.forward(params, None, jnp.asarray(whole)).hidden[:, 8:]
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-5)


class Prefix(Lora):
    """Two more keys and values in front of each block's, next to a LoRA."""

    def per_block(self, params, trained, blocks=None):
        own = super().per_block(params, {"blocks": trained["blocks"]}, blocks)
        prefix = jax.tree.map(lambda x: x[:blocks], trained["prefix"])
        return own | {"attention": own["attention"] | {"prefix": prefix}}


def test_a_trained_prefix_stands_before_the_stem():
    adapter = Prefix(4, 8.0, 0.0, ("q",))
    decoder = Decoder(SPEC, adapter)
    params = decoder.init(jax.random.key(1))
    shape = (SPEC.layers, 2, SPEC.kv_heads, SPEC.head_dim)
    draws = [jax.random.normal(jax.random.key(number), shape) for number in (5, 6)]
    trained = adapter.init(SPEC, jax.random.key(2), params) | {
        "prefix": dict(zip("kv", draws, strict=True))
    }
    batch = flat(SPEC.vocab, 17)
    index, rows = batch.pop("index"), batch.pop("rows")
    real = index >= 0
    expected = decoder.forward(params, trained, jnp.asarray(padded(rows))).hidden
    without = decoder.forward(params, {"blocks": trained["blocks"]} | {"prefix": jax.tree.map(
        lambda x: x[:, :0], trained["prefix"])}, jnp.asarray(padded(rows))).hidden  # fmt: skip
    assert np.abs(expected - without).max() > 0.1
    hidden = decoder.forward(params, trained, **batch).hidden
    places = jnp.asarray(np.maximum(index, 0)).reshape(2, 4, -1)
    found = jax.vmap(lambda x, at: x[at])(hidden, places).reshape(expected.shape)
    np.testing.assert_allclose(
        np.asarray(found)[real], np.asarray(expected)[real], rtol=2e-4, atol=2e-5
    )
