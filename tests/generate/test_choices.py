"""Choices behind a prompt: their log-probabilities are those of whole texts."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalign.adapters import KINDS
from jaxalign.generate import choices as room
from jaxalign.generate import weigh_chunks, weighed
from jaxalign.model.decoder import Decoder
from tests.generate.test_shared import model_of

SHARED = 85
OWN = (9, 1, 30, 4, 17, 2, 40, 12)
CHOICES = (3, 2, 4, 2, 3, 2, 2, 4)  # of each prompt


@pytest.fixture(scope="module")
def asked():
    """Prompts that share their start, and choices of 1 to 5 tokens, some with a common start."""
    draw = np.random.default_rng(2)
    first = draw.integers(3, 90, SHARED).tolist()
    prompts = [first + draw.integers(3, 90, own).tolist() for own in OWN]
    listed = [
        [draw.integers(3, 90, draw.integers(1, 6)).tolist() for _ in range(number)]
        for number in CHOICES
    ]
    listed[0][1] = listed[0][0] + [7]
    return prompts, listed


def chances(model, texts, asking=None):
    """[rows, T, V]: log-probabilities of the next token in whole texts, in one forward pass."""
    decoder, params, lora = model
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    lengths = np.array(asking or [*map(len, texts)]).reshape(-1, 1)

    @jax.jit
    def run(params, lora, tokens):
        asked = jax.numpy.arange(tokens.shape[1]) < lengths
        hidden = decoder.forward(params, lora, tokens, asked=asked).hidden
        return jax.nn.log_softmax(decoder.logits(params, hidden), axis=-1)

    return np.asarray(run(params, lora, tokens))


def by_whole_texts(model, prompts, listed, asking=None):
    """The sum over each choice's tokens, from a pass over prompt and choice.

    Args:
      asking: of each text, how many tokens an adapter's vectors may depend on.
    """
    texts = [p + choice for p, some in zip(prompts, listed, strict=True) for choice in some]
    rows = iter(chances(model, texts, asking))
    return [
        [
            sum(row[len(prompt) - 1 + at, token] for at, token in enumerate(choice))
            for choice, row in ((choice, next(rows)) for choice in some)
        ]
        for prompt, some in zip(prompts, listed, strict=True)
    ]


def close(a, b, tolerance=2e-4):
    assert [len(row) for row in a] == [len(row) for row in b]
    np.testing.assert_allclose(np.concatenate(a), np.concatenate(b), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_choice_has_the_log_probability_of_its_text(name, asked):
    model, (prompts, listed) = model_of(name), asked
    expected = by_whole_texts(model, prompts, listed)
    apart = weighed(*model, prompts, listed, "whole", batch_size=4, share_prefix=False)
    shared = weighed(*model, prompts, listed, "whole", batch_size=4)
    close(apart, expected)
    close(shared, expected)
    assert apart != shared  # computed another way


@pytest.mark.parametrize("kind", ["prefix", "prompt", "pool"])
def test_choices_behind_virtual_tokens(kind, asked):
    """As a pass over prompt and choice has them, in which a pool is asked by the prompt alone."""
    prompts, listed = ([one[60:] for one in asked[0][:4]], asked[1][:4])
    decoder, params, _ = model_of("llama")
    adapter = KINDS[kind](3)
    trained = adapter.init(decoder.spec, jax.random.key(0), params)
    draw = lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape)  # noqa: E731
    model = Decoder(decoder.spec, adapter), params, jax.tree.map(draw, trained)
    asking = [len(p) for p, some in zip(prompts, listed, strict=True) for _ in some]
    expected = by_whole_texts(model, prompts, listed, asking)
    apart = weighed(*model, prompts, listed, "whole", batch_size=2, share_prefix=False)
    shared = weighed(*model, prompts, listed, "whole", batch_size=2)
    close(apart, expected)
    close(shared, expected)
    first = weighed(*model, prompts, [[c[:1] for c in some] for some in listed], "one_of")
    close(first, by_whole_texts(model, prompts, [[c[:1] for c in s] for s in listed], asking))
    base = weighed(Decoder(decoder.spec), params, None, prompts, listed, "whole")
    assert np.abs(np.concatenate(base) - np.concatenate(apart)).max() > 0.01


def test_the_start_is_computed_once_and_each_prompt_once(asked, monkeypatch):
    computed = []
    real = room.Model.extend

    def counted(self, decoder, tokens, *given, **how):
        computed.append(tokens.shape)
        return real(self, decoder, tokens, *given, **how)

    monkeypatch.setattr(room.Model, "extend", counted)
    decoder, params, lora = model_of("llama")
    # Another decoder is another program, so that it is traced here.
    decoder = dataclasses.replace(decoder, remat="full")
    prompts, listed = asked
    weighed(decoder, params, lora, prompts, listed, "whole", batch_size=8)
    most = max(len(tokens) for some in listed for tokens in some)
    # The start, the prompts behind it, and all choices of a prompt in one row.
    assert computed == [(1, 96), (8, 48), (8, max(CHOICES) * (most - 1))]


def test_one_of_a_set_of_tokens(asked):
    decoder, params, lora = model_of("llama")
    prompts, listed = asked
    found = weighed(decoder, params, lora, prompts, listed, "one_of", batch_size=4)
    alone = np.exp(chances((decoder, params, lora), prompts))
    for prompt, some, weights, next_ in zip(prompts, listed, found, alone, strict=True):
        sums = [sum(next_[len(prompt) - 1, token] for token in tokens) for tokens in some]
        np.testing.assert_allclose(np.exp(weights), sums, rtol=2e-4)


def test_missing_rows_are_the_same_bits(asked):
    model, (prompts, listed) = model_of("llama"), asked
    whole = dict(zip(range(8), weighed(*model, prompts, listed, "whole", 2), strict=True))
    again = {}
    for rows, weights in weigh_chunks(*model, prompts, listed, "whole", 2, rows=[1]):
        again |= dict(zip(rows, weights, strict=True))
    assert 1 in again and len(again) < 8
    assert again == {row: whole[row] for row in again}
