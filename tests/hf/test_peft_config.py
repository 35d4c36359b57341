"""PEFT's rules of names and patterns, and vLLM's limits, against transcriptions of both."""

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
