"""Files of every family: there and back by the bit, and what transformers reads into a config."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.hf.load import fingerprint, load_params, load_spec
from jaxalign.hf.save import save_base
from jaxalign.model.spec import FAMILIES, ModelSpec
from jaxalign.model.spec.tensors import base_rows, get_leaf, parameter_count, sizes
from tests.hf.conftest import LLAMA, assert_same_tree, random_params
from tests.hf.families import EACH, MODELS, family_model

# As published on the hub (transformers 4), without keys that say nothing of the model.
PUBLISHED = {
    "Qwen/Qwen3-8B": {
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "mistralai/Mistral-7B-v0.1": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "google/gemma-2-2b": {
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "google/gemma-3-1b-it": {
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
    "allenai/OLMo-2-1124-7B": {
        "attention_bias": False,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
}
GEMMA3_1B = PUBLISHED["google/gemma-3-1b-it"]
# Of LLAMA with its random weights, as the first release told it.
FINGERPRINT = "8e25b963ce21d19c64aea300a9ba457fd746e18ab9e915274515f864501023a5"
# What no config.json lacks.
MINIMAL = {
    "vocab_size": 96,
    "hidden_size": 512,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}


def in_transformers_5(config: dict) -> dict:
    """What the installed transformers writes after it read this."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config).to_dict()


# --- files --------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize("name", MODELS)
def test_out_of_transformers_and_back(tmp_path, name, shards):
    import torch
    from transformers import AutoModelForCausalLM

    model = family_model(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if shards == "many" else "1GB")
    spec = load_spec(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", spec, jnp.float32)
    assert parameter_count(spec) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameter_count(spec) == sum(weight.numel() for weight in model.parameters())
    limit = 30_000 if shards == "many" else 1 << 30
    save_base(tmp_path / "ours", params, spec, max_shard_bytes=limit)
    for folder in ("theirs", "ours"):
        files = list((tmp_path / folder).glob("*.safetensors"))
        assert (len(files) > 1) == (shards == "many")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto", attn_implementation="eager"
    )
    assert not any(report.values()), report
    weights, expected = again.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], weight) for key, weight in expected.items())
    # Equal weights could still be run with other facts: compare outputs, past every window.
    tokens = torch.arange(4, 64).reshape(1, 60)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert load_spec(tmp_path / "ours") == spec
    assert_same_tree(params, load_params(tmp_path / "ours", spec, jnp.float32))


@pytest.mark.torch
@pytest.mark.parametrize("name", EACH)
def test_every_tensor_is_where_its_row_says(tmp_path, name):
    model = family_model(name)
    model.save_pretrained(tmp_path)
    spec = load_spec(tmp_path)
    params = load_params(tmp_path, spec, jnp.float32)
    theirs = model.state_dict()
    for row in base_rows(spec):
        leaf = np.asarray(get_leaf(params, row.path))
        for layer in range(spec.layers if row.stacked else 1):
            back = row.to_hf(leaf[layer] if row.stacked else leaf, sizes(spec))
            np.testing.assert_array_equal(back, theirs[row.name(layer)].numpy())


def test_new_facts_leave_old_fingerprints_alone(tmp_path, edit_json):
    """A run of before there were other families resumes on the base that it knew."""
    save_base(tmp_path / "m", random_params(LLAMA), LLAMA)
    assert fingerprint(tmp_path / "m") == FINGERPRINT
    gemma = load_spec_of(family_model("gemma2"), tmp_path / "g")
    first = fingerprint(tmp_path / "g")
    edit_json(tmp_path / "g" / "config.json", final_logit_softcapping=gemma.logit_soft_cap + 1)
    assert fingerprint(tmp_path / "g") != first


def load_spec_of(model, folder):
    model.save_pretrained(folder)
    return load_spec(folder)


# --- config.json --------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_the_same_in_both_spellings(name):
    spec = ModelSpec.from_hf(PUBLISHED[name])
    assert ModelSpec.from_hf(in_transformers_5(PUBLISHED[name])) == spec
    assert ModelSpec.from_hf(spec.to_hf()) == spec
    assert ModelSpec.from_hf(in_transformers_5(spec.to_hf())) == spec
    assert json.loads(json.dumps(spec.to_hf())) == spec.to_hf()


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_transformers_assumes(family):
    config = MINIMAL | {"model_type": family}
    if family.startswith("qwen"):  # transformers' own default, 32, is more than this model's 8
        config |= {"num_key_value_heads": 8}
    theirs = ModelSpec.from_hf(in_transformers_5(config))
    if family == "llama":  # ids of a tokenizer that a file without them does not have
        theirs = dataclasses.replace(theirs, bos_id=None, eos_ids=())
    assert ModelSpec.from_hf(config) == theirs


def test_facts_of_the_published():
    qwen = ModelSpec.from_hf(PUBLISHED["Qwen/Qwen3-8B"])
    assert (qwen.qk_norm, qwen.windows, qwen.qkv_bias) == ("head", (), False)
    mistral = ModelSpec.from_hf(PUBLISHED["mistralai/Mistral-7B-v0.1"])
    assert mistral.windows == (4096,) * 32
    gemma = ModelSpec.from_hf(PUBLISHED["google/gemma-2-2b"])
    assert gemma.tied  # though the file does not say so
    assert gemma.windows == (4096, 0) * 13
    assert (gemma.attn_soft_cap, gemma.logit_soft_cap, gemma.embed_scale) == (50.0, 30.0, 48.0)
    assert gemma.score_scale == 1 / 16
    gemma = ModelSpec.from_hf(GEMMA3_1B)
    assert gemma.windows == (512, 512, 512, 512, 512, 0) * 4 + (512, 512)
    assert (gemma.rope(512), gemma.rope(0)) == ((1e4, None), (1e6, None))
    olmo = ModelSpec.from_hf(PUBLISHED["allenai/OLMo-2-1124-7B"])
    assert (olmo.norms, olmo.qk_norm, olmo.head_dim) == ("after", "whole", 128)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("google/gemma-2-2b", 2_614_341_888),
        ("google/gemma-3-1b-it", 999_885_952),
        ("allenai/OLMo-2-1124-7B", 7_298_617_344),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    assert parameter_count(ModelSpec.from_hf(PUBLISHED[name])) == published


def test_windows_of_qwen():
    config = PUBLISHED["Qwen/Qwen3-8B"] | {"num_hidden_layers": 4, "sliding_window": 64}
    assert ModelSpec.from_hf(config).windows == ()
    config |= {"use_sliding_window": True, "max_window_layers": 3}
    spec = ModelSpec.from_hf(config)
    assert spec.windows == (0, 0, 0, 64)
    assert ModelSpec.from_hf(spec.to_hf()) == spec
    config |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    spec = ModelSpec.from_hf(config)
    assert spec.windows == (64, 0, 64, 0)
    assert ModelSpec.from_hf(spec.to_hf()) == spec


@pytest.mark.parametrize("windows", [(), (512,) * 6, (0, 512) * 3, (512, 0) * 3, (512, 512, 0) * 2])
def test_patterns_of_gemma_3(windows):
    types = ["sliding_attention" if w else "full_attention" for w in windows or (0,) * 6]
    config = GEMMA3_1B | {"num_hidden_layers": 6, "layer_types": types}
    spec = ModelSpec.from_hf(config)
    assert spec.windows == windows
    written = spec.to_hf()
    assert ModelSpec.from_hf(written) == spec
    if "sliding_window_pattern" in written:  # what older releases would make of it
        del written["layer_types"]
        assert ModelSpec.from_hf(written) == spec
    else:
        assert windows == (0, 512) * 3


def test_gemma_3_stretches_only_layers_that_see_everything():
    scaling = {"rope_type": "linear", "factor": 8.0}
    spec = ModelSpec.from_hf(GEMMA3_1B | {"rope_scaling": scaling})
    assert spec.rope(0)[1].factor == 8.0
    assert spec.rope(512) == (1e4, None)


SLIDING = ["sliding_attention"]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("google/gemma-2-2b", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not"),
        ("google/gemma-2-2b", {"sliding_window": "4096"}, "sliding_window should be a positive"),
        ("google/gemma-2-2b", {"sliding_window": None}, "but no sliding_window is used"),
        ("google/gemma-2-2b", {"layer_types": SLIDING}, "for each of the 26 layers"),
        ("google/gemma-2-2b", {"layer_types": ["chunked_attention"] * 26}, "layer_types should"),
        ("google/gemma-2-2b", {"query_pre_attn_scalar": None}, "a positive query_pre_attn_scalar"),
        ("google/gemma-3-1b-it", {"use_bidirectional_attention": True}, "sees only those before"),
        (
            "google/gemma-3-1b-it",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "rope type 'linear' is not supported; supported: default",
        ),
        ("mistralai/Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "mistral family"),
        ("allenai/OLMo-2-1124-7B", {"layer_types": SLIDING * 32}, "olmo2 family"),
        ("Qwen/Qwen3-8B", {"layer_types": SLIDING * 36}, "but no sliding_window is used"),
        ("Qwen/Qwen3-8B", {"model_type": "qwen3_moe"}, "(its layers choose among experts"),
        ("Qwen/Qwen3-8B", {"model_type": "phi3"}, "(its q, k and v are one tensor"),
        ("Qwen/Qwen3-8B", {"model_type": "gemma3"}, "save its text part"),
    ],
)
def test_refusals(name, change, sentence):
    with pytest.raises(UserError, match=r"config\.json") as error:
        ModelSpec.from_hf(PUBLISHED[name] | change)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.torch
def test_the_way_out_for_gemma_3_with_images(tmp_path):
    """What the refusal points to gives a folder that loads, with the weights of the text part."""
    import torch
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    text = family_model("gemma3").config
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="save its text part"):
        load_spec(tmp_path / "whole")
    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype="auto")
    part = Gemma3ForCausalLM(whole.config.text_config).to(whole.dtype)
    part.model.load_state_dict(whole.model.language_model.state_dict())
    part.save_pretrained(tmp_path / "text")
    spec = load_spec(tmp_path / "text")
    params = load_params(tmp_path / "text", spec, jnp.float32)
    theirs = whole.model.language_model.embed_tokens.weight
    assert torch.equal(torch.tensor(np.asarray(params["embed"])), theirs)
