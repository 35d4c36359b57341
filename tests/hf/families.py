"""A tiny random transformers model of every family, in which every fact of the family shows.

Windows are shorter than the texts, caps bend what they cap, heads are wider than the model shared
among them, and norms, biases and embeddings are random where transformers starts with ones and
zeros.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.hf.load import load_params, load_spec

LAYERS, VOCAB, WINDOW = 4, 96, 7
LENGTHS = (40, 23, 5)  # of the texts in a batch: past the window, past a second one, within it
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
GEMMA2 = ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0})
GEMMA3 = (
    "gemma3_text",
    GEMMA
    | {
        "sliding_window_pattern": 3,  # layers 1, 2 and 4 have the window
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
)
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW}
MODELS = {
    "llama": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", WINDOWED | {"max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_tied_bias_window": (
        "qwen3",
        WINDOWED
        | {
            "head_dim": 16,
            "max_window_layers": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mistral_tied_full": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "gemma2": GEMMA2,
    "gemma2_untied": (GEMMA2[0], GEMMA2[1] | {"tie_word_embeddings": False}),
    "gemma3": GEMMA3,
    "gemma3_untied": (GEMMA3[0], GEMMA3[1] | {"tie_word_embeddings": False}),
    "olmo2": ("olmo2", {}),
    "olmo2_tied_bias": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
}
# One of each family, for what takes longer.
EACH = ("qwen2_window", "qwen3", "mistral", "gemma2", "gemma3", "olmo2")


def models(*names: str, slow: tuple[str, ...] = ()):
    """Parameters for a fixture `pair`; the `slow` ones wait for -m slow."""
    later = (pytest.param(name, marks=pytest.mark.slow) for name in slow if name not in names)
    return pytest.mark.parametrize("pair", [*names, *later], indirect=True)


def family_config(name: str):
    """The transformers config of this row."""
    from transformers import AutoConfig

    family, facts = MODELS[name]
    return AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=0,
        **facts,
    )


def family_model(name: str):
    """The random transformers model of this row."""
    import torch
    from transformers import AutoModelForCausalLM

    config = family_config(name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)  # attention that looks somewhere, logits that differ
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def saved(name: str, folder, dtype=jnp.float32):
    """(the transformers model, our spec, our parameters), by way of files in `folder`."""
    model = family_model(name)
    model.save_pretrained(folder)
    spec = load_spec(folder)
    return model, spec, load_params(folder, spec, dtype)


def texts(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T], padded on the right, and which of them are real."""
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(4, VOCAB, (len(LENGTHS), LENGTHS[0]))
    real = np.arange(LENGTHS[0]) < np.array(LENGTHS)[:, None]
    return np.where(real, tokens, 0), real
