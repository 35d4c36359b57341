"""Every family writes what transformers writes, past its windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.generate import Decoding, generate
from jaxalign.hf.peft import save_peft
from jaxalign.model.decoder import Decoder
from tests.generate.test_transformers import BEAM, NEW, by_transformers
from tests.hf.conftest import TARGETS, random_lora
from tests.hf.families import EACH, MODELS, WINDOW, saved

ADAPTER = Lora(4, 8.0, 0.1, TARGETS)
LENGTHS = (30, 12, 9, 3)
NEVER = (-1, -2)
# A random model whose head is its embeddings repeats the last token for ever.
UNTIED = tuple(f"{name}_untied" if f"{name}_untied" in MODELS else name for name in EACH)


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """transformers' model with an adapter, ours, prompts and their greedy answers."""
    from peft import PeftModel

    folder = tmp_path_factory.mktemp(request.param)
    model, spec, params = saved(request.param, folder / "base")
    lora = jax.tree.map(lambda leaf: jnp.asarray(leaf * 0.1), random_lora(spec))
    save_peft(folder / "adapter", lora, spec, ADAPTER)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    numbers = np.random.default_rng(list(MODELS).index(request.param))
    prompts = [numbers.integers(4, spec.vocab, length).tolist() for length in LENGTHS]
    return model, (Decoder(spec, ADAPTER), params, lora), prompts


def decode(ours, prompts, decoding):
    """The answers."""
    return generate(*ours, prompts, decoding, stop_ids=NEVER, batch_size=4)


def models(*fast: str, slow: tuple[str, ...]):
    """The models to test with; the `slow` ones only where slow tests are asked for."""
    later = [pytest.param(name, marks=pytest.mark.slow) for name in slow if name not in fast]
    return pytest.mark.parametrize("pair", [*fast, *later], indirect=True)


@pytest.mark.torch
@models("gemma3_untied", slow=UNTIED)
def test_greedy(pair):
    model, ours, prompts = pair
    expected = by_transformers(model, prompts, ())
    assert max(LENGTHS) > WINDOW > min(LENGTHS) and NEW > 2 * WINDOW
    assert len({token for answer in expected for token in answer}) > 20
    assert decode(ours, prompts, Decoding(NEW)) == expected


@pytest.mark.torch
@models(slow=("gemma2_untied", "gemma3_untied", "olmo2"))
def test_beam(pair):
    model, ours, prompts = pair
    expected = by_transformers(model, prompts, (), **BEAM)
    assert decode(ours, prompts, Decoding(NEW, "beam")) == expected


@pytest.mark.torch
@models(slow=("gemma3_untied",))
def test_a_longer_cache_keeps_the_windows(pair):
    """Slots behind a padded prompt, in a cache that grows: windows count tokens, not slots."""
    _, (decoder, params, lora), prompts = pair
    answers = decode((decoder, params, lora), prompts, Decoding(60))
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows])
    logits = decoder.logits(params, decoder.forward(params, lora, tokens).hidden)
    for row, prompt, answer in zip(logits, prompts, answers, strict=True):
        best = np.asarray(row).argmax(-1)[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
        assert best.tolist() == answer
