"""Draws: their distribution, what narrows it, and what they depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.generate import Decoding, generate
from jaxalign.generate.single import best, draw, nucleus
from jaxalign.model.decoder import Decoder
from tests.hf.conftest import LLAMA, random_params

NEVER = (-1,)
DRAWS = 4000


@pytest.fixture(scope="module")
def model():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf * 0.2), random_params(LLAMA))
    return Decoder(LLAMA), params, None


def by_transformers(logits, rule):
    """transformers' processors in its order, on logits [B, V]."""
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(rule.temperature)(None, torch.tensor(np.asarray(logits)))
    if rule.top_k:
        scores = TopKLogitsWarper(rule.top_k)(None, scores)
    return (TopPLogitsWarper(rule.top_p)(None, scores) if rule.top_p < 1 else scores).numpy()


@pytest.mark.torch
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_the_choice_is_narrowed_as_by_transformers(temperature, top_k, top_p):
    logits = 3 * jax.random.normal(jax.random.key(1), (5, 300))
    if top_k == 500:
        logits = jnp.concatenate([logits, -logits - 1], axis=1)
    rule = Decoding(1, "sample", temperature, top_k, top_p)
    ours = np.asarray(jax.jit(nucleus, static_argnums=1)(logits, rule))
    np.testing.assert_allclose(ours, by_transformers(logits, rule), rtol=1e-5)


def test_draws_have_the_models_distribution(model):
    """First tokens of one prompt in rows of different numbers, against exact probabilities."""
    decoder, params, _ = model
    prompt, decoding = [5, 17, 40], Decoding(1, "sample", temperature=0.8, top_k=12, seed=3)
    hidden = decoder.forward(params, None, np.array([prompt])).hidden
    logits = nucleus(decoder.logits(params, hidden[:, -1]), decoding)
    chance = np.asarray(jax.nn.softmax(logits[0]))
    found = generate(*model, [prompt] * DRAWS, decoding, stop_ids=NEVER, batch_size=DRAWS)
    counts = np.bincount([row[0] for row in found], minlength=LLAMA.vocab)
    assert counts[chance == 0].sum() == 0
    likely = chance * DRAWS > 5
    expected = chance[likely] * DRAWS
    assert likely.sum() > 3
    statistic = ((counts[likely] - expected) ** 2 / expected).sum()
    freedom = likely.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)  # mean and deviations of chi-square


def test_a_row_draws_the_same_in_every_batch(model):
    numbers = np.random.default_rng(2)
    prompts = [numbers.integers(4, LLAMA.vocab, n).tolist() for n in (3, 9, 5, 14, 7, 2)]
    decoding = Decoding(12, "sample", temperature=0.7, top_p=0.95, seed=9)
    whole = generate(*model, prompts, decoding, stop_ids=NEVER, batch_size=8)
    for size in (1, 4):
        assert generate(*model, prompts, decoding, stop_ids=NEVER, batch_size=size) == whole
    some = generate(*model, prompts[3:], decoding, stop_ids=NEVER, numbers=[3, 4, 5])
    assert some == whole[3:]
    assert generate(*model, prompts[3:], decoding, stop_ids=NEVER) != whole[3:]
    other = Decoding(12, "sample", temperature=0.7, top_p=0.95, seed=10)
    assert generate(*model, prompts, other, stop_ids=NEVER, batch_size=8) != whole


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_draw_is_greedy(model, narrow):
    prompts = [[5, 6, 7], [9] * 20]
    greedy = generate(*model, prompts, Decoding(8), stop_ids=NEVER)
    drawn = generate(*model, prompts, Decoding(8, "sample", **narrow), stop_ids=NEVER)
    assert drawn == greedy


def test_places_draw_anew():
    logits = jnp.zeros((1, 1000))
    rule, seed = Decoding(1, "sample").rule, np.uint32(1)
    drawn = [int(draw(logits, jnp.array([4], jnp.uint32), s, seed, rule)[0]) for s in range(20)]
    assert len(set(drawn)) > 15


def test_the_first_of_equal_bests():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [-jnp.inf, -1.0, -5.0, -1.0]])
    assert best(logits).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "method: 'best' should be one of greedy, sample, beam"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 should be 1 or more"),
        ({"temperature": 0.0}, "temperature: 0.0 should be above 0; .* greedy"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k: -1 should be 0 or more"),
        ({"top_p": 0.0}, r"top_p: 0.0 should be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p: 1.5 should be in \(0, 1\]"),
        ({"beams": 0}, "beams: 0 should be 1 or more"),
        ({"length_penalty": float("inf")}, "length_penalty"),
    ],
)
def test_settings_out_of_bounds(settings, message):
    with pytest.raises(UserError, match=message):
        Decoding(**settings)
