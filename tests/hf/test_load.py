"""Bases come in: the same bits whatever the files and the mesh, a sentence for what is wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jaxalign.checksums import SUMS
from jaxalign.errors import UserError
from jaxalign.hf import load
from jaxalign.hf.leaf import by_rows
from jaxalign.hf.load import abstract_params, fingerprint, load_params, load_spec
from jaxalign.hf.pending import merged_tensors
from jaxalign.hf.save import save_base
from jaxalign.model.spec.tensors import base_rows, get_leaf, parameter_count, sizes
from jaxalign.sharding import make_mesh, shard_tree
from tests.hf.conftest import HF_MODELS, LLAMA, assert_same_tree, hf_model, random_params
from tests.parity.golden import find

GOLDEN = find("case.json")


def rewrite(file, change):
    """Save a safetensors file again with its dict of tensors changed in place."""
    (file.parent / SUMS).unlink(missing_ok=True)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(folder, spec=LLAMA) -> str:
    with pytest.raises(UserError) as error:
        load_params(folder, spec, jnp.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize("name", HF_MODELS)
def test_every_tensor_of_a_transformers_model(tmp_path, name, shards, dtype):
    import torch

    model = hf_model(name, dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "many" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "many")
    spec = load_spec(tmp_path)
    params = load_params(tmp_path, spec, getattr(jnp, dtype))
    assert parameter_count(spec) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameter_count(spec) == sum(weight.numel() for weight in model.parameters())
    seen = set()
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and spec.tied:
            continue
        row, layer = next(
            (row, layer)
            for row in base_rows(spec)
            for layer in range(spec.layers if row.stacked else 1)
            if row.name(layer) == name
        )
        leaf = np.asarray(get_leaf(params, row.path))
        back = row.to_hf(leaf[layer] if row.stacked else leaf, sizes(spec))
        bits = torch.from_numpy(back.view(f"u{back.itemsize}").copy())
        assert torch.equal(bits.view(weight.dtype), weight), name
        seen.add(name)
    assert len(seen) == sum(spec.layers if row.stacked else 1 for row in base_rows(spec))


@pytest.mark.skipif(not GOLDEN, reason="no golden cases here")
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_models(name):
    folder = GOLDEN[name].parent / "model"
    spec = load_spec(folder)
    params = load_params(folder, spec, jnp.float32)
    stored = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(params["norm"]["scale"], stored["model.norm.weight"])
    np.testing.assert_array_equal(
        params["blocks"]["mlp"]["down"]["kernel"][1],
        stored["model.layers.1.mlp.down_proj.weight"].T,
    )


def test_dtypes_are_converted_on_the_way(tmp_path):
    params = random_params(LLAMA, jnp.float32)
    save_base(tmp_path / "m", params, LLAMA)
    loaded = load_params(tmp_path / "m", LLAMA, jnp.bfloat16)
    assert_same_tree(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), loaded)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)], ids=str)
def test_any_mesh_gives_the_same_arrays(model, shape):
    assert jax.device_count() == 8
    mesh = make_mesh(*shape)
    shardings = shard_tree(mesh, abstract_params(LLAMA, jnp.float32))
    params = load_params(model, LLAMA, jnp.float32, shardings)
    assert_same_tree(random_params(LLAMA), params)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_leaves_split_over_layers_and_one_sharding_for_all(model):
    mesh = make_mesh(1, 8, 1)
    whole = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda _: whole, abstract_params(LLAMA, jnp.float32))
    devices = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("layers",))
    shardings["blocks"] = jax.tree.map(
        lambda _: NamedSharding(devices, P("layers")), shardings["blocks"]
    )
    assert_same_tree(random_params(LLAMA), load_params(model, LLAMA, jnp.float32, shardings))
    params = load_params(model, LLAMA, jnp.float32, whole)
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(params))


def test_stop_ids_of_the_generation_config_are_added(model):
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert load_spec(model).eos_ids == (2, 3, 7)


def test_old_leftovers_are_ignored(tmp_path):
    tied = dataclasses.replace(LLAMA, tied=True)
    save_base(tmp_path / "m", random_params(tied), tied)
    plain = fingerprint(tmp_path / "m")
    rewrite(
        tmp_path / "m" / "model.safetensors",
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            }
        ),
    )
    params = load_params(tmp_path / "m", tied, jnp.float32)
    assert_same_tree(random_params(tied), params)
    assert fingerprint(tmp_path / "m") == plain


HEADS = {
    "everywhere": lambda embed: embed + 1,
    "later rows": lambda embed: embed + np.eye(*embed.shape, k=-60, dtype=np.float32),
    "dtype too": lambda embed: (embed + 1).astype(np.float16),
    "rounded": lambda embed: embed.astype(np.float16),
    "shape": lambda embed: embed[:-1],
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_tied_head_of_its_own_is_two_models(tmp_path, monkeypatch, head):
    """Transformers 4 ties it, transformers 5 does not."""
    monkeypatch.setattr(load, "_STRIP", 7 * LLAMA.dim)
    tied = dataclasses.replace(LLAMA, tied=True)
    save_base(tmp_path / "m", random_params(tied), tied)
    rewrite(
        tmp_path / "m" / "model.safetensors",
        lambda t: t.update({"lm_head.weight": head(t["model.embed_tokens.weight"])}),
    )
    said = refusal(tmp_path / "m", tied)
    assert "lm_head.weight differs from model.embed_tokens.weight" in said
    assert "to false" in said
    with pytest.raises(UserError, match="differs"):
        merged_tensors(tmp_path / "m", tied, {}, None)


def test_a_tied_head_in_another_precision(tmp_path):
    tied = dataclasses.replace(LLAMA, tied=True)
    save_base(tmp_path / "m", random_params(tied), tied)

    def widened(tensors):
        embed = tensors["model.embed_tokens.weight"].astype(np.float16)
        tensors |= {"model.embed_tokens.weight": embed, "lm_head.weight": embed.astype(np.float32)}

    rewrite(tmp_path / "m" / "model.safetensors", widened)
    load_params(tmp_path / "m", tied, jnp.float32)


# --- the fingerprint ----------------------------------------------------------------------------


def test_fingerprint_knows_the_weights_not_the_files(model, tmp_path, edit_json):
    first = fingerprint(model)
    assert first == fingerprint(model)
    save_base(tmp_path / "one_file", random_params(LLAMA), LLAMA)
    assert fingerprint(tmp_path / "one_file") == first
    edit_json(model / "config.json", transformers_version="9.9", eos_token_id=5)
    assert fingerprint(model) == first
    save_base(tmp_path / "other", random_params(LLAMA, seed=1), LLAMA)
    assert fingerprint(tmp_path / "other") != first
    edit_json(model / "config.json", rope_theta=10000.0)
    assert fingerprint(model) != first


# --- what is refused ----------------------------------------------------------------------------


def shard_of(model, name):
    return (
        model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    )


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(UserError, match=r"\./nowhere: "):
        load_spec("./nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_spec(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_spec(tmp_path / "empty")
    assert "holds neither model.safetensors nor" in refusal(tmp_path / "empty")


def test_hub_name_without_network(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_spec("someone/some-model")
    assert "someone/some-model: " in str(error.value)
    assert "downloaded folder" in str(error.value)


def test_hub_name_goes_to_the_hub_with_only_the_needed_files(model, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_spec("someone/some-model", revision="v2") == LLAMA
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "v2")
    facts = asked["allow_patterns"]
    assert "*.json" in facts and not any("safetensors" in pattern for pattern in facts)
    load_params("someone/some-model", LLAMA, jnp.float32, revision="v3")
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "v3")
    assert "model-00001-of-00004.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or "pth" in pattern for pattern in asked["allow_patterns"])


def test_broken_config(model):
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: "):
        load_spec(model)
    (model / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(UserError, match=rf"{model}: config.json: model_type 'bloom'"):
        load_spec(model)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin: pickled" in refusal(tmp_path)
    assert "safe_serialization=True" in refusal(tmp_path)


def test_missing_shard(model):
    name = "model.layers.1.mlp.up_proj.weight"
    file = shard_of(model, name)
    file.unlink()
    assert refusal(model).startswith(f"{file}: missing")


def test_index_that_lies(model):
    name = "model.layers.1.mlp.up_proj.weight"
    file = shard_of(model, name)
    rewrite(file, lambda tensors: tensors.pop(name))
    assert f"tensor {name} " in refusal(model)
    (model / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(model)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(model, keep):
    file = shard_of(model, "model.norm.weight")
    file.write_bytes(file.read_bytes()[:keep])
    assert refusal(model).startswith(f"{file}: cut short")


def test_git_lfs_pointer_instead_of_weights(model):
    file = shard_of(model, "model.norm.weight")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(model).startswith(f"{file}: cut short")


def one_file(tmp_path, change, spec=LLAMA):
    save_base(tmp_path / "m", random_params(spec), spec)
    rewrite(tmp_path / "m" / "model.safetensors", change)
    return tmp_path / "m"


def test_missing_tensor(tmp_path):
    name = "model.layers.2.self_attn.k_proj.weight"
    folder = one_file(tmp_path, lambda tensors: tensors.pop(name))
    assert f"tensor {name} is missing" in refusal(folder)


def test_missing_head(tmp_path):
    folder = one_file(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tensor lm_head.weight is missing" in refusal(folder)
    assert "tie_word_embeddings: true" in refusal(folder)


def test_wrong_shape(tmp_path):
    name = "model.layers.0.mlp.gate_proj.weight"
    folder = one_file(tmp_path, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    assert f"tensor {name} has shape [32, 48]" in refusal(folder)


def test_tensors_that_would_be_dropped_silently(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = one_file(tmp_path, lambda t: t.update({name: np.ones(32, np.float32)}))
    assert f"tensor {name} " in refusal(folder)


def test_more_layers_in_the_files_than_in_the_config(tmp_path, edit_json):
    folder = one_file(tmp_path, lambda tensors: None)
    edit_json(folder / "config.json", num_hidden_layers=2)
    assert "model.layers.2." in refusal(folder, load_spec(folder))


def test_quantized_weights(tmp_path):
    name = "model.layers.0.mlp.gate_proj.weight"
    folder = one_file(tmp_path, lambda t: t.update({name: t[name].astype(np.int8)}))
    assert f"tensor {name} is stored as I8" in refusal(folder)


def test_an_adapter_is_not_a_base(tmp_path):
    tensor = np.ones((4, 32), np.float32)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: tensor}, tmp_path / "model.safetensors")
    assert "an adapter, not a base" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("mesh", "swapped"),
    [
        # fsdp and seq split columns of q, k, v, gate and up, and rows of o and down; tensor the
        # others. Not swapped: four heads that eight devices, two that four would have to divide.
        ((1, 8, 1, 1), {"gate", "up"}),
        ((1, 2, 4, 1), {"k", "v", "o", "gate", "up", "down"}),
        ((2, 2, 2, 1), {"q", "o", "gate", "up", "down"}),
        ((2, 2, 1, 2), {"q", "gate", "up"}),
    ],
)
def test_processes_read_rows_and_swap_columns(tmp_path, monkeypatch, mesh, swapped):
    truth = random_params(LLAMA)
    save_base(tmp_path, truth, LLAMA)
    shardings = shard_tree(make_mesh(*mesh), abstract_params(LLAMA, jnp.float32))
    found = set()
    for row in base_rows(LLAMA):
        where = get_leaf(shardings, row.path)
        if (rows := by_rows(row, row.shape(sizes(LLAMA)), where)) is not where:
            found.add(row.path[-2])
            # One axis is split, that along which files are read, and nothing is held twice more.
            assert [axis for axis, names in enumerate(rows.spec) if names] == [row.outer + 1]
            assert rows.num_devices == where.num_devices
    assert found == swapped
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    params = load_params(tmp_path, LLAMA, jnp.float32, shardings)
    assert_same_tree(params, truth)
    for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
