"""Prefix tuning: trained keys and values in front of every block's own (Li & Liang 2021).

In each block a token looks back at its text and, with the same softmax, at P pairs that are
weights:

    softmax([q K_P, q K] / sqrt(H)) [V_P; V]         K_P, V_P [P, K, H] of this block

K_P is not rotated: a trained key has no position, it only takes one, so that a text begins at
position P. The layout and the names are PEFT's (PREFIX_TUNING without `prefix_projection`, which
is P-tuning v2 and what XSGD uses): `prompt_embeddings` [P, 2 L K H], keys of block 1, values of
block 1, keys of block 2, ...; on a grouped-query base the heads are those of keys.

Differences from XSGD's released code (github.com/salesforce/FewXC), which is an encoder's: no
dropout on the prefix (PEFT has none); numbers begin at N(0, 0.02), where torch's embeddings begin
at N(0, 1) and drown the text at first. In a layer with a window the prefix is P tokens at positions
0 to P - 1: a token beyond the window does not see it, as in PEFT on Gemma and Mistral.

    adapter = Prefix(16)
    adapter.init(spec, key, params)    # {'blocks': {'attention': {'prefix': {'k': [L, P, K, H]}}}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np

from jaxalign.adapters.interface import Stored
from jaxalign.adapters.virtual import Virtual
from jaxalign.model.spec import ModelSpec

TENSOR = "prompt_embeddings"
START = 0.02  # deviation of the first numbers, that of a base's own


@dataclass(frozen=True)
class Prefix(Virtual):
    """P keys and values in front of every block's."""

    name: ClassVar[str] = "prefix"
    kind: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    # PEFT stores what a projection gives, not the projection.
    options: ClassVar[frozenset[str]] = frozenset(
        {"prefix_projection", "encoder_hidden_size", "init_weights"}
    )

    @property
    def prefix_length(self) -> int:
        """See `Attached`."""
        return self.num_virtual_tokens

    def init(self, spec: ModelSpec, key: jax.Array, params: Any = None) -> dict[str, Any]:
        """Small random keys and values, float32: nearly, not exactly, the base."""
        shape = (spec.layers, self.num_virtual_tokens, spec.kv_heads, spec.head_dim)
        both = zip("kv", jax.random.split(key), strict=True)
        return _tree({name: START * jax.random.normal(own, shape) for name, own in both})

    def count(self, spec: ModelSpec) -> int:
        """2 L P K H."""
        return 2 * spec.layers * self.num_virtual_tokens * spec.kv_heads * spec.head_dim

    def multiplied(self, spec: ModelSpec) -> int:
        """Scores and mixtures with P more tokens."""
        return 2 * spec.layers * self.num_virtual_tokens * spec.heads * spec.head_dim

    def per_block(self, params: Any, trained: Mapping[str, Any], blocks: int | None = None) -> Any:
        """See `Attached`."""
        return jax.tree.map(lambda leaf: leaf[:blocks], trained["blocks"])

    @classmethod
    def read(
        cls,
        file: Path,
        content: Mapping[str, Any],
        tensors: Callable[[], Mapping[str, Stored]],
        spec: ModelSpec,
    ) -> tuple[dict[str, Any], Self]:
        """See `Adapter`."""
        width = spec.kv_heads * spec.head_dim
        wanted = {
            "num_layers": spec.layers,
            "token_dim": width,
            "num_attention_heads": spec.kv_heads,
            "num_transformer_submodules": 1,
        }
        count = cls.said(file, content, wanted)
        rows = cls.held(file, tensors, {TENSOR: (count, 2 * spec.layers * width)})[TENSOR]
        rows = rows.reshape(count, spec.layers, 2, spec.kv_heads, spec.head_dim)
        both = np.ascontiguousarray(rows.transpose(2, 1, 0, 3, 4))  # [2, L, P, K, H]
        return _tree(dict(zip("kv", both, strict=True))), cls(count)

    def config(self, spec: ModelSpec, base_name: str = "") -> dict[str, Any]:
        """See `Adapter`."""
        width = spec.kv_heads * spec.head_dim
        return self.written(
            base_name,
            num_layers=spec.layers,
            token_dim=width,
            num_attention_heads=spec.kv_heads,
            num_transformer_submodules=1,
            encoder_hidden_size=width,
            prefix_projection=False,
        )

    def tensors(self, trained: Mapping[str, Any], spec: ModelSpec) -> dict[str, np.ndarray]:
        """See `Adapter`."""
        own = trained["blocks"]["attention"]["prefix"]
        shape = (spec.layers, self.num_virtual_tokens, spec.kv_heads, spec.head_dim)
        if any(np.shape(own[name]) != shape for name in "kv"):
            raise ValueError(f"a prefix of this base has keys and values {list(shape)}")
        both = np.stack([own["k"], own["v"]]).transpose(2, 1, 0, 3, 4)  # [P, L, 2, K, H]
        rows = np.ascontiguousarray(both, np.float32)
        return {TENSOR: rows.reshape(self.num_virtual_tokens, -1)}


def _tree(own: dict[str, Any]) -> dict[str, Any]:
    return {"blocks": {"attention": {"prefix": own}}}
