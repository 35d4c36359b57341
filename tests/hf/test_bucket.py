"""Bases and adapters in a bucket, read from an emulator of Google Cloud Storage on this machine."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxalign import bucket as ours
from jaxalign import cli
from jaxalign.adapters.lora import Lora
from jaxalign.checksums import seal
from jaxalign.config import to_yaml
from jaxalign.data.template import recorded
from jaxalign.errors import UserError
from jaxalign.hf.find import locate
from jaxalign.hf.load import abstract_params, fingerprint, load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft, trained_on, weights_digest
from jaxalign.hf.save import save_base
from jaxalign.paths import unfinished
from jaxalign.settings import Config
from jaxalign.sharding import make_mesh, shard_tree
from tests.hf.conftest import LLAMA, assert_same_tree, random_lora, random_params


@pytest.fixture(scope="module")
def stored(bucket, tmp_path_factory):
    """A folder of this machine, and its copy in the bucket: a base in shards and an adapter."""
    folder = tmp_path_factory.mktemp("stored")
    save_base(folder / "model", random_params(LLAMA), LLAMA, max_shard_bytes=40_000)
    save_peft(folder / "adapter", random_lora(LLAMA), LLAMA, Lora(4, 8.0, 0.1))
    for name in ("model", "adapter"):
        bucket.put(f"{folder / name}/", f"bucket/stored/{name}/", recursive=True)
    return folder, "gs://bucket/stored"


@pytest.fixture
def requests(monkeypatch):
    """What was read of weights: (file, first byte, last byte + 1)."""
    seen = []
    real = ours.BucketFile.read

    def read(self, start, stop):
        if self.address.endswith(".safetensors"):
            seen.append((self.address, start, stop))
        return real(self, start, stop)

    monkeypatch.setattr(ours.BucketFile, "read", read)
    return seen


@pytest.mark.parametrize("mesh", [None, (1, 4, 2), (2, 2, 1, 2)])
def test_a_base_is_that_of_the_folder(stored, requests, mesh):
    folder, address = stored
    spec = load_spec(f"{address}/model")
    assert spec == load_spec(folder / "model")
    shardings = None
    if mesh:
        shardings = shard_tree(make_mesh(*mesh), abstract_params(spec, jnp.float32))
    params = load_params(f"{address}/model", spec, jnp.float32, shardings)
    assert_same_tree(params, load_params(folder / "model", spec, jnp.float32))
    # Every byte once, whatever the mesh: all devices are of this process.
    read = sum(stop - start for _, start, stop in requests)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    headers = sum(stop - start for _, start, stop in requests if start in (0, 8))
    assert read == size + headers
    assert fingerprint(f"{address}/model/") == fingerprint(folder / "model")


def test_a_range_comes_in_parts(stored, monkeypatch):
    folder, address = stored
    monkeypatch.setattr(ours, "_CHUNK", 1000)
    name = next((folder / "model").glob("*.safetensors")).name
    file = ours.left_in_bucket(ours.copied(f"{address}/model"))[name]
    assert file.size == (folder / "model" / name).stat().st_size
    for start, stop in ((0, 8), (17, 5_033), (file.size - 3, file.size), (5, 5)):
        assert file.read(start, stop) == (folder / "model" / name).read_bytes()[start:stop]


def test_an_adapter_is_that_of_the_folder(stored):
    folder, address = stored
    found, kept = load_peft(f"{address}/adapter", LLAMA), load_peft(folder / "adapter", LLAMA)
    assert_same_tree(found[0], kept[0])
    assert found[1] == kept[1]
    assert weights_digest(f"{address}/adapter") == weights_digest(str(folder / "adapter"))


def test_what_cannot_be_read_is_refused(stored, bucket, monkeypatch, capsys):
    folder, address = stored
    with pytest.raises(UserError, match="s3://b/x: addresses of this kind are not read; give a fo"):
        load_spec("s3://b/x")
    with pytest.raises(UserError, match=r"gs://bucket/absent: cannot be read"):
        load_spec("gs://bucket/absent")
    words = [f"{address}/adapter", "--base", "gs://bucket/absent", "--out", "out"]
    assert cli.main(["import", *words]) == 2
    assert "gs://bucket/absent: cannot be read" in capsys.readouterr().err
    # One shard is gone after the list was made.
    names = sorted(file.name for file in (folder / "model").glob("*.safetensors"))
    bucket.put(f"{folder / 'model'}/", "bucket/broken/", recursive=True)
    load_spec("gs://bucket/broken")
    bucket.rm(f"bucket/broken/{names[0]}")
    with pytest.raises(UserError, match=rf"gs://bucket/broken/{names[0]}: cannot be read"):
        load_params("gs://bucket/broken", LLAMA, jnp.float32)
    ours._storage.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gcsfs is missing; .*'jaxalign\[gcs\]'"):
        load_spec("gs://bucket/other")
    ours._storage.cache_clear()


def test_the_record_beside_an_adapter_is_read(stored, bucket):
    """Its instruction and base, and that its run is not finished: as beside a folder's."""
    folder, _ = stored
    run = "bucket/run"
    bucket.put(f"{folder / 'adapter'}/", f"{run}/adapter/", recursive=True)
    config = Config()
    config.prompt.system = "Find it."
    bucket.pipe(f"{run}/config.yaml", to_yaml(config).encode())
    bucket.pipe(f"{run}/checkpoints/7/state", b"1")
    ours.copied.cache_clear()
    copy = locate("gs://bucket/run/adapter/")
    assert recorded(copy).prompt.system == "Find it."
    assert trained_on(copy) == ""
    assert unfinished(copy, ours.origin(copy)) == (
        "note: the run in gs://bucket/run is not finished, so gs://bucket/run/adapter may be older "
        "than its checkpoints; `jaxalign export gs://bucket/run --step latest` writes the newest "
        "weights"
    )
    bucket.pipe(
        f"{run}/result.json", json.dumps(seal({"inputs": {"model.path": "of the base"}})).encode()
    )
    ours.copied.cache_clear()
    copy = locate("gs://bucket/run/adapter")
    assert trained_on(copy) == "of the base"
    assert unfinished(copy, ours.origin(copy)) == ""
