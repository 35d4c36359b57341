"""`ModelSpec`: both spellings of config.json, the way back, and what is refused."""

import dataclasses
import subprocess
import sys

import pytest

from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec, RopeScaling, check_tap
from jaxalign.model.spec.tensors import parameter_count

LLAMA31_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}
QWEN25_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def in_transformers_5(config: dict) -> dict:
    """The same facts as transformers 5 writes them."""
    config = dict(config)
    rope = dict(config.pop("rope_scaling", None) or {"rope_type": "default"})
    config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype", "bfloat16")
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if config["model_type"] == "qwen2":
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
        config["sliding_window"] = None
    return config


def test_llama_facts():
    spec = ModelSpec.from_hf(LLAMA31_8B)
    assert (spec.vocab, spec.dim, spec.layers, spec.heads) == (128256, 4096, 32, 32)
    assert (spec.kv_heads, spec.head_dim, spec.ffn) == (8, 128, 14336)
    assert (spec.norm_eps, spec.rope_theta) == (1e-5, 500000.0)
    assert spec.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.tied) == (False,) * 4
    assert spec.eos_ids == (128001, 128008, 128009)
    assert spec.pad_id is None


def test_qwen_has_biases_on_q_k_v_only():
    spec = ModelSpec.from_hf(QWEN25_7B)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, False, False)
    assert spec.eos_ids == (151645,)
    assert spec.rope_scaling is None


@pytest.mark.parametrize("config", [LLAMA31_8B, QWEN25_7B], ids=["llama", "qwen2"])
def test_both_spellings_are_the_same_model(config):
    assert ModelSpec.from_hf(in_transformers_5(config)) == ModelSpec.from_hf(config)


@pytest.mark.parametrize("config", [LLAMA31_8B, QWEN25_7B], ids=["llama", "qwen2"])
def test_both_spellings_in_one_file(config):
    both = config | {"rope_parameters": in_transformers_5(config)["rope_parameters"]}
    assert ModelSpec.from_hf(both) == ModelSpec.from_hf(config)


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        # What model cards say to add for long texts; transformers 5 takes it, not rope_parameters.
        ({"type": "yarn", "factor": 4.0}, "rope type 'yarn' is not supported"),
        (
            {"rope_type": "linear", "factor": 4.0},
            "rope_parameters and rope_scaling differ (rope_parameters gives rope_theta 1000000.0, "
            "rope_type default; rope_scaling gives rope_theta 10000.0, rope_type linear, factor",
        ),
        ({"rope_type": "default"}, "rope_scaling gives rope_theta 10000.0, rope_type default)"),
        ({"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}, "factor 0.5"),
    ],
    ids=["yarn", "linear", "theta", "partial"],
)
def test_two_spellings_that_differ(scaling, sentence):
    with pytest.raises(UserError, match=r"config\.json") as error:
        ModelSpec.from_hf(in_transformers_5(QWEN25_7B) | {"rope_scaling": scaling})
    assert sentence in str(error.value)


@pytest.mark.parametrize("config", [LLAMA31_8B, QWEN25_7B], ids=["llama", "qwen2"])
def test_round_trip(config):
    spec = ModelSpec.from_hf(config)
    assert ModelSpec.from_hf(spec.to_hf()) == spec


def test_old_spelling_of_linear_scaling_and_attention_biases():
    config = LLAMA31_8B | {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "attention_bias": True,
        "mlp_bias": True,
    }
    spec = ModelSpec.from_hf(config)
    assert spec.rope_scaling == RopeScaling("linear", 4.0)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, True, True)
    assert ModelSpec.from_hf(spec.to_hf()) == spec


def test_defaults_of_keys_that_old_configs_lack():
    config = {key: LLAMA31_8B[key] for key in LLAMA31_8B if key != "num_key_value_heads"}
    del config["rope_theta"], config["rope_scaling"]
    spec = ModelSpec.from_hf(config)
    assert (spec.kv_heads, spec.rope_theta) == (32, 10000.0)


def test_parameter_counts_are_the_published_ones():
    assert parameter_count(ModelSpec.from_hf(LLAMA31_8B)) == 8_030_261_248
    assert parameter_count(ModelSpec.from_hf(QWEN25_7B)) == 7_615_616_512


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported; supported: llama, qwen2"),
        ({"model_type": None}, "supported: llama, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu, gelu"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not supported; supported: default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "positive factor, found None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "positive low_freq_factor"),
        ({"hidden_size": "4096"}, "hidden_size should be a positive whole number, found '4096'"),
        ({"vocab_size": None}, "vocab_size should be a positive whole number, found None"),
        ({"num_key_value_heads": 5}, "32 is not a multiple of num_key_value_heads 5"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_refusals(change, sentence):
    with pytest.raises(UserError, match=r"config\.json") as error:
        ModelSpec.from_hf(LLAMA31_8B | change)
    assert sentence in str(error.value)


def test_windows_of_qwen2():
    config = QWEN25_7B | {"use_sliding_window": True, "max_window_layers": 26}
    spec = ModelSpec.from_hf(config)
    assert spec.windows == (0,) * 26 + (131072,) * 2
    assert ModelSpec.from_hf(spec.to_hf()) == spec
    assert ModelSpec.from_hf(config | {"max_window_layers": 28}).windows == ()
    types = ["full_attention", "sliding_attention"] * 14
    spec = ModelSpec.from_hf(config | {"layer_types": types})
    assert spec.windows == (0, 131072) * 14
    assert ModelSpec.from_hf(spec.to_hf()) == spec


def test_windows_that_llama_has_not():
    types = ["full_attention"] * 31 + ["sliding_attention"]
    with pytest.raises(UserError, match="is not supported in the llama family"):
        ModelSpec.from_hf(LLAMA31_8B | {"layer_types": types, "sliding_window": 8})
    with pytest.raises(UserError, match="no sliding_window is used"):
        ModelSpec.from_hf(QWEN25_7B | {"layer_types": types[-28:]})


def test_taps():
    spec = dataclasses.replace(ModelSpec.from_hf(LLAMA31_8B), layers=4)
    assert [check_tap(spec, layer) for layer in (0, 1, 4)] == [0, 1, 4]
    for layer in (-1, 5):
        with pytest.raises(UserError, match=rf"align.layer={layer} is outside this model of 4"):
            check_tap(spec, layer)
    with pytest.raises(UserError, match=r"probe\.layer=9"):
        check_tap(spec, 9, key="probe.layer")


def test_spec_and_names_import_without_jax():
    code = "import sys, jaxalign.model.spec.tensors; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
