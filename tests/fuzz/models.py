"""What comes with models: config.json, adapters, weights; and files of answers."""

from __future__ import annotations

import functools
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from jaxalign.adapters.peft_config import PeftConfig
from jaxalign.data.tasks import Example
from jaxalign.evaluate.answers import Answers
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.predictions import read_predictions
from jaxalign.hf.files import read_json
from jaxalign.hf.load import load_spec
from jaxalign.hf.tensors import open_index
from tests.fuzz.odd import changed, damaged, written

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": 2,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
}  # fmt: skip
GEMMA = LLAMA | {
    "model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 64, "rope_scaling": None,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"], "bias": "none", "use_rslora": False, "use_dora": False,
    "layers_to_transform": [0, 1], "layers_pattern": None, "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {}, "modules_to_save": None, "base_model_name_or_path": "b",
    "fan_in_fan_out": False, "init_lora_weights": True,
}  # fmt: skip


def read_model(content: Any, folder: Path) -> None:
    (folder / "config.json").write_text(written(content), "utf-8")
    spec = load_spec(str(folder))
    sizes = (spec.vocab, spec.dim, spec.layers, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn)
    assert all(isinstance(size, int) and 0 < size < 2**31 for size in sizes)
    assert math.isfinite(spec.norm_eps) and math.isfinite(spec.rope_theta)


def read_adapter(content: Any, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(written(content), "utf-8")
    said = PeftConfig.of(folder / "adapter_config.json", read_json(folder / "adapter_config.json"))
    for block in range(3):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            module = f"model.layers.{block}.{name}"
            if said.adapts(module):
                assert type(said.rank(module)) is int and said.rank(module) > 0
                assert math.isfinite(said.alpha(module))
    assert 0 <= said.dropout < 1


@functools.cache
def stored() -> tuple[dict[str, Any], bytes]:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    header, body = {}, b""
    for name, array in arrays.items():
        end = len(body) + array.nbytes
        dtype = {"float32": "F32", "float16": "F16"}[array.dtype.name]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(body), end],
        }
        body += array.tobytes()
    return header | {"__metadata__": {"format": "pt"}}, body


def file_of(header: bytes, body: bytes, added: int = 0) -> bytes:
    """A safetensors file; `added` to the length that it says of its header."""
    return struct.pack("<q", len(header) + added) + header + body


@st.composite
def safetensors_files(draw: Any) -> bytes:
    header, body = stored()
    text = written(draw(changed(header))).encode()
    data = file_of(text, body, draw(st.sampled_from([0] * 20 + [1, -1, 8, 2**40, -5])))
    return draw(st.one_of(st.just(data), st.just(data), st.just(data), damaged(data)))


def read_weights(content: bytes, folder: Path) -> None:
    """What is taken is what the safetensors library takes, with the same numbers."""
    from safetensors import safe_open

    (folder / "model.safetensors").write_bytes(content)
    index = open_index(folder, "model")
    ours = {name: tensor.rows(0, tensor.shape[0]) if tensor.shape else None
            for name, tensor in index.items()}  # fmt: skip
    with safe_open(str(folder / "model.safetensors"), "np") as theirs:
        assert set(theirs.keys()) == set(ours)
        for name, array in ours.items():
            if array is not None:
                np.testing.assert_array_equal(array, theirs.get_tensor(name))


GOLDS = {"de": [Gold(Example(p, "a", "de", system=""), {"id": i}, str(i), "de")
                for i, p in enumerate(("eins", "zwei"))]}  # fmt: skip
PREDICTED = [
    {"language": "de", "id": "0", "answer": "x"},
    {"language": "de", "id": "1", "answer": "y"},
]
PREDICTED_LINES = "".join(json.dumps(row) + "\n" for row in PREDICTED).encode()
predictions = st.one_of(
    damaged(PREDICTED_LINES),
    changed(PREDICTED).filter(lambda d: isinstance(d, list)).map(
        lambda rows: "".join(written(row) + "\n" for row in rows).encode()
    ),
    damaged(b"x\ny\n"),
)  # fmt: skip


def read_predicted(value: tuple[bytes, str], folder: Path) -> None:
    content, name = value
    (folder / name).write_bytes(content)
    found = read_predictions(str(folder / name), GOLDS)
    assert len(found["de"]) == 2 and all(isinstance(text, str) for text in found["de"])


ANSWERED = "".join(
    json.dumps(row) + "\n"
    for row in (
        {"made_by": {"model": "m"}},
        {"key": "k-0", "answer": "x"},
        {"key": "k-1", "answer": "y"},
    )
).encode()


def read_answers(content: bytes, folder: Path) -> None:
    (folder / "answers.jsonl").write_bytes(content)
    known = Answers(folder / "answers.jsonl", {"model": "m"})
    assert all(isinstance(t, str) for pair in known.texts.items() for t in pair)
    known.add([("k-9", "neu")])
    assert Answers(folder / "answers.jsonl", {"model": "m"}).texts["k-9"] == "neu"
