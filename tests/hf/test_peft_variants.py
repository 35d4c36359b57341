"""The real PEFT, both ways: it runs what we write as we do, and we run what it trains."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.adapters.dora import Dora
from jaxalign.adapters.lora import Lora
from jaxalign.adapters.peft_config import module_name
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.model.decoder import Decoder
from tests.adapters.variants import VARIANTS, random_tree
from tests.hf.conftest import hf_model

pytestmark = pytest.mark.torch

TOKENS = np.arange(80).reshape(2, 40)
SEVEN = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Torch's threads wait for each other longer than such products take."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    scope="module", params=["qwen2_tied", pytest.param("llama3_scaled", marks=pytest.mark.slow)]
)
def base(request, tmp_path_factory):
    """(family, folder, spec, parameters) of a model that transformers wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    hf_model(request.param).save_pretrained(folder)
    spec = load_spec(folder)
    return request.param, folder, spec, load_params(folder, spec, jnp.float32)


def ours(base, adapter, lora):
    _, _, spec, params = base
    decoder = Decoder(spec, adapter)
    return np.asarray(decoder.logits(params, decoder.forward(params, lora, TOKENS).hidden))


def theirs(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def assert_equal(left, right):
    np.testing.assert_allclose(left, right, atol=1e-5 * np.abs(right).max(), rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_runs_what_we_write(tmp_path, base, name):
    from peft import PeftModel, get_peft_model_state_dict

    adapter, (family, _, spec, _) = VARIANTS[name], base
    lora = random_tree(adapter, spec, size=0.1)
    save_peft(tmp_path, lora, spec, adapter)
    model = hf_model(family)
    before = theirs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as PEFT warns of missing keys
        wrapped = PeftModel.from_pretrained(model, tmp_path)
        report = wrapped.load_adapter(tmp_path, adapter_name="again")
    assert report.unexpected_keys == []
    assert [key for key in report.missing_keys if ".again" in key] == []
    stored = load_file(tmp_path / "adapter_model.safetensors")
    in_peft = get_peft_model_state_dict(wrapped)
    assert in_peft.keys() == stored.keys()
    for key, tensor in stored.items():
        np.testing.assert_array_equal(in_peft[key].numpy(), tensor, err_msg=key)
    for (target, block), (rank, alpha) in adapter.table(spec.layers).items():
        module = wrapped.base_model.model.get_submodule(module_name(target, block))
        assert (module.r["default"], module.lora_alpha["default"]) == (rank, alpha)
        assert module.scaling["default"] == pytest.approx(adapter.scale_of(target, block))
    logits = theirs(wrapped)
    assert_equal(ours(base, adapter, lora), logits)
    # An adapter under names nobody looks up loads as zeros: it must change the output.
    assert np.abs(logits - before).max() > 1e-2


# A configuration of PEFT, and what we should make of it (None: only the logits are compared).
TRAINED = {
    "plain": ({"target_modules": ["q_proj", "v_proj"]}, Lora(4, 8.0, targets=("q", "v"))),
    "rslora": (
        {"target_modules": ["o_proj"], "use_rslora": True},
        Lora(4, 8.0, targets=("o",), rank_stabilised=True),
    ),
    "dora": ({"target_modules": "all-linear", "use_dora": True}, Dora(4, 8.0)),
    "dora_rslora_dropout": (
        {
            "target_modules": ["down_proj"],
            "use_dora": True,
            "use_rslora": True,
            "lora_dropout": 0.1,
        },
        Dora(4, 8.0, 0.1, ("down",), rank_stabilised=True),
    ),
    "all_linear": ({"target_modules": "all-linear"}, Lora(4, 8.0)),
    "regex": (
        {"target_modules": r".*layers\.(0|2)\..*(q|up)_proj"},
        Lora(4, 8.0, 0.0, ("q", "up"), (1, 3)),
    ),
    "regex_uneven": (
        {"target_modules": r".*(layers\.1\.mlp\.(up|down)|layers\.[01]\.self_attn\.k)_proj"},
        None,
    ),
    "layers": (
        {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
        Lora(4, 8.0, 0.0, ("q", "gate"), (2,)),
    ),
    "full_names": ({"target_modules": ["layers.0.mlp.up_proj", "k_proj"]}, None),
    "excluded": ({"target_modules": "all-linear", "exclude_modules": ["1.mlp.up_proj"]}, None),
    "rank_pattern": (
        {
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 6, "layers.1.mlp.up_proj": 2},
        },
        None,
    ),
    "alpha_pattern": (
        {
            "target_modules": ["q_proj", "up_proj"],
            "alpha_pattern": {r"layers\.\d\.self.*q_proj": 3, "model.layers.2.mlp.up_proj": 20},
        },
        None,
    ),
    "patterns_dora": (
        {
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.o_proj": 9},
            "alpha_pattern": {"q_proj": 2},
            "use_dora": True,
        },
        None,
    ),
    "patterns_rslora_layers": (
        {
            "target_modules": ["v_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"layers.2.mlp.down_proj": 1},
            "use_rslora": True,
        },
        None,
    ),
    "orthogonal": ({"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, None),
}


def trained_by_peft(family, **selection):
    """A model of PEFT after four steps that move every factor, and its adapter's folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 8} | selection))
    torch.manual_seed(1)
    model = get_peft_model(hf_model(family), config).train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    tokens = torch.tensor(TOKENS)
    for _ in range(4):
        optimiser.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("name", TRAINED)
def test_we_run_what_peft_trained(tmp_path, base, name):
    from peft import PeftModel

    family, _, spec, _ = base
    selection, expected = TRAINED[name]
    model = trained_by_peft(family, **selection)
    model.save_pretrained(tmp_path / "theirs")
    lora, adapter = load_peft(tmp_path / "theirs", spec)
    if expected is not None:
        assert adapter == expected
    logits = theirs(model)
    assert_equal(ours(base, adapter, lora), logits)
    assert np.abs(ours(base, None, None) - logits).max() > 1e-2

    save_peft(tmp_path / "ours", lora, spec, adapter)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert written.keys() == stored.keys()
    for key, tensor in stored.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
    again = PeftModel.from_pretrained(hf_model(family), tmp_path / "ours")
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            twin = again.get_submodule(path)
            assert twin.r == module.r and twin.scaling == module.scaling
            assert twin.use_dora == module.use_dora and twin.use_rslora == module.use_rslora
    np.testing.assert_array_equal(theirs(again), logits)


def test_a_regex_kept_as_a_string(tmp_path, base, edit_json):
    """PEFT writes names where it can; a pattern or `all-linear` may stand in the file as well."""
    family, _, spec, _ = base
    trained_by_peft(family, target_modules="all-linear").save_pretrained(tmp_path)
    _, by_names = load_peft(tmp_path, spec)
    for named in ("all-linear", r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"):
        edit_json(tmp_path / "adapter_config.json", target_modules=named)
        assert load_peft(tmp_path, spec)[1] == by_names == Lora(4, 8.0, targets=SEVEN)


@pytest.mark.parametrize("name", ["dora", "patterns_dora", "rank_pattern"])
def test_merged_here_as_merged_there(tmp_path, base, name):

    family, _, spec, params = base
    model = trained_by_peft(family, **TRAINED[name][0])
    model.save_pretrained(tmp_path)
    lora, adapter = load_peft(tmp_path, spec)
    merged = adapter.merge(params, jax.tree.map(jnp.asarray, lora))
    whole = model.merge_and_unload()
    for target in adapter.targets:
        for block in range(1, spec.layers + 1):
            weight = whole.get_submodule(module_name(target, block)).weight.detach().numpy()
            part = "attention" if target in "qkvo" else "mlp"
            kernel = np.asarray(merged["blocks"][part][target]["kernel"][block - 1])
            np.testing.assert_allclose(
                kernel.reshape(weight.T.shape), weight.T, atol=1e-6 * np.abs(weight).max() + 1e-7
            )
