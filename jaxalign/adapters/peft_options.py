"""Which options an adapter_config.json may hold: those that are read, and those that do not matter.

file = Path('adapter/adapter_config.json')
check_lora(file, read_json(file))     # UserError: 'use_qalora' ... is not supported
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError, brief

# Settings that change what the tensors mean. Absent or empty, they are LoRA.
_VARIANTS = (
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Options of every kind of adapter: read, refused, or no matter of what its tensors mean.
COMMON = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "modules_to_save",
    "runtime_config",  # PEFT does not read it from a file either
})  # fmt: skip
# Of LoRA: read here.
_READ = frozenset({
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "init_lora_weights",
})  # fmt: skip
# Of LoRA: the same tensors mean the same with any value.
_UNREAD = frozenset({
    # How factors began; what moves the base is refused by init_lora_weights.
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # How a library computes with them.
    "megatron_config", "megatron_core", "merge_weights",
    # Parts of options that are refused: of use_qalora, and of modules_to_save and its like.
    "qalora_group_size", "ensure_weight_tying",
})  # fmt: skip
_LORA = COMMON | _READ | _UNREAD | frozenset(_VARIANTS)
_MOST_SHOWN = 3  # options of one sentence

# Initialisations that leave the base as it is; others (PiSSA, OLoRA, LoftQ, ...) move a part of the
# base into the adapter, which then fits only that altered base.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_block(value: Any) -> bool:
    return type(value) is int and value >= 0


def _one_or_list(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: kind(value) or (isinstance(value, list) and all(map(kind, value)))


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


# What a key must be where it is there and not null: a check, and its words.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_is_text, "a text"),
    "revision": (_is_text, "a branch, a tag or a commit of the base"),
    "lora_dropout": (_is_rate, "a number from 0 to below 1"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    "layers_to_transform": (_one_or_list(_is_block), "a block's number from 0, or a list of them"),
    "layers_pattern": (_one_or_list(_is_text), "a text or a list of texts"),
    "exclude_modules": (_one_or_list(_is_text), "a list of modules or a pattern"),
}


def check_lora(file: Path, content: Mapping[str, Any]) -> None:
    """Refuses what is not a LoRA, a variant that is not supported, an option that is not known, or
    a value of the wrong kind; UserError."""
    if content.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type {brief(content.get('peft_type'))} is not supported; supported: "
            "LORA, PREFIX_TUNING, PROMPT_TUNING"
        )
    refused = {key: content[key] for key in _VARIANTS if content.get(key)}
    if content.get("bias") not in (None, "none"):
        refused["bias"] = content["bias"]
    if content.get("init_lora_weights") not in _INITS:
        refused["init_lora_weights"] = content["init_lora_weights"]
    if refused:
        settings = ", ".join(f"{key}={brief(value)}" for key, value in refused.items())
        raise UserError(
            f"{file}: {settings} is not supported; only LoRA and DoRA are (merge the adapter into "
            "its base in PEFT and give the merged model instead)"
        )
    check_known(file, content, _LORA)
    check_kinds(file, content)


def check_known(file: Path, content: Mapping[str, Any], known: Set[str]) -> None:
    """Refuses options that would be ignored, such as those of a newer PEFT or a fork; UserError.

    Null, false, 0 and what is empty are taken as switched off.
    """
    unknown = [key for key, value in content.items() if value and key not in known]
    if unknown:
        shown = [f"{brief(key)}: {brief(content[key])}" for key in unknown[:_MOST_SHOWN]]
        shown += ["..."] if len(unknown) > _MOST_SHOWN else []
        raise UserError(
            f"{file}: {', '.join(shown)} (peft_version {brief(content.get('peft_version'))}) is "
            "not known here and may change what the weights mean; set it to null if it only says "
            "how they were trained, else train without it (a LoRA can also be merged into its base "
            "by the PEFT that wrote it, and read as a model)"
        )


def check_kinds(file: Path, content: Mapping[str, Any]) -> None:
    """Refuses a key of the wrong kind; UserError."""
    for key, (check, what) in _KINDS.items():
        value = content.get(key)
        if value is not None and not check(value):
            raise UserError(f"{file}: {key} should be {what}, found {brief(value)}")
