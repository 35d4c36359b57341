"""A config.json from anyone: bounds for every number, a sentence for everything else, no hang."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxalign.errors import UserError
from jaxalign.hf.load import load_spec
from jaxalign.model.spec import FAMILIES, ModelSpec
from tests.model.test_spec import LLAMA31_8B, QWEN25_7B

GEMMA3 = LLAMA31_8B | {
    "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "rope_scaling": None,
    "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
SOUND = {"llama": LLAMA31_8B, "qwen2": QWEN25_7B, "gemma3_text": GEMMA3}
NUMBERS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "intermediate_size", "head_dim", "max_position_embeddings",
)  # fmt: skip
WRONG = (-1, -(10**9), 10**18, 10**5000, "32", 32.0, float("nan"), float("inf"), True,
         [32], {"a": 1}, "")  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_every_number_has_bounds(key, value):
    with pytest.raises(UserError, match=rf"^config\.json: {key} ") as error:
        ModelSpec.from_hf(LLAMA31_8B | {key: value})
    assert len(str(error.value)) < 200


def test_a_billion_layers_are_refused_at_once():
    for family in SOUND:
        with pytest.raises(UserError, match="num_hidden_layers 1000000000 is absurd; models have"):
            ModelSpec.from_hf(SOUND[family] | {"num_hidden_layers": 10**9})


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "tie_word_embeddings", "false"),  # a text: bool() of it is true
        ("llama", "attention_bias", "no"),
        ("llama", "mlp_bias", 1),
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "rms_norm_eps", "1e-5"),
        ("llama", "rms_norm_eps", -1e-5),
        ("llama", "rope_theta", float("inf")),
        ("llama", "rope_theta", -1e4),
        ("llama", "rope_scaling", "linear"),
        ("llama", "rope_scaling", {"rope_type": ["linear"]}),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": float("nan")}),
        ("llama", "eos_token_id", "2"),
        ("llama", "eos_token_id", [2, [3]]),
        ("llama", "eos_token_id", 10**20),
        ("llama", "bos_token_id", [1, 2]),
        ("llama", "pad_token_id", 0.5),
        ("llama", "hidden_act", ["silu"]),
        ("llama", "model_type", ["llama"]),
        ("llama", "model_type", None),
        ("qwen2", "use_sliding_window", "false"),
        ("gemma3_text", "layer_types", 5),
        ("gemma3_text", "layer_types", [["full_attention"]] * 32),
        ("gemma3_text", "sliding_window", "512"),
        ("gemma3_text", "sliding_window_pattern", 0),
        ("gemma3_text", "rope_parameters", [1]),
        ("gemma3_text", "rope_parameters", {"sliding_attention": "x"}),
        ("gemma3_text", "query_pre_attn_scalar", float("nan")),
        ("gemma3_text", "final_logit_softcapping", -30.0),
        ("gemma3_text", "final_logit_softcapping", "30"),
    ],
)
def test_facts_of_the_wrong_kind(family, key, value):
    with pytest.raises(UserError, match=r"^config\.json: ") as error:
        ModelSpec.from_hf(SOUND[family] | {key: value})
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
KEYS = sorted(
    {key for config in SOUND.values() for key in config}
    | {key for row in FAMILIES.values() for key in row.defaults}
    | {"layer_types", "use_bidirectional_attention", "quantization_config", "head_dim"}
)


@settings(max_examples=400, deadline=2000)
@given(
    st.sampled_from(sorted(SOUND)),
    st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3),
)
def test_any_config(family, changes):
    try:
        spec = ModelSpec.from_hf(SOUND[family] | changes)
    except UserError:
        return
    assert ModelSpec.from_hf(spec.to_hf()).layers == spec.layers


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        load_spec(folder)


def test_stop_ids_of_a_damaged_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31_8B))
    for value in ("2", [[2]], {"a": 1}, 1.5):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id should be tok"):
            load_spec(tmp_path)
