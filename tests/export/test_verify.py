"""Verification passes what is right and refuses what is not; nothing that failed is kept."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.export import run as runs
from jaxalign.export import verify as verifying
from jaxalign.export.request import Request
from jaxalign.export.run import export


def numbers(text):
    """difference, bound, agreement in percent of the line that --verify prints."""
    line = next(line for line in text.splitlines() if line.startswith("verified"))
    found = re.search(r"at most (\S+) \(bound (\S+)\).*agreement ([\d.]+)%", line)
    return line, *map(float, found.groups())


@pytest.mark.torch
@pytest.mark.parametrize(
    "words",
    [
        ("--format", "peft"),
        ("--format", "merged"),
        pytest.param(("--format", "merged", "--dtype", "float32"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_by_transformers(run, llama_base, done, words):
    out, _ = run(f"model.path={llama_base}", "prompt.template=llama3_paper")
    line, difference, bound, agreement = numbers(done("export", out, "--verify", *words))
    assert "verified by transformers " in line and ("peft " in line) == ("peft" in words)
    assert difference <= bound
    assert agreement == 100 or ("merged" in words and agreement > 90)
    moved = float(line.split("moves them by ")[1].split(";")[0])
    assert moved > 10 * difference


@pytest.mark.parametrize("form", ["peft", "merged", "orbax"])
def test_by_our_own_reader(run, llama_base, done, form, monkeypatch, tmp_path):
    monkeypatch.setattr(verifying, "_installed", lambda *packages: False)
    words = f"model.path={llama_base}", "lora.ranks={down: 2}"
    _, trained = run(*words)
    trained["blocks"]["mlp"]["down"]["a"][..., 2:] = -0.0  # as a product with a negative number
    out, _ = run(*words, f"output={tmp_path}/again", trained=trained)
    line, difference, bound, _ = numbers(done("export", out, "--verify", "--format", form))
    assert "verified by jaxalign" in line and difference <= bound


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("words", [("lora.variant=dora",), ("lora.ranks={down: 2}",)], ids=str)
def test_variants(run, done, words):
    out, _ = run(*words)
    for form in ("peft", "merged"):
        _, difference, bound, agreement = numbers(done("export", out, "--verify", "--format", form))
        assert difference <= bound and agreement == 100


@pytest.mark.torch
def test_all_weights(run, done):
    out, _ = run("trainable=full")
    line, _, _, agreement = numbers(done("export", out, "--format", "merged", "--verify"))
    assert agreement == 100 and "moves them" not in line


@pytest.fixture
def spoil(monkeypatch):
    """Changes a tensor of what has been written, before it is verified."""

    def arrange(out, form, name, change):
        real = runs.card_facts
        file = {"peft": "adapter_model.safetensors", "merged": "model.safetensors"}[form]

        def facts(*args, **how):
            (folder,) = Path(out, "export").glob(f".{form}.*.partial/new")
            tensors = load_file(folder / file)
            for key in tensors:
                if key.endswith(name):
                    tensors[key] = change(tensors[key])
            save_file(tensors, folder / file, metadata={"format": "pt"})
            return real(*args, **how)

        monkeypatch.setattr(runs, "card_facts", facts)

    return arrange


@pytest.mark.torch
@pytest.mark.parametrize("reader", ["torch", "own"])
def test_an_adapter_that_loads_as_nothing(run, monkeypatch, told, spoil, reader):
    """B is lost: within the wide bound of a weak adapter, and refused all the same."""
    if reader == "own":
        monkeypatch.setattr(verifying, "_installed", lambda *packages: False)
    monkeypatch.setattr(verifying, "BOUNDS", dict.fromkeys(verifying.BOUNDS, 1e9))
    out, _ = run()
    spoil(out, "peft", "lora_B.weight", np.zeros_like)
    error = told("export", out, "--verify")
    assert "no effect" in error
    assert not Path(out, "export", "peft").exists()


def test_one_bit_of_a_factor(run, monkeypatch, told, spoil):
    """No logit shows the last bit of one number; the adapter's file is compared bit by bit."""
    monkeypatch.setattr(verifying, "_installed", lambda *packages: False)
    out, _ = run()

    def flip(tensor):
        tensor.view(np.uint32)[1, 2] ^= 1
        return tensor

    spoil(out, "peft", "2.mlp.up_proj.lora_A.weight", flip)
    error = told("export", out, "--verify")
    assert "blocks/mlp/up/a " in error
    assert not Path(out, "export", "peft").exists()


@pytest.mark.torch
@pytest.mark.parametrize("form", ["peft", "merged"])
def test_weights_that_differ(run, told, spoil, form):
    out, _ = run()
    name = {"peft": "1.self_attn.q_proj.lora_B.weight", "merged": "1.mlp.up_proj.weight"}[form]
    spoil(out, form, name, lambda tensor: tensor * 1.5)
    error = told("export", out, "--format", form, "--verify")
    assert "read by transformers" in error
    assert "logits differ by" in error and "float32 allows" in error
    assert not Path(out, "export", form).exists()


def test_a_tokenizer_that_prompts_otherwise(run, llama_base, monkeypatch):
    out, _ = run(f"model.path={llama_base}", "prompt.template=llama3_paper")
    monkeypatch.setattr(verifying, "_installed", lambda *packages: False)
    # The base's own template instead of the paper's: one newline a turn is missing.
    monkeypatch.setattr(runs, "template_files", lambda *_: {})
    with pytest.raises(UserError, match="tokenizer gives other tokens"):
        export(Request(out, verify=True))


def test_bounds_name_every_dtype():
    assert set(verifying.BOUNDS) == {"float32", "float16", "bfloat16"}
    # Rounding to p bits moves a weight by up to 2^-p of itself; logits sum many of them.
    assert verifying.BOUNDS["float16"] > 2.0**-11
    assert verifying.BOUNDS["bfloat16"] > 2.0**-8
