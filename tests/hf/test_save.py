"""Models go out: transformers loads them, and a save is whole or absent."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.checksums import SUMS
from jaxalign.errors import UserError
from jaxalign.folders import whole_folder
from jaxalign.hf.files import read_json, write_json
from jaxalign.hf.load import abstract_params, load_params, load_spec
from jaxalign.hf.save import save_base
from jaxalign.sharding import make_mesh, shard_tree
from tests.hf.conftest import HF_MODELS, LLAMA, assert_same_tree, hf_model, random_params


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HF_MODELS)
def test_out_of_transformers_and_back(tmp_path, name, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    model = hf_model(name, dtype)
    model.save_pretrained(tmp_path / "theirs")
    spec = load_spec(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", spec, getattr(jnp, dtype))
    save_base(tmp_path / "ours", params, spec, max_shard_bytes=30_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not any(report.values()), report
    weights, expected = again.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        assert weights[key].dtype == weight.dtype
        assert torch.equal(weights[key], weight), key
    # Equal weights could still be run with other facts (theta, epsilon, scaling): compare outputs.
    tokens = torch.arange(90).reshape(1, 90)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert load_spec(tmp_path / "ours") == spec


def test_sharded_arrays_are_gathered(tmp_path):
    shardings = shard_tree(make_mesh(1, 4, 2), abstract_params(LLAMA, jnp.bfloat16))
    params = random_params(LLAMA, jnp.bfloat16)
    save_base(tmp_path / "m", jax.device_put(params, shardings), LLAMA)
    assert_same_tree(params, load_params(tmp_path / "m", LLAMA, jnp.bfloat16))


def test_shards_and_index(tmp_path):
    limit = 20_000
    save_base(tmp_path / "m", random_params(LLAMA), LLAMA, max_shard_bytes=limit)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        tensors = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert nbytes <= limit
        total += nbytes
    assert index["metadata"]["total_size"] == total


def test_a_smaller_save_leaves_no_old_shards(tmp_path):
    folder = tmp_path / "m"
    save_base(folder, random_params(LLAMA), LLAMA, max_shard_bytes=20_000)
    (folder / "notes.txt").write_text("mine")
    save_base(folder, random_params(LLAMA, seed=1), LLAMA)
    assert {file.name for file in folder.iterdir()} == {
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "notes.txt",
    }
    assert_same_tree(random_params(LLAMA, seed=1), load_params(folder, LLAMA, jnp.float32))


def test_tokenizer_comes_along(tmp_path):
    source = tmp_path / "base"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "x.bin"):
        (source / name).write_text("{}")
    save_base(tmp_path / "m", random_params(LLAMA), LLAMA, tokenizer_from=source)
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("before", ["nothing", "an older save"])
def test_an_interrupted_save_changes_nothing(tmp_path, before, monkeypatch):
    folder = tmp_path / "m"
    if before == "an older save":
        save_base(folder, random_params(LLAMA), LLAMA)
    calls = []

    def write_file(file, tensors):
        calls.append(file)
        file.write_bytes(b"half")
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("jaxalign.hf.stream.write_file", write_file)
    with pytest.raises(KeyboardInterrupt):
        save_base(folder, random_params(LLAMA, seed=1), LLAMA, max_shard_bytes=20_000)
    left = ["m"] if before == "an older save" else []
    assert [path.name for path in tmp_path.iterdir()] == left
    if before == "an older save":
        assert_same_tree(random_params(LLAMA), load_params(folder, LLAMA, jnp.float32))


def test_other_peoples_folders_are_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis: .*config\.json"):
        save_base(tmp_path / "thesis", random_params(LLAMA), LLAMA)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file"):
        save_base(tmp_path / "file", random_params(LLAMA), LLAMA)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_folder_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").mkdir()
    with whole_folder(tmp_path / "deep" / "m", "update", markers=["x"]) as folder:
        (folder / "x").touch()
    assert (tmp_path / "deep" / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_tree_of_another_model_is_a_bug_of_the_caller(tmp_path):
    params = random_params(LLAMA)
    params["head"] = np.zeros((7, 7), np.float32)
    with pytest.raises(ValueError, match=r"head is \(7, 7\), expected \(96, 32\)"):
        save_base(tmp_path / "m", params, LLAMA)
    assert not (tmp_path / "m").exists()


def test_keys_that_nobody_here_knows_stay(tmp_path):
    save_base(tmp_path / "base", random_params(LLAMA), LLAMA)
    (tmp_path / "base" / SUMS).unlink()
    file = tmp_path / "base" / "config.json"
    own = {"of_its_own": [1], "pretraining_tp": 1, "auto_map": {"AutoModel": "own.Own"}}
    write_json(file, read_json(file) | own)
    write_json(tmp_path / "base" / "generation_config.json", {"eos_token_id": [7]})
    spec = load_spec(tmp_path / "base")
    assert spec.eos_ids == (2, 3, 7)
    params = random_params(LLAMA, jnp.bfloat16)
    save_base(tmp_path / "m", params, spec, tokenizer_from=tmp_path / "base")
    written = read_json(tmp_path / "m" / "config.json")
    assert written["of_its_own"] == [1] and written["torch_dtype"] == "bfloat16"
    assert "auto_map" not in written  # the code is not copied, so nobody should look for it
    assert load_spec(tmp_path / "m") == spec
    # A model of other facts than the base's is described by its own.
    other = dataclasses.replace(spec, rope_theta=1e4)
    save_base(tmp_path / "other", params, other, tokenizer_from=tmp_path / "base")
    assert load_spec(tmp_path / "other").rope_theta == 1e4
    assert "of_its_own" not in read_json(tmp_path / "other" / "config.json")


@pytest.mark.parametrize("place", ["a file", "below a file", "a read-only folder"])
def test_places_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").touch()
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    out = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "m",
           "a read-only folder": locked / "m"}[place]  # fmt: skip
    if place == "a read-only folder" and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    with pytest.raises(UserError) as error:
        save_base(out, random_params(LLAMA), LLAMA)
    assert str(out) in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "file").read_bytes() == b""
