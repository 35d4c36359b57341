"""Generation against transformers, and training of a small model.

Greedy answers of a model of Llama 3.2 1B's shape, random bfloat16 weights, 32 prompts of 128 tokens
with 128 new ones each; then updates of Gemma 3 270M's shape. `--model FOLDER` takes the weights of
a folder in Hugging Face layout for both.

    python benchmarks/gpu/real.py --seconds 200
    python benchmarks/gpu/real.py --model models/gemma3-270m
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from part import Part, Row, median_seconds, need_gpu
from shapes import LLAMA, Work, hf_config, least_flops, shrunk, spec_of

ROWS, PROMPT, NEW = 32, 128, 128
ONE_B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640,
    "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "sliding_window": 512, "tie_word_embeddings": True, "max_position_embeddings": 32768,
    "layer_types": [
        "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)
    ],
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "eos_token_id": 1, "bos_token_id": 2,
    "pad_token_id": 0, "attention_bias": False,
}  # fmt: skip
TRAINING = Work("task 32 x 256", "task", 1, 32, 256, 16)


def main() -> None:
    part = Part(__doc__, options)
    # Both sides share the card here, in two processes.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if part.options.side:
        part.measure("transformers", partial(transformers, part))
        return
    need_gpu(part)
    part.measure("generation, ours", partial(generation, part), need=25)
    part.measure("generation, transformers", partial(apart, part), need=20)
    name = f"{TRAINING.name}, {'the model' if part.options.model else 'Gemma 3 270M'}"
    part.measure(name, partial(training, part), need=30)


def options(parser: Any) -> None:
    parser.add_argument("--side", help="transformers: that side alone")


def facts(part: Part) -> dict[str, Any]:
    """The config.json of the model that generates."""
    if part.options.model:
        return json.loads((part.options.model / "config.json").read_text("utf-8"))
    return hf_config(LLAMA, part.rehearse) | ({} if part.rehearse else ONE_B)


def sizes(part: Part) -> tuple[int, int, int]:
    """Prompts, their tokens, new tokens."""
    return (4, 8, 8) if part.rehearse else (ROWS, PROMPT, NEW)


def prompts_of(part: Part) -> list[list[int]]:
    rows, prompt, _ = sizes(part)
    return np.random.default_rng(0).integers(3, 500, (rows, prompt)).tolist()


def speed(part: Part, run: Any) -> Row:
    """New tokens a second."""
    rows, _, new = sizes(part)
    began = time.monotonic()
    run()
    first = time.monotonic() - began
    seconds = median_seconds(run, most=3)
    return {"seconds": seconds, "tokens": rows * new, "first_s": round(first, 1)}


def generation(part: Part) -> Row:
    """Ours."""
    import jax.numpy as jnp
    import ours

    from jaxalign.generate import Decoding, generate
    from jaxalign.hf.load import load_params, load_spec
    from jaxalign.model.decoder import Decoder

    if folder := part.options.model:
        spec = load_spec(folder)
        params = load_params(folder, spec, jnp.bfloat16)
    else:
        spec = spec_of(facts(part))
        params = ours.random_weights(spec)
    rows, _, new = sizes(part)
    decoder, prompts = Decoder(spec), prompts_of(part)
    return speed(
        part,
        lambda: generate(
            decoder, params, None, prompts, Decoding(new), stop_ids=(), batch_size=rows
        ),
    )


def apart(part: Part) -> Row:
    """transformers' `generate`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        command = [sys.executable, __file__, "--side", "transformers", "--out", str(out)]
        command += ["--rehearse"] if part.rehearse else []
        command += ["--model", str(part.options.model)] if part.options.model else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(part.left, 1))
        if not out.exists():
            raise RuntimeError((done.stderr.strip().splitlines() or ["nothing was written"])[-1])
        (row,) = json.loads(out.read_text("utf-8"))
    return {name: value for name, value in row.items() if name not in ("what", "took")}


def transformers(part: Part) -> Row:
    """The other side."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cpu" if part.rehearse else "cuda"
    if part.options.model:
        model = AutoModelForCausalLM.from_pretrained(part.options.model, dtype=torch.bfloat16)
        model = model.to(device)
    else:
        given = facts(part)
        with torch.device(device):
            config = AutoConfig.for_model(given.pop("model_type"), **given)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()
    model.generation_config.eos_token_id = None
    tokens = torch.tensor(prompts_of(part), device=device)

    def run() -> None:
        with torch.inference_mode():
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=sizes(part)[2],
                do_sample=False,
                pad_token_id=0,
            )
        if device == "cuda":
            torch.cuda.synchronize()

    return speed(part, run)


def training(part: Part) -> Row:
    """Updates of a small model."""
    import jax.numpy as jnp
    import ours

    from jaxalign.hf.load import load_params, load_spec

    weights = None
    if folder := part.options.model:
        spec = load_spec(folder)
        weights = load_params(folder, spec, jnp.bfloat16)
    else:
        spec = spec_of(hf_config(LLAMA, True) if part.rehearse else GEMMA)
    work = shrunk(TRAINING) if part.rehearse else TRAINING
    one = ours.Ours(spec, work, "names", weights)
    compiled = one.compile()
    loss = one.run()
    return {
        "loss": round(loss, 4),
        "compile_s": round(compiled, 1),
        "seconds": median_seconds(one.run),
        "tokens": work.tokens,
        "flops": least_flops(spec, work),
        "memory_gb": round(one.memory / 1e9, 2),
    }


if __name__ == "__main__":
    main()
