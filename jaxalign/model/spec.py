"""What a model is, in numbers: every family is one row of facts in `ModelSpec`.

It reads and writes `config.json` as transformers 4 and 5 spell it, and imports nothing heavy.

    spec = ModelSpec.from_hf(json.loads(Path('model/config.json').read_text()))
    spec.layers, spec.dim                 # 32, 4096
    check_tap(spec, 16)                   # 16, or a UserError past the model
    parameter_count(spec)                 # 8030261248

A *tap* names a hidden state by a layer number: layer k is the output of block k, counted from 1, as
in the mid-align paper; layer 0 is the embeddings. Layer L is the output of the last block, before
the final norm. The whole package uses this convention and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxalign.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pre-training ones."""

    kind: str  # linear | llama3
    factor: float
    low_freq_factor: float = 0.0  # llama3 only, as are the next two
    high_freq_factor: float = 0.0
    original_max_position: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """The facts of a decoder; the letters are those of axes and docstrings."""

    family: str  # llama | qwen2
    vocab: int  # V
    dim: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffn: int  # F
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool  # the embedding matrix is also the output head
    max_position: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """The spec of a parsed `config.json`.

        Args:
            config: as transformers 4 writes it (`rope_theta` and `rope_scaling` at the top level)
                or as transformers 5 does (both in `rope_parameters`).

        Raises:
            UserError: a key is missing or wrong, or the model needs something the decoder lacks.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UserError(
                f"config.json: model_type {family!r} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        _refuse_unsupported(config)
        dim, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        head_dim = config.get("head_dim") or dim // heads
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        if head_dim % 2:
            raise UserError(f"config.json: head_dim {head_dim} is odd; rotary positions need pairs")
        theta, scaling = _rope(config)
        return cls(
            family=family,
            vocab=_size(config, "vocab_size"),
            dim=dim,
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=_size(config, "intermediate_size"),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            **FAMILIES[family].biases(config),
            tied=bool(config.get("tie_word_embeddings", False)),
            max_position=_size(config, "max_position_embeddings"),
            bos_id=config.get("bos_token_id"),
            eos_ids=_ids(config.get("eos_token_id")),
            pad_id=config.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """`config.json` as a dict, in the spelling that transformers 4 and 5 both read."""
        config: dict[str, Any] = {
            "architectures": [FAMILIES[self.family].architecture],
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": _rope_to_hf(self.rope_scaling),
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_position,
            "bos_token_id": self.bos_id,
            "eos_token_id": _ids_to_hf(self.eos_ids),
            "pad_token_id": self.pad_id,
            "use_cache": True,
        }
        return config | FAMILIES[self.family].extra(self)


def parameter_count(spec: ModelSpec) -> int:
    """Weights and biases in all; a tied head is counted once."""
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = spec.dim * (2 * query + 2 * key)
    attention += (query + 2 * key) * spec.qkv_bias + spec.dim * spec.o_bias
    mlp = 3 * spec.dim * spec.ffn + (2 * spec.ffn + spec.dim) * spec.mlp_bias
    matrices = 1 if spec.tied else 2
    block = attention + mlp + 2 * spec.dim
    return spec.layers * block + spec.dim + matrices * spec.vocab * spec.dim


def check_tap(spec: ModelSpec, layer: int, key: str = "align.layer") -> int:
    """`layer` itself, where the model has it.

    Args:
        layer: the output of this block, counted from 1; 0 is the embeddings.
        key: the setting to name in the error.

    Raises:
        UserError: the number lies outside 0..L.
    """
    if not 0 <= layer <= spec.layers:
        raise UserError(
            f"{key}={layer} is outside this model of {spec.layers} blocks: give 1 to {spec.layers} "
            "for the output of that block, or 0 for the embeddings"
        )
    return layer


@dataclass(frozen=True)
class _Family:
    """What sets a family's config.json apart."""

    architecture: str
    biases: Callable[[Mapping[str, Any]], dict[str, bool]]
    extra: Callable[[ModelSpec], dict[str, Any]]


def _llama_biases(config: Mapping[str, Any]) -> dict[str, bool]:
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}


FAMILIES = {
    "llama": _Family(
        "LlamaForCausalLM",
        _llama_biases,
        lambda spec: {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias},
    ),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        lambda config: {"qkv_bias": True, "o_bias": False, "mlp_bias": False},
        lambda spec: {"use_sliding_window": False},
    ),
}
ROPES = ("default", "linear", "llama3")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    family = config["model_type"]
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"config.json: hidden_act {act!r} is not supported; supported: silu")
    windows = family == "qwen2" and config.get("use_sliding_window")
    if windows or "sliding_attention" in (config.get("layer_types") or ()):
        raise UserError(
            "config.json: sliding-window attention is not supported; only full attention is "
            "(use_sliding_window: false)"
        )
    if config.get("quantization_config"):
        raise UserError(
            "config.json: quantized weights (quantization_config) are not supported; give the "
            "float16, bfloat16 or float32 checkpoint"
        )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} should be a positive whole number, found {value!r}")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # Transformers 5 keeps theta and scaling in one dict; transformers 4 keeps them apart.
    facts = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(facts.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = facts.get("rope_type") or facts.get("type") or "default"
    if kind not in ROPES:
        raise UserError(
            f"config.json: rope type {kind!r} is not supported; supported: {', '.join(ROPES)}"
        )
    partial = facts.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor {partial} is not supported; supported: 1.0"
        )
    if kind == "default":
        return theta, None
    scaling = RopeScaling(kind, _rope_number(facts, "factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            kind,
            scaling.factor,
            low_freq_factor=_rope_number(facts, "low_freq_factor"),
            high_freq_factor=_rope_number(facts, "high_freq_factor"),
            original_max_position=int(_rope_number(facts, "original_max_position_embeddings")),
        )
    return theta, scaling


def _rope_number(facts: Mapping[str, Any], key: str) -> float:
    value = facts.get(key)
    if not isinstance(value, int | float) or value <= 0:
        raise UserError(f"config.json: rope scaling needs a positive {key}, found {value!r}")
    return float(value)


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    facts: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        facts |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return facts


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _ids_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    if len(ids) < 2:
        return ids[0] if ids else None
    return list(ids)
