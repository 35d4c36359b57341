"""Generation behind virtual tokens: a cache starts behind them, and every token stays the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import Pool
from jaxalign.errors import UserError
from jaxalign.generate import Decoding, generate
from jaxalign.model.decoder import Decoder
from tests.generate.test_greedy import NEVER, scaled
from tests.generate.test_shared import METHODS, SETTINGS, SPECS, prompts, started  # noqa: F401
from tests.hf.conftest import random_params
from tests.model.test_virtual import WORDS, P, of_words


@pytest.mark.parametrize(
    ("kind", "name", "method"),
    [
        ("prefix", "gemma3", "greedy"),
        pytest.param("prompt", "gemma3", "greedy", marks=pytest.mark.slow),
        pytest.param("prompt", "llama", "beam", marks=pytest.mark.slow),
    ],
)
def test_words_in_front(prompts, started, kind, name, method):  # noqa: F811
    """With a shared start and without one, as the base behind the same words."""
    spec = SPECS[name]
    params = scaled(random_params(spec), 0.2)
    words = WORDS % spec.vocab
    adapter, trained = of_words(kind, Decoder(spec), params, words)
    decoder, decoding = Decoder(spec, adapter), METHODS[method]
    prompts = prompts[:4] * 2
    longer = [[*words, *prompt] for prompt in prompts]
    expected = generate(Decoder(spec), params, None, longer, decoding, **SETTINGS)
    started.clear()
    found = generate(decoder, params, trained, prompts, decoding, **SETTINGS)
    assert started[0] == (1, 96)  # the vectors of what is shared are in front of it, once
    assert found == expected
    if kind == "prompt" and method == "greedy":
        own = generate(decoder, params, trained, prompts, decoding, **SETTINGS, share_prefix=False)
        assert own == expected
    assert len({tuple(answer) for answer in expected}) > 2


def test_a_pool_is_asked_by_the_prompt_alone(prompts, started):  # noqa: F811
    """Cached tokens are those of one pass over prompt and answer; no start is shared."""
    spec = SPECS["llama"]
    params = scaled(random_params(spec), 0.2)
    adapter = Pool(P, 6)
    trained = adapter.init(spec, jax.random.key(0), params)
    decoder = Decoder(spec, adapter)
    prompts = [prompt[60:] for prompt in prompts[:4]]
    answers = generate(decoder, params, trained, prompts, Decoding(40), **SETTINGS)
    assert [shape[0] for shape in started] == [4]
    width = max(map(len, prompts)) + 40
    tokens, asked = np.zeros((4, width), int), np.zeros((4, width), bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : len(prompt) + 40], asked[row, : len(prompt)] = [*prompt, *answer], True

    @jax.jit
    def run(asked):
        return decoder.logits(
            params, decoder.forward(params, trained, tokens, asked=asked).hidden
        ).argmax(-1)

    best = np.asarray(run(jnp.asarray(asked)))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert best[row, len(prompt) - 1 :][:40].tolist() == answer
    shares = adapter.shares(trained, jnp.asarray(params["embed"])[tokens], jnp.asarray(asked))
    assert np.abs(shares[0] - shares[1]).max() > 0.01


def test_positions_are_counted():
    spec = SPECS["llama"]
    params = scaled(random_params(spec), 0.2)
    decoder = Decoder(spec, Pool(P, 2))
    trained = decoder.adapter.init(spec, jax.random.key(0), params)
    with pytest.raises(UserError, match="max_new_tokens=4, behind the adapter's 3, passes the"):
        generate(decoder, params, trained, [[5] * 250], Decoding(4), stop_ids=NEVER)
