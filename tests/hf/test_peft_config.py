"""PEFT's rules of names and patterns, and vLLM's limits, against transcriptions of both."""

import dataclasses
import json
import math
import re

import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.adapters.peft_config import (
    VLLM_RANKS,
    PeftConfig,
    module_name,
    vllm_limits,
    write_config,
)
from jaxalign.errors import UserError
from jaxalign.hf.files import read_json
from jaxalign.hf.peft import named_base
from jaxalign.model.spec.tensors import TARGETS
from tests.adapters.variants import LAYERS, VARIANTS
from tests.hf.conftest import LLAMA

MODULES = [module_name(target, block) for target in TARGETS for block in range(1, 13)]
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.fixture
def said(tmp_path):
    def build(**changes) -> PeftConfig:
        (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
        return PeftConfig.of(
            tmp_path / "adapter_config.json", read_json(tmp_path / "adapter_config.json")
        )

    return build


def test_the_revision_belongs_to_the_base(said):
    """PEFT loads the base of `revision`; so do we, and we write it where we know it."""
    changes = {"base_model_name_or_path": "some/base", "revision": "v2"}
    assert named_base(said(**changes).file.parent) == "some/base@v2"
    assert named_base(said(**changes | {"revision": None}).file.parent) == "some/base"
    assert named_base(said(**changes | {"base_model_name_or_path": None}).file.parent) == ""
    with pytest.raises(UserError, match="revision should be a branch, a tag or a commit"):
        said(**changes | {"revision": 2})
    written = write_config(Lora(r=8, targets=("q",)), LLAMA, "some/base@v2")
    assert (written["base_model_name_or_path"], written["revision"]) == ("some/base", "v2")
    assert "revision" not in write_config(Lora(r=8, targets=("q",)), LLAMA, "some/base")


# As PEFT 0.2, 0.13 and 0.18 and Unsloth wrote them where nothing but a LoRA was asked for.
OLDER = {
    "0.2": {
        "enable_lora": None, "merge_weights": False, "fan_in_fan_out": False,
        "modules_to_save": None, "bias": "none", "inference_mode": True, "task_type": "CAUSAL_LM",
    },
    "0.13": {
        "auto_mapping": None, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "megatron_config": None,
        "megatron_core": "megatron.core", "init_lora_weights": True, "use_dora": False,
    },
    "Unsloth": {
        "peft_version": "0.18.1", "alora_invocation_tokens": None, "arrow_config": None,
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
        "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
        "exclude_modules": None, "lora_bias": False, "qalora_group_size": 16,
        "target_parameters": None, "trainable_token_indices": None, "use_qalora": False,
    },
    "trained otherwise, then as any LoRA": {
        "eva_config": {"rho": 2.0}, "corda_config": {"corda_method": "ipm"}, "merge_weights": True,
        "lora_ga_config": {"direction": "ArB2r"}, "loftq_config": {"loftq_bits": 4},
        "runtime_config": {"ephemeral_gpu_offload": True}, "ensure_weight_tying": True,
        "megatron_config": {"tensor_model_parallel_size": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_options_that_change_no_tensor_are_read_over(said, name):
    assert said(**OLDER[name]).rank("model.layers.0.self_attn.q_proj") == 8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"use_future": True, "peft_version": "0.99"},
            r"'use_future': True \(peft_version '0.99'\)",
        ),
        ({"enable_lora": [True, False]}, r"'enable_lora': \[True, False\] \(peft_version None\)"),
        ({"use_Dora": True}, "'use_Dora': True"),
        ({"mora_type": 6, "use_mora": True}, "'mora_type': 6, 'use_mora': True "),
        ({f"a{n}": "b" * 1000 for n in range(50)}, r"'a0': 'b+\.\.\., .*, \.\.\. \("),
        ({"a\nb": 1}, r"'a\\nb': 1"),
    ],
    ids=["newer", "old", "mistyped", "fork", "many", "odd"],
)
def test_options_that_are_not_known_are_refused(said, changes, told):
    """PEFT warns of them and goes on; they may change what the factors mean."""
    with pytest.raises(UserError, match=f"adapter_config.json: {told}") as refused:
        said(**changes)
    assert "may change what the weights mean; set it to null" in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 800
    said(**dict.fromkeys(changes))  # switched off


@pytest.mark.torch
def test_every_option_of_peft_is_known(said):
    """The installed PEFT's defaults are read, and so are its other ways to begin."""
    from peft import LoraConfig

    plain = {"r": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for more in ({}, {"init_lora_weights": "gaussian"}, {"use_rslora": True}, {"use_dora": True}):
        config = LoraConfig(**plain, **more)
        config.save_pretrained(said().file.parent)
        PeftConfig.of(said().file, json.loads(json.dumps(config.to_dict(), default=list)))
    for field in dataclasses.fields(LoraConfig):
        try:
            said(**{field.name: {"x": 1}})
        except UserError as refused:
            assert "may change what the weights mean" not in str(refused), field.name


def test_names_are_pefts():
    assert module_name("q", 1) == "model.layers.0.self_attn.q_proj"
    assert module_name("down", 12) == "model.layers.11.mlp.down_proj"


SELECTIONS = {
    "names": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "halves of names": {"target_modules": ["roj", "attn.q_proj", "1.mlp.up_proj"]},
    "full names": {"target_modules": ["model.layers.3.mlp.up_proj", "layers.11.mlp.up_proj"]},
    "pattern": {"target_modules": r".*layers\.(1|2)\..*(q|up)_proj"},
    "pattern of an end": {"target_modules": "q_proj"},
    "all": {"target_modules": "ALL-linear"},
    "all but": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "0.mlp.up_proj"]},
    "but a pattern": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\d?\..*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 3},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "a named layer besides": {
        "target_modules": ["q_proj", "model.layers.5.mlp.up_proj"],
        "layers_to_transform": [1],
    },
    "where layers are": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "elsewhere": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "h",
    },
}


@pytest.mark.torch
@pytest.mark.parametrize("name", SELECTIONS)
def test_modules_are_chosen_as_peft_chooses(said, name):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    selection = SELECTIONS[name]
    ours = [module for module in MODULES if said(**selection).adapts(module)]
    if str(selection["target_modules"]).lower() == "all-linear":
        selection = selection | {"target_modules": MODULES}
    config = LoraConfig(r=8, **selection)
    found = {module: check_target_module_exists(config, module) for module in MODULES}
    chosen = [m for m, how in found.items() if how and type(how).__name__ != "_ExcludedModule"]
    assert ours == chosen
    assert bool(ours) == (name not in ("pattern of an end", "elsewhere"))


PATTERNS = [
    {"q_proj": 1, "up_proj": 2},
    {"layers.1.self_attn.q_proj": 1, "q_proj": 2},
    {"q_proj": 2, "layers.1.self_attn.q_proj": 1},
    {"model.layers.1.mlp.up_proj": 3, "^model.layers.11.mlp.up_proj": 4},
    {r"layers\.\d\.self_attn\..*": 5, ".*": 6},
    {"proj": 7, "1.mlp.up_proj": 8},
]


@pytest.mark.torch
@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_patterns_fit_as_pefts_do(said, patterns):
    from peft.utils.other import get_pattern_key

    config = said(rank_pattern=patterns, alpha_pattern=patterns)
    for module in MODULES:
        expected = patterns.get(get_pattern_key(patterns, module))
        assert config.rank(module) == (expected or 8)
        assert config.alpha(module) == float(expected or 16)


# --- vLLM ---------------------------------------------------------------------------------------


def vllm(config: dict, max_lora_rank: int) -> float:
    """vLLM's PEFTHelper as documented: the scale it would use, or a ValueError."""
    assert max_lora_rank in VLLM_RANKS
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise ValueError(f"Missing required configuration fields: {missing}")
    if config.get("modules_to_save"):
        raise ValueError("vLLM only supports modules_to_save being None.")
    if config.get("use_dora"):
        raise ValueError("vLLM does not yet support DoRA.")
    if config.get("bias", "none") != "none":
        raise ValueError("Adapter bias is not supported.")
    if config.get("trainable_token_indices") is not None:
        raise ValueError("Adapter requires trainable tokens.")
    if config["r"] > max_lora_rank:
        raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {max_lora_rank}.")
    assert type(config["r"]) is int and type(config["lora_alpha"]) in (int, float)
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


@pytest.mark.parametrize("name", VARIANTS)
def test_vllm_serves_what_we_write_or_we_say_why_not(name):
    adapter = VARIANTS[name]
    config = json.loads(json.dumps(write_config(adapter, LLAMA)))
    served, why = True, ""
    try:
        scale = vllm(config, 8)
    except ValueError as error:
        served, why = False, str(error)
    else:
        # It knows one scale: those of all modules must be this one.
        served = all(
            scale == pytest.approx(adapter.scale_of(*place)) for place in adapter.table(LAYERS)
        )
    assert served == (vllm_limits(adapter) == [])
    assert ("DoRA" in why) == adapter.dora
    # No tensor may be larger than the rank that vLLM compares with its limit.
    assert config["r"] == max(rank for rank, _ in adapter.table(LAYERS).values())


def test_ranks_past_vllms():
    assert vllm_limits(Lora(512)) == []
    (limit,) = vllm_limits(Lora(513))
    assert re.search("ranks up to 512, and this one is 513", limit)
