"""Tiny models: written by ourselves (no torch) or by real transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.peft import adapter_rows
from jaxalign.checksums import SUMS
from jaxalign.hf.load import abstract_params
from jaxalign.hf.save import save_base
from jaxalign.model.spec import ModelSpec, RopeScaling
from jaxalign.model.spec.tensors import set_leaf, sizes

LLAMA = ModelSpec(
    family="llama",
    vocab=96,
    dim=32,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=48,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    tied=False,
    max_position=256,
    bos_id=1,
    eos_ids=(2, 3),
    pad_id=None,
)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def random_params(spec: ModelSpec, dtype=jnp.float32, seed: int = 0):
    """NumPy parameters, every number different from its neighbours."""
    numbers = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: numbers.standard_normal(leaf.shape).astype(leaf.dtype),
        abstract_params(spec, dtype),
    )


def random_lora(spec: ModelSpec, r: int = 4, targets=TARGETS, blocks=None, seed: int = 0):
    """A NumPy adapter tree, zero outside `blocks`."""
    numbers = np.random.default_rng(seed)
    lora: dict = {}
    for target in targets:
        for row in adapter_rows(target):
            leaf = numbers.standard_normal(row.shape(sizes(spec, r))).astype(np.float32)
            for layer in range(spec.layers):
                if blocks and layer + 1 not in blocks:
                    leaf[layer] = 0
            set_leaf(lora, row.path, leaf)
    return lora


def assert_same_tree(ours, theirs):
    """Same paths, dtypes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert left.dtype == right.dtype, path
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=str(path))


@pytest.fixture
def model(tmp_path) -> Path:
    """A small Llama folder of our own, in four files, to spoil: nothing tells its hashes."""
    save_base(tmp_path / "model", random_params(LLAMA), LLAMA, max_shard_bytes=40_000)
    (tmp_path / "model" / SUMS).unlink()
    return tmp_path / "model"


@pytest.fixture
def edit_json() -> Callable:
    """Change keys of a JSON file; None removes the key, and nothing tells the folder's hashes."""

    def edit(file: Path, **changes):
        (file.parent / SUMS).unlink(missing_ok=True)
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


HF_MODELS = {
    "llama3_scaled": ("llama", {"rope": "llama3", "tie_word_embeddings": False}),
    "llama32_tied": ("llama", {"rope": "llama3", "tie_word_embeddings": True, "head_dim": 16}),
    "llama_linear_biases": (
        "llama",
        {"rope": "linear", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2_untied": ("qwen2", {"rope": "default", "tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {"rope": "default", "tie_word_embeddings": True}),
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def hf_model(name: str, dtype: str = "float32"):
    """A random transformers model with noise on biases and norms, which it initialises alike."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, facts = HF_MODELS[name]
    facts = dict(facts)
    config = AutoConfig.for_model(
        family,
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=[2, 3],
        rope_parameters=ROPES[facts.pop("rope")],
        **facts,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()
