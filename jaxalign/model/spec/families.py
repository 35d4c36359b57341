"""The families: what sets each one's `config.json` apart, and what it becomes in a `ModelSpec`.

A row says which class of transformers runs the family, which facts beyond Llama's it has, how they
are written back, which layers see a window only, and what transformers assumes of absent keys.

    row = family_of(config)                   # or a UserError that names the supported ones
    row.facts(config)                         # {'qk_norm': 'head', 'qkv_bias': False, ...}
    windows(config, layers=4)                 # (512, 512, 512, 0)
    row.extra(spec)                           # {'attention_bias': False, ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxalign.errors import UserError
from jaxalign.model.spec.keys import flag, positive, positive_or, size
from jaxalign.model.spec.rope import read_local_theta

if TYPE_CHECKING:
    from jaxalign.model.spec import ModelSpec

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What sets a family's config.json apart."""

    architecture: str
    facts: Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json -> further fields
    extra: Callable[[ModelSpec], dict[str, Any]]  # and back: further keys of config.json
    # Whether layer i, from 0, has the window where layer_types is silent.
    slides: Callable[[Mapping[str, Any], int], bool] = lambda config, layer: False
    layer_types: bool = True  # whether transformers' class heeds that key
    activation_key: str = "hidden_act"
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers', for absent keys


def _biases(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = flag(config, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": False}


def _gemma(config: Mapping[str, Any]) -> dict[str, Any]:
    return _biases(config) | {
        "norms": "around",
        "norm_offset": 1.0,
        "wide_norms": True,
        "attn_soft_cap": positive_or(config, "attn_logit_softcapping", 0.0),
        "logit_soft_cap": positive_or(config, "final_logit_softcapping", 0.0),
        "embed_scale": size(config, "hidden_size") ** 0.5,
        "query_scalar": positive(config, "query_pre_attn_scalar"),
    }


def _gemma_to_hf(spec: ModelSpec) -> dict[str, Any]:
    scalar = int(spec.query_scalar) if spec.query_scalar.is_integer() else spec.query_scalar
    return {
        "attention_bias": spec.qkv_bias,
        "attn_logit_softcapping": spec.attn_soft_cap or None,
        "final_logit_softcapping": spec.logit_soft_cap or None,
        "query_pre_attn_scalar": scalar,
        # Transformers makes the mask of a window even where no layer uses it.
        **_windows_to_hf(spec, unused=4096),
    }


def _gemma3_to_hf(spec: ModelSpec) -> dict[str, Any]:
    each = spec.windows or (0,) * spec.layers
    full = [i + 1 for i, window in enumerate(each) if not window]
    pattern = full[0] if full else spec.layers + 1
    regular = full == [i for i in range(1, spec.layers + 1) if i % pattern == 0]
    # What releases of transformers 4 before layer_types read; others prefer layer_types.
    older = {"sliding_window_pattern": pattern} if regular else {}
    return _gemma_to_hf(spec) | {"rope_local_base_freq": spec.local_rope_theta} | older


def _qwen_slides(config: Mapping[str, Any], layer: int) -> bool:
    return _window(config) is not None and layer >= size(config, "max_window_layers", least=0)


def _qwen_to_hf(spec: ModelSpec) -> dict[str, Any]:
    if not spec.windows:
        return {"use_sliding_window": False}
    first = next(i for i, window in enumerate(spec.windows) if window)
    return {"use_sliding_window": True, "max_window_layers": first, **_windows_to_hf(spec)}


_GEMMA_DEFAULTS = {
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_QWEN_DEFAULTS = {"max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        lambda config: _biases(config) | {"mlp_bias": flag(config, "mlp_bias")},
        lambda spec: {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias},
        layer_types=False,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda config: {"qkv_bias": True, "o_bias": False, "mlp_bias": False},
        _qwen_to_hf,
        slides=_qwen_slides,
        defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        lambda config: _biases(config) | {"qk_norm": "head"},
        lambda spec: {"attention_bias": spec.qkv_bias, **_qwen_to_hf(spec)},
        slides=_qwen_slides,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        lambda config: {"qkv_bias": False, "o_bias": False, "mlp_bias": False},
        lambda spec: {"sliding_window": max(spec.windows, default=None)},
        slides=lambda config, layer: _window(config) is not None,
        layer_types=False,
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma,
        _gemma_to_hf,
        slides=lambda config, layer: layer % 2 == 0,
        activation_key="hidden_activation",
        defaults=_GEMMA_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        lambda config: (
            _gemma(config)
            # Transformers caps no scores here, whatever the key says.
            | {
                "qk_norm": "head",
                "attn_soft_cap": 0.0,
                "local_rope_theta": read_local_theta(config),
            }
        ),
        _gemma3_to_hf,
        slides=lambda config, layer: (layer + 1) % size(config, "sliding_window_pattern") > 0,
        activation_key="hidden_activation",
        defaults=_GEMMA_DEFAULTS
        | {"rope_local_base_freq": 1e4, "rope_theta": 1e6, "sliding_window_pattern": 6},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        lambda config: _biases(config) | {"norms": "after", "wide_norms": True, "qk_norm": "whole"},
        lambda spec: {"attention_bias": spec.qkv_bias},
        layer_types=False,
        defaults={"eos_token_id": 50279, "pad_token_id": 1, "rms_norm_eps": 1e-5},
    ),
}
_EXPERTS = "its layers choose among experts, which those of the decoder do not"
_WHY_NOT = {
    "gemma3": "it reads images, too; docs/families.md shows how to save its text part alone",
    "mixtral": _EXPERTS,
    "phi3": "its q, k and v are one tensor, to which PEFT adds one adapter",
    "qwen3_moe": _EXPERTS,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of this config's family.

    Raises:
        UserError: there is none.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        reason = f" ({_WHY_NOT[name]})" if isinstance(name, str) and name in _WHY_NOT else ""
        raise UserError(
            f"config.json: model_type {str(name)[:60]!r} is not supported{reason}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Checks what no row can express.

    Raises:
        UserError: the model needs it.
    """
    key = FAMILIES[config["model_type"]].activation_key
    act = config.get(key, "silu")
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise UserError(
            f"config.json: {key} {str(act)[:60]!r} is not supported; supported: "
            f"{', '.join(ACTIVATIONS)}"
        )
    if config.get("use_bidirectional_attention"):
        raise UserError(
            "config.json: use_bidirectional_attention is not supported; every token sees only "
            "those before it"
        )
    if config.get("quantization_config"):
        raise UserError(
            "config.json: quantized weights (quantization_config) are not supported; give the "
            "float16, bfloat16 or float32 checkpoint"
        )


def _window(config: Mapping[str, Any]) -> int | None:
    """The window that layers may have; None where it is not in use."""
    used = flag(config, "use_sliding_window", True) and config.get("sliding_window") is not None
    return size(config, "sliding_window") if used else None


def windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """How many of the latest tokens each layer sees, 0 for all; empty where every layer sees all.

    Raises:
        UserError: `layer_types` asks for what the family or its window does not allow.
    """
    row, types = FAMILIES[config["model_type"]], config.get("layer_types")
    by_rule = [_SLIDING if row.slides(config, i) else _FULL for i in range(layers)]
    types = by_rule if types is None else types
    known = isinstance(types, list) and all(kind in (_FULL, _SLIDING) for kind in types)
    if not known or len(types) != layers:
        raise UserError(
            f"config.json: layer_types should say {_FULL} or {_SLIDING} for each of the {layers} "
            "layers"
        )
    if types != by_rule and not row.layer_types:
        raise UserError(
            f"config.json: sliding-window attention by layer_types is not supported in the "
            f"{config['model_type']} family, whose class in transformers does not read them"
        )
    if _SLIDING not in types:
        return ()
    if (window := _window(config)) is None:
        raise UserError(f"config.json: layer_types says {_SLIDING}, but no sliding_window is used")
    return tuple(window if kind == _SLIDING else 0 for kind in types)


def _windows_to_hf(spec: ModelSpec, unused: int | None = None) -> dict[str, Any]:
    each = spec.windows or (0,) * spec.layers
    types = [_SLIDING if window else _FULL for window in each]
    return {"layer_types": types, "sliding_window": max(each) or unused}
