"""The real PEFT on prefixes and soft prompts, both ways, on bases with grouped queries."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import KINDS, Prefix
from jaxalign.checksums import SUMS
from jaxalign.errors import UserError
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


@pytest.mark.parametrize(("kind", "options"), [
    ("prefix", {"init_weights": "zero"}),
    ("prompt", {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Answer:",
                "tokenizer_name_or_path": "gpt2", "tokenizer_kwargs": {"use_fast": True}}),
])  # fmt: skip
def test_how_they_began_says_nothing_of_what_they_are(tmp_path, base, kind, options):
    from peft import PeftType, get_peft_config

    adapter = KINDS[kind].parse(base[1], num_virtual_tokens=P)
    save_peft(tmp_path, random_tree(adapter, base), base[1], adapter)
    (tmp_path / SUMS).unlink()
    written = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    config = get_peft_config(written | options)
    assert config.peft_type == PeftType(adapter.peft_type)
    config.save_pretrained(tmp_path)
    assert load_peft(tmp_path, base[1])[1] == adapter
    for field in dataclasses.fields(config):
        content = written | {field.name: ["x"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(content), "utf-8")
        try:
            load_peft(tmp_path, base[1])
        except UserError as refused:
            assert "may change what the weights mean" not in str(refused), field.name
