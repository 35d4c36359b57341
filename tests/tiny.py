"""A tiny model with a real byte-level tokenizer, and real rows of the shipped demo data."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxalign.checksums import seal
from jaxalign.config import load
from jaxalign.hf.load import fingerprint
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec
from tests.data.conftest import CHATML_TEMPLATE, build

ASSETS = Path(__file__).resolve().parents[1] / "jaxalign" / "demo" / "assets" / "data"
SPEC = ModelSpec(
    family="llama", vocab=900, dim=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=48,
    norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, qkv_bias=False, o_bias=False,
    mlp_bias=False, tied=True, max_position=512, bos_id=None, eos_ids=(2,), pad_id=0,
)  # fmt: skip


def few(every, *quick):
    """Parameters of a test, all but these slow: one or two of a kind are enough for every day."""
    slow = lambda one: pytest.param(  # noqa: E731
        *(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow
    )
    return [one if one in quick else slow(one) for one in every]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder in Hugging Face layout: random weights, working tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build(
        folder / "tokenizer",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos="<|im_end|>",
        pad="<|endoftext|>",
        template=CHATML_TEMPLATE,
        lines=(ASSETS / "train.en.jsonl").read_text("utf-8").splitlines()[:500],
        size=SPEC.vocab,
    )
    params = Decoder(SPEC).init(jax.random.key(0))
    save_base(folder / "base", params, SPEC, tokenizer_from=tokenizer)
    return str(folder / "base")


def of_run(adapter, folder, base_then, quantize="none"):
    """A copy of an adapter as a run left it in `folder`, with the record of its base."""
    shutil.copytree(adapter, Path(folder, "adapter"))
    record = {
        "inputs": {"model.path": fingerprint(base_then)},
        "config": {"model": {"quantize": quantize}},
    }
    Path(folder, "result.json").write_text(json.dumps(seal(record)))
    return f"{folder}/adapter"


def lower_case(folder):
    """Edits the tokenizer of a base in place: capitals are no longer read."""
    Path(folder, "SHA256SUMS").unlink()  # most folders of the hub have none
    file = Path(folder, "tokenizer.json")
    content = json.loads(file.read_text("utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content), "utf-8")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A few real rows: task.jsonl, pairs.jsonl."""
    folder = tmp_path_factory.mktemp("rows")
    for name, source in (("task", "train.en"), ("pairs", "pairs_xsid")):
        lines = (ASSETS / f"{source}.jsonl").read_text("utf-8").splitlines()[:64]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture
def configure(base, rows, tmp_path):
    """words -> Config of a small run on one device into a fresh folder."""

    def build_config(*words: str):
        settings = [
            f"output={tmp_path / 'run'}", f"model.path={base}", "model.dtype=float32",
            "model.remat=none", "task.kind=intent_slots", f"task.train=[{rows}/task.jsonl]",
            f"task.valid=[{rows}/task.jsonl]", f"align.train=[{rows}/pairs.jsonl]",
            f"align.valid=[{rows}/pairs.jsonl]", "align.layer=2", "batch.size=8", "batch.pairs=8",
            "batch.accumulate=2", "batch.max_length=128", "batch.pair_max_length=48",
            "prompt.system=''",
            "batch.buckets=[128]", "lora.r=4", "optim.schedule=constant", "optim.warmup_ratio=0",
            "optim.learning_rate=0.01", "train.steps=6", "train.eval_every=3",
            "train.eval_batches=2", "train.log_every=1", "checkpoint.every=3", "mesh.data=1",
            "mesh.fsdp=-1", "log.progress=none",
        ]  # fmt: skip
        return load(None, [*settings, *words]).config

    return build_config
