"""The real PEFT on prefixes and soft prompts, both ways, on bases with grouped queries."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import KINDS, Prefix
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.model.decoder import Decoder
from tests.hf.families import family_model
from tests.hf.test_peft_variants import one_thread  # noqa: F401

pytestmark = pytest.mark.torch
P = 5
TOKENS = np.arange(80).reshape(2, 40)
# Heads wider than the model shared among them; windows and scaled embeddings; windows by config.
FAMILIES = ("llama", "gemma2", pytest.param("mistral", marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    """(family, spec, parameters) of a model that transformers wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    family_model(request.param).save_pretrained(folder)
    spec = load_spec(folder)
    assert spec.kv_heads < spec.heads
    return request.param, spec, load_params(folder, spec, jnp.float32)


def ours(base, adapter, trained):
    _, spec, params = base
    decoder = Decoder(spec, adapter)
    run = jax.jit(lambda tree: decoder.logits(params, decoder.forward(params, tree, TOKENS).hidden))
    return np.asarray(run(trained))


def theirs(model):
    import torch

    with torch.no_grad():
        logits = model.eval()(torch.tensor(TOKENS)).logits
    return logits[:, -TOKENS.shape[1] :].numpy()


def random_tree(adapter, base):
    _, spec, params = base
    fresh = adapter.init(spec, jax.random.key(0), params)
    draws = np.random.default_rng(0)
    return jax.tree.map(lambda x: draws.standard_normal(x.shape).astype(np.float32), fresh)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_peft_runs_what_we_write(tmp_path, base, kind):
    from peft import PeftModel

    adapter = KINDS[kind].parse(base[1], num_virtual_tokens=P)
    trained = random_tree(adapter, base)
    save_peft(tmp_path, trained, base[1], adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as PEFT warns of missing keys
        wrapped = PeftModel.from_pretrained(family_model(base[0]), tmp_path)
    mine, logits = ours(base, adapter, trained), theirs(wrapped)
    np.testing.assert_allclose(mine, logits, atol=1e-4 * np.abs(logits).max(), rtol=0)
    assert np.abs(mine - ours(base, None, None)).max() > 1e-2
    again, found = load_peft(tmp_path, base[1])
    assert found == adapter
    jax.tree.map(np.testing.assert_array_equal, again, trained)


@pytest.mark.parametrize("kind", ["prefix", "projected", "prompt"])
def test_we_run_what_peft_writes(tmp_path, base, kind):
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    config = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    more = {"prefix_projection": True} if kind == "projected" else {}
    asked = config(task_type="CAUSAL_LM", num_virtual_tokens=P, **more)
    model = get_peft_model(family_model(base[0]), asked)
    model.save_pretrained(tmp_path)
    trained, adapter = load_peft(tmp_path, base[1])
    assert adapter.num_virtual_tokens == P and isinstance(adapter, Prefix) == (kind != "prompt")
    logits = theirs(model)
    mine = ours(base, adapter, trained)
    np.testing.assert_allclose(mine, logits, atol=1e-4 * np.abs(logits).max(), rtol=0)
