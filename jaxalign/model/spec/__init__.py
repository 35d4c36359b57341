"""What a model is, in numbers: every family is one row of facts in `ModelSpec`.

It reads and writes `config.json` as transformers 4 and 5 spell it, and imports nothing heavy.

    spec = ModelSpec.from_hf(json.loads(Path('model/config.json').read_text()))
    spec.layers, spec.dim                 # 32, 4096
    check_tap(spec, 16)                   # 16, or a UserError past the model

A *tap* names a hidden state by a layer number: layer k is the output of block k, counted from 1, as
in the mid-align paper; layer 0 is the embeddings. Layer L is the output of the last block, before
the final norm. The whole package uses this convention and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxalign.errors import UserError
from jaxalign.model.spec.families import (
    ACTIVATIONS,
    FAMILIES,
    family_of,
    refuse_unsupported,
    windows,
)
from jaxalign.model.spec.keys import flag, ids, ids_to_hf, positive_or, single_id, size
from jaxalign.model.spec.rope import RopeScaling, read_rope, rope_to_hf

__all__ = [
    "FAMILIES",
    "NORMS",
    "QK_NORMS",
    "ModelSpec",
    "RopeScaling",
    "check_tap",
]

# On which sides of attention and of the MLP a block has a norm.
NORMS = {"before": ("before",), "after": ("after",), "around": ("before", "after")}
# How many last axes of queries and keys [B, T, heads, H] are normed together.
QK_NORMS = {"none": 0, "head": 1, "whole": 2}


@dataclass(frozen=True)
class ModelSpec:
    """The facts of a decoder; the letters are those of axes and docstrings."""

    family: str  # a row of FAMILIES
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
    # What not every family has; the defaults are Llama's.
    norms: str = "before"  # of attention and of the MLP: before | after | around
    norm_offset: float = 0.0  # added to the stored scale of every norm
    wide_norms: bool = False  # the scale multiplies in float32, before the cast back
    qk_norm: str = "none"  # of queries and keys: none | head (each by itself) | whole (all heads)
    activation: str = "silu"  # silu | gelu_tanh
    windows: tuple[int, ...] = ()  # per layer, the latest tokens it sees, 0 for all; (): all
    local_rope_theta: float = 0.0  # of layers with a window, without scaling; 0: as the others
    attn_soft_cap: float = 0.0  # scores become c·tanh(score / c); 0: no cap, as in the next
    logit_soft_cap: float = 0.0
    embed_scale: float = 1.0
    query_scalar: float = 0.0  # scores are divided by its root; 0: by the root of H

    @property
    def score_scale(self) -> float:
        """What scores of attention are multiplied by."""
        return (self.query_scalar or self.head_dim) ** -0.5

    @property
    def kinds(self) -> tuple[int, ...]:
        """The windows that occur, in the order of their first layers."""
        return tuple(dict.fromkeys(self.windows)) or (0,)

    def rope(self, window: int) -> tuple[float, RopeScaling | None]:
        """Theta and scaling in layers with this window."""
        if window and self.local_rope_theta:
            return self.local_rope_theta, None
        return self.rope_theta, self.rope_scaling

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """The spec of a parsed `config.json`.

        Args:
            config: as transformers 4 writes it (`rope_theta` and `rope_scaling` at the top level)
                or as transformers 5 does (both in `rope_parameters`).

        Raises:
            UserError: a key is missing or wrong, or the model needs something the decoder lacks.
        """
        row = family_of(config)
        config = {**row.defaults, **config}
        refuse_unsupported(config)
        dim, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
        own = {key: config.get(key) is not None for key in ("head_dim", "num_key_value_heads")}
        head_dim = size(config, "head_dim") if own["head_dim"] else dim // heads
        kv_heads = size(config, "num_key_value_heads") if own["num_key_value_heads"] else heads
        if heads % kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}"
            )
        if head_dim % 2 or not head_dim:
            what = "odd" if head_dim else "none"
            raise UserError(
                f"config.json: head_dim {head_dim} is {what}; rotary positions need pairs"
            )
        theta, scaling = read_rope(config)
        layers = size(config, "num_hidden_layers")
        return cls(
            family=config["model_type"],
            vocab=size(config, "vocab_size"),
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=size(config, "intermediate_size"),
            norm_eps=positive_or(config, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=flag(config, "tie_word_embeddings"),
            max_position=size(config, "max_position_embeddings"),
            bos_id=single_id(config, "bos_token_id"),
            eos_ids=ids(config, "eos_token_id"),
            pad_id=single_id(config, "pad_token_id"),
            activation=ACTIVATIONS[config.get(row.activation_key, "silu")],
            windows=windows(config, layers),
            **row.facts(config),
        )

    def to_hf(self) -> dict[str, Any]:
        """`config.json` as a dict, in the spelling that transformers 4 and 5 both read."""
        row = FAMILIES[self.family]
        activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        config: dict[str, Any] = {
            "architectures": [row.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            row.activation_key: activations[self.activation],
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_to_hf(self.rope_scaling),
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_position,
            "bos_token_id": self.bos_id,
            "eos_token_id": ids_to_hf(self.eos_ids),
            "pad_token_id": self.pad_id,
            "use_cache": True,
        }
        return config | row.extra(self)


def check_tap(spec: ModelSpec, layer: int, key: str = "align.layer") -> int:
    """`layer` itself, where the model has it.

    Args:
        layer: the output of this block, counted from 1; 0 is the embeddings.
        key: the setting to name in the error.

    Raises:
        UserError: the number is outside 0..L.
    """
    if not 0 <= layer <= spec.layers:
        raise UserError(
            f"{key}={layer} is outside this model of {spec.layers} blocks: give 1 to {spec.layers} "
            "for the output of that block, or 0 for the embeddings"
        )
    return layer
