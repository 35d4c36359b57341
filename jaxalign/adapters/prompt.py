"""Prompt tuning: trained vectors in front of the embeddings (Lester et al. 2021).

    [P_1, ..., P_P, E(x_1), ..., E(x_T)]             P [P, D]; nothing else is trained

The text begins at position P. Names and layout are PEFT's (PROMPT_TUNING): `prompt_embeddings`
[P, D], which stand behind the scale that Gemma gives its embeddings, as in transformers 5. They
begin as embeddings of random tokens (PEFT's SAMPLE_VOCAB).

    adapter = Prompt(16)
    adapter.init(spec, key, params)                  # {'prompt': [P, D]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.adapters.interface import Stored
from jaxalign.adapters.virtual import Virtual
from jaxalign.model.spec import ModelSpec

TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class Prompt(Virtual):
    """P vectors in front of the embeddings."""

    name: ClassVar[str] = "soft prompt"
    kind: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    # Sizes of the base that no tensor has, and how the vectors began.
    options: ClassVar[frozenset[str]] = frozenset({
        "num_layers", "num_attention_heads", "prompt_tuning_init", "prompt_tuning_init_text",
        "tokenizer_name_or_path", "tokenizer_kwargs",
    })  # fmt: skip

    @property
    def prompt_length(self) -> int:
        """See `Attached`."""
        return self.num_virtual_tokens

    def init(self, spec: ModelSpec, key: jax.Array, params: Any) -> dict[str, Any]:
        """Embeddings of random tokens, float32."""
        return {"prompt": words(spec, key, params, (self.num_virtual_tokens,))}

    def count(self, spec: ModelSpec) -> int:
        """P D."""
        return self.num_virtual_tokens * spec.dim

    def prompt(self, trained: Mapping[str, Any], x: jax.Array, asked: jax.Array) -> jax.Array:
        """See `Attached`."""
        return trained["prompt"][None]

    @classmethod
    def read(
        cls,
        file: Path,
        content: Mapping[str, Any],
        tensors: Callable[[], Mapping[str, Stored]],
        spec: ModelSpec,
    ) -> tuple[dict[str, Any], Self]:
        """See `Adapter`."""
        wanted = {"token_dim": spec.dim, "num_transformer_submodules": 1}
        count = cls.said(file, content, wanted)
        found = cls.held(file, tensors, {TENSOR: (count, spec.dim)})
        return {"prompt": found[TENSOR]}, cls(count)

    def config(self, spec: ModelSpec, base_name: str = "") -> dict[str, Any]:
        """See `Adapter`."""
        return self.written(
            base_name,
            num_layers=spec.layers,
            token_dim=spec.dim,
            num_attention_heads=spec.heads,
            num_transformer_submodules=1,
            prompt_tuning_init="RANDOM",
        )

    def tensors(self, trained: Mapping[str, Any], spec: ModelSpec) -> dict[str, np.ndarray]:
        """See `Adapter`."""
        shape = (self.num_virtual_tokens, spec.dim)
        if np.shape(trained["prompt"]) != shape:
            raise ValueError(f"a soft prompt of this base is {list(shape)}")
        return {TENSOR: np.asarray(trained["prompt"], np.float32)}


def words(spec: ModelSpec, key: jax.Array, params: Any, shape: tuple[int, ...]) -> jax.Array:
    """[*shape, D] float32: embeddings of random tokens, as they enter the first block."""
    found = params["embed"][jax.random.randint(key, shape, 0, spec.vocab)]
    return found.astype(jnp.float32) * spec.embed_scale
