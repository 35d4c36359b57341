"""Adapters: bit-equal there and back, the real PEFT agrees, and misfits are named."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxalign.adapters.lora import Lora
from jaxalign.adapters.peft import adapter_rows
from jaxalign.adapters.peft_config import PeftConfig, write_config
from jaxalign.checksums import SUMS
from jaxalign.errors import UserError
from jaxalign.hf.files import read_json
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import load_peft, save_peft, weights_digest
from jaxalign.hf.save import save_base
from jaxalign.sharding import make_mesh, replicated
from tests.adapters.variants import VARIANTS, random_tree
from tests.hf.conftest import (
    LLAMA,
    TARGETS,
    assert_same_tree,
    hf_model,
    random_lora,
    random_params,
)
from tests.parity.golden import find

GOLDEN = find("case.json")
ADAPTER = Lora(r=4, alpha=8.0, dropout=0.1, targets=TARGETS)


@pytest.fixture
def adapter(tmp_path):
    """A sound adapter folder, to spoil."""
    save_peft(tmp_path / "adapter", random_lora(LLAMA), LLAMA, ADAPTER, base_name="some/base")
    return tmp_path / "adapter"


def refusal(folder, spec=LLAMA) -> str:
    with pytest.raises(UserError) as error:
        load_peft(folder, spec)
    assert "\n" not in str(error.value)
    return str(error.value)


def respoil(folder, change):
    (folder / SUMS).unlink(missing_ok=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("targets", [TARGETS, ("q", "v"), ("o", "down")], ids="".join)
@pytest.mark.parametrize("layers", [(), (2,), (1, 3)], ids=str)
def test_there_and_back(tmp_path, targets, layers):
    lora = random_lora(LLAMA, targets=targets, blocks=layers)
    adapter = Lora(4, 8.0, 0.1, targets, layers, rank_stabilised=True)
    save_peft(tmp_path / "a", lora, LLAMA, adapter, base_name="some/base")
    again, found = load_peft(tmp_path / "a", LLAMA)
    assert_same_tree(lora, again)
    assert found == adapter
    save_peft(tmp_path / "b", again, LLAMA, found, base_name="some/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_there_and_back(tmp_path, name):
    adapter = VARIANTS[name]
    lora = random_tree(adapter, LLAMA)
    save_peft(tmp_path / "a", lora, LLAMA, adapter)
    again, found = load_peft(tmp_path / "a", LLAMA)
    assert_same_tree(lora, again)
    assert found == adapter
    save_peft(tmp_path / "b", again, LLAMA, found)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_is_written_of_ranks_and_targets(tmp_path):
    def written(name):
        adapter = VARIANTS[name]
        save_peft(tmp_path / name, random_tree(adapter, LLAMA), LLAMA, adapter)
        return json.loads((tmp_path / name / "adapter_config.json").read_text())

    config = written("patterns")
    assert (config["r"], config["lora_alpha"]) == (6, 8)  # vLLM compares r with its limit
    assert config["target_modules"] == ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    assert config["rank_pattern"] == {
        "q_proj": 2,
        "v_proj": 4,
        "layers.0.self_attn.o_proj": 1,
        "layers.1.self_attn.o_proj": 2,
        "layers.2.self_attn.o_proj": 3,
        "down_proj": 4,
    }
    assert config["alpha_pattern"] == {
        "layers.0.mlp.down_proj": 4,
        "layers.2.mlp.down_proj": 12,
    }
    config = written("uneven")
    assert config["layers_to_transform"] is None
    assert config["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "down_proj",
    ]
    tensors = load_file(tmp_path / "uneven" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 6
    stem = "base_model.model.model.layers.1.mlp.gate_proj"
    assert tensors[f"{stem}.lora_B.weight"].shape == (48, 3)


def test_only_the_chosen_layers_are_stored(tmp_path):
    lora = random_lora(LLAMA, targets=("q",))
    save_peft(tmp_path / "a", lora, LLAMA, Lora(4, targets=("q",), layers=(2,)))
    names = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    assert names == {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1]


def test_every_layer_named_is_every_layer(tmp_path):
    everywhere = dataclasses.replace(ADAPTER, layers=(1, 2, 3))
    save_peft(tmp_path / "a", random_lora(LLAMA), LLAMA, everywhere, base_name="some/base")
    assert load_peft(tmp_path / "a", LLAMA)[1] == ADAPTER
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["layers_to_transform"] is None
    assert config["lora_alpha"] == 8
    assert isinstance(config["lora_alpha"], int)  # PEFT and vLLM type it as a whole number


def test_arrays_on_a_mesh_and_texts(tmp_path):
    lora = random_lora(LLAMA)
    on_mesh = jax.device_put(lora, replicated(make_mesh()))
    texts = {"README.md": "# card ✓\n"}
    save_peft(tmp_path / "a", on_mesh, LLAMA, ADAPTER, texts=texts)
    assert_same_tree(lora, load_peft(tmp_path / "a", LLAMA)[0])
    assert (tmp_path / "a" / "README.md").read_text(encoding="utf-8") == "# card ✓\n"


def test_the_caller_must_say_what_the_tree_holds(tmp_path):
    lora = random_lora(LLAMA)
    with pytest.raises(ValueError, match="more than the targets"):
        save_peft(tmp_path / "a", lora, LLAMA, Lora(4, targets=("q", "v")))
    with pytest.raises(ValueError, match=r"blocks/attention/q/a is \(3, 32, 4\)"):
        save_peft(tmp_path / "a", lora, LLAMA, Lora(8))
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(not GOLDEN, reason="no golden cases here")
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_adapters(tmp_path, name):
    folder = GOLDEN[name].parent
    spec = load_spec(folder / "model")
    lora, adapter = load_peft(folder / "adapter", spec)
    assert adapter == Lora(r=8, alpha=16.0, dropout=0.0, targets=TARGETS)
    save_peft(tmp_path / "a", lora, spec, adapter)
    theirs = load_file(folder / "adapter" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)


# --- the real PEFT ------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["standard", "rank_stabilised"])
@pytest.mark.parametrize("layers", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["llama3_scaled", "qwen2_tied"])
def test_peft_loads_ours(tmp_path, name, layers, rank_stabilised):
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    model = hf_model(name)
    model.save_pretrained(tmp_path / "base")
    spec = load_spec(tmp_path / "base")
    lora = random_lora(spec, blocks=layers)
    adapter = Lora(4, 8.0, 0.1, TARGETS, layers, rank_stabilised)
    save_peft(tmp_path / "a", lora, spec, adapter)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")

    tokens = torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        before = model(tokens).logits
    wrapped = PeftModel.from_pretrained(model, tmp_path / "a")
    report = wrapped.load_adapter(tmp_path / "a", adapter_name="again")
    assert report.unexpected_keys == []
    assert [key for key in report.missing_keys if "lora_" in key and ".again." in key] == []
    in_peft = get_peft_model_state_dict(wrapped)
    assert in_peft.keys() == stored.keys()
    for key, tensor in stored.items():
        np.testing.assert_array_equal(in_peft[key].numpy(), tensor, err_msg=key)
    # An adapter under names nobody looks up loads as zeros: it must change the output, and by
    # exactly the update the factors say.
    with torch.no_grad():
        assert (wrapped(tokens).logits - before).abs().max() > 1e-3
    projection = wrapped.base_model.model.model.layers[1].self_attn.o_proj
    a, b = (lora["blocks"]["attention"]["o"][key][1] for key in "ab")
    delta = adapter.scale * np.einsum("NHR,RD->DNH", a, b).reshape(spec.dim, -1)
    np.testing.assert_allclose(projection.get_delta_weight("default").numpy(), delta, atol=1e-5)


@pytest.mark.torch
def test_ours_loads_what_peft_saves(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    model = hf_model("qwen2_untied")
    model.save_pretrained(tmp_path / "base")
    spec = load_spec(tmp_path / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=0.25,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[0, 2],
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "theirs")
    lora, adapter = load_peft(tmp_path / "theirs", spec)
    assert adapter == Lora(4, 12.0, 0.25, ("q", "down"), (1, 3), rank_stabilised=True)
    save_peft(tmp_path / "ours", lora, spec, adapter)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert not lora["blocks"]["mlp"]["down"]["b"][1].any()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_variants(adapter, edit_json, key, value):
    edit_json(adapter / "adapter_config.json", **{key: value})
    assert f"adapter_config.json: {key}={value!r} " in refusal(adapter)


def test_other_methods_and_bad_ranks(adapter, edit_json):
    edit_json(adapter / "adapter_config.json", peft_type="P_TUNING")
    assert "peft_type 'P_TUNING'" in refusal(adapter)
    edit_json(adapter / "adapter_config.json", peft_type="LORA", r="8")
    assert "found '8'" in refusal(adapter)
    edit_json(adapter / "adapter_config.json", r=16)
    assert "has shape [4, 32], but rank 16" in refusal(adapter)


def test_missing_and_pickled_files(adapter, tmp_path):
    (adapter / SUMS).unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin: pickled" in refusal(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "holds neither adapter_model.safetensors" in refusal(adapter)
    save_base(tmp_path / "base", random_params(LLAMA), LLAMA)
    assert "adapter_config.json: " in refusal(tmp_path / "base")


def test_another_base(adapter):
    wider = dataclasses.replace(LLAMA, dim=64)
    assert "another base or rank" in refusal(adapter, wider)
    shallower = dataclasses.replace(LLAMA, layers=2)
    assert "layer 2 (from 0)" in refusal(adapter, shallower)
    deeper = dataclasses.replace(LLAMA, layers=4)
    assert "takes in model.layers.3.self_attn.q_proj" in refusal(adapter, deeper)


def test_unknown_module(adapter):
    name = "base_model.model.lm_head.lora_A.weight"
    respoil(adapter, lambda tensors: tensors.update({name: np.ones((4, 32), np.float32)}))
    assert f"tensor {name} " in refusal(adapter)
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in refusal(adapter)


@pytest.mark.parametrize("factor", [0, 1], ids=["a", "b"])
def test_missing_factor(adapter, factor):
    name = adapter_rows("v")[factor].name(1)
    respoil(adapter, lambda tensors: tensors.pop(name))
    assert f"tensor {name} is missing" in refusal(adapter)


def test_tensors_and_configuration_disagree(adapter, edit_json):
    config = adapter / "adapter_config.json"

    def drop(tensors):
        for name in [name for name in tensors if "up_proj" in name]:
            del tensors[name]

    respoil(adapter, drop)
    missing = "takes in model.layers.0.mlp.up_proj"
    assert missing in refusal(adapter)
    edit_json(config, target_modules="all-linear")
    assert missing in refusal(adapter)
    edit_json(config, target_modules=r".*_proj", exclude_modules=["mlp.up_proj"])
    assert "up" not in load_peft(adapter, LLAMA)[1].targets
    edit_json(config, target_modules=["q_proj"], exclude_modules=None)
    assert "leaves out model.layers.0.self_attn.k_proj" in (refusal(adapter))
    named = [f"{name}_proj" for name in TARGETS if name != "up"]
    edit_json(config, target_modules=named, layers_to_transform=[0, 1])
    leaves_out = "layers_to_transform=[0, 1] leaves out model.layers.2.self_attn.q_proj"
    assert leaves_out in refusal(adapter)
    respoil(adapter, lambda tensors: tensors.clear())
    assert "no tensors" in refusal(adapter)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target_modules", None, "target_modules should be a list of modules, a pattern or all-l"),
        ("target_modules", "(q_proj", "target_modules: '(q_proj' is not a regular expression"),
        ("rank_pattern", {"(q": 2}, "rank_pattern: '(q' is not a regular expression"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] should be a positive whole number"),
        ("alpha_pattern", {"q_proj": "2"}, "alpha_pattern['q_proj'] should be a number, found '2'"),
        ("alpha_pattern", [2], "alpha_pattern should map modules to numbers, found [2]"),
        ("lora_alpha", True, "lora_alpha should be a number, found True"),
    ],
)
def test_configurations_that_say_nothing(adapter, edit_json, key, value, said):
    edit_json(adapter / "adapter_config.json", **{key: value})
    assert said in refusal(adapter)


def test_a_pattern_and_a_list_of_layers(adapter, edit_json):
    edit_json(adapter / "adapter_config.json", target_modules=".*", layers_to_transform=[0])
    assert "layers_to_transform" in refusal(adapter)


def test_ranks_that_the_tensors_do_not_have(adapter, edit_json):
    edit_json(adapter / "adapter_config.json", rank_pattern={"q_proj": 2})
    assert "q_proj.lora_A.weight has shape [4, 32], but rank 2" in (refusal(adapter))


def test_magnitudes(tmp_path, edit_json):
    dora = VARIANTS["dora"]
    save_peft(tmp_path / "a", random_tree(dora, LLAMA), LLAMA, dora)
    edit_json(tmp_path / "a" / "adapter_config.json", use_dora=False)
    assert "use_dora is not set" in refusal(tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", use_dora=True)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"
    respoil(tmp_path / "a", lambda tensors: tensors.pop(name))
    assert f"tensor {name} is missing" in (refusal(tmp_path / "a"))


def test_numbers_beyond_a_rank_are_a_bug_of_the_caller(tmp_path):
    adapter = VARIANTS["patterns"]
    lora = random_tree(adapter, LLAMA)
    lora["blocks"]["attention"]["q"]["a"][0, 0, -1] = 1
    with pytest.raises(ValueError, match=r"blocks/attention/q/a .* rank 2"):
        save_peft(tmp_path / "a", lora, LLAMA, adapter)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(adapter, value):
    name = adapter_rows("q")[1].name(0)

    def poison(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][0, 0] = value

    respoil(adapter, poison)
    assert f"tensor {name} holds NaN" in refusal(adapter)


def test_truncated(adapter):
    (adapter / SUMS).unlink()
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert refusal(adapter).startswith(f"{file}: cut short")


# --- files from anyone ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("lora_alpha", 0),
        ("lora_alpha", "16"),
        ("lora_dropout", "0.1"),
        ("lora_dropout", float("nan")),
        ("lora_dropout", 1.5),
        ("lora_dropout", [0.1]),
        ("r", 10**9),
        ("r", 10**4000),
        ("r", 4.0),
        ("r", True),
        ("use_dora", "false"),
        ("use_rslora", 1),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0, "1"]),
        ("layers_to_transform", -1),
        ("layers_to_transform", {"0": 1}),
        ("layers_pattern", 5),
        ("layers_pattern", "(layers"),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [["q_proj"]]),
        ("target_modules", "(a+)+$"),
        ("target_modules", ".*" * 30),
        ("target_modules", "q" * 10_000),
        ("exclude_modules", 7),
        ("exclude_modules", [7]),
        ("base_model_name_or_path", ["a"]),
        ("rank_pattern", {"(a|a)*": 4}),
        ("rank_pattern", {f"q{i}": 4 for i in range(20_000)}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("peft_type", ["LORA"]),
        ("bias", ["none"]),
        ("init_lora_weights", {"a": 1}),
        ("modules_to_save", "lm_head"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_values_of_the_wrong_kind(adapter, edit_json, key, value):
    file = adapter / "adapter_config.json"
    edit_json(file, **{key: value})
    said = refusal(adapter)
    assert said.startswith(f"{file}: {key}")
    assert len(said) < 400


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, '"a"', "\ud800"])
def test_a_configuration_that_is_no_object(adapter, content):
    (adapter / SUMS).unlink()
    file = adapter / "adapter_config.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert refusal(adapter).startswith(f"{file}: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=2000)
@given(st.dictionaries(st.sampled_from(sorted(write_config(Lora(4), LLAMA))), JSON, min_size=1))
def test_any_configuration(tmp_path_factory, changes):
    file = tmp_path_factory.mktemp("any") / "adapter_config.json"
    file.write_text(json.dumps(write_config(Lora(4), LLAMA) | changes))
    try:
        said = PeftConfig.of(file, read_json(file))
    except UserError as error:
        assert "\n" not in str(error)
        return
    said.adapts("model.layers.0.self_attn.q_proj")
    said.rank("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("base_model.model.model.embed_tokens.weight", 104),
        ("base_model.model.lm_head.weight", 104),
        ("base_model.model.lm_head.modules_to_save.default.weight", LLAMA.vocab),
    ],
)
def test_embeddings_of_its_own(adapter, name, rows):
    respoil(adapter, lambda tensors: tensors.update({name: np.ones((rows, 32), np.float32)}))
    said = refusal(adapter)
    assert f"tensor {name} " in said
    assert ("104 rows where this base has 96" in said) == (rows == 104)
    assert "merge_and_unload" in said


def test_a_rank_is_believed_only_with_its_tensors(adapter, edit_json):
    """2^16 times the model's width would be asked of the memory before a tensor is looked at."""
    edit_json(adapter / "adapter_config.json", r=1 << 16)
    assert "has shape [4, 32], but rank 65536" in refusal(adapter)


def test_the_digest_covers_every_weight_file(adapter):
    (adapter / SUMS).unlink()
    whole = adapter / "adapter_model.safetensors"
    config = (adapter / "adapter_config.json").read_bytes()
    alone = hashlib.sha256(config + whole.read_bytes()).hexdigest()[:16]
    assert weights_digest(str(adapter)) == alone  # as runs and answers of before have it
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {"adapter_model-1.safetensors": names[::2], "adapter_model-2.safetensors": names[1::2]}
    index = {"weight_map": {name: shard for shard, of in shards.items() for name in of}}
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    found = set()
    for change in (0, 1):  # in the second file alone
        tensors[names[1]] = tensors[names[1]] + np.float32(change)
        for shard, of in shards.items():
            save_file({name: tensors[name] for name in of}, adapter / shard)
        found.add(weights_digest(str(adapter)))
    assert len(found) == 2
    (adapter / "adapter_model-2.safetensors").unlink()
    with pytest.raises(UserError, match="missing, though"):
        weights_digest(str(adapter))
