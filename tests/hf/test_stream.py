"""Tensors that are made one by one: the files are safetensors, and one tensor exists at a time."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxalign.errors import UserError
from jaxalign.hf.stream import Pending, finite, write_file, write_shards
from jaxalign.hf.tensors import open_index


def pending(name, array, log=None):
    def make():
        if log is not None:
            log.append(name)
        return array

    return Pending(name, array.shape, array.dtype, make)


@pytest.fixture
def tensors():
    numbers = np.random.default_rng(0)
    return {
        "a": numbers.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "b": numbers.standard_normal((7,)).astype(np.float32),
        "c": numbers.standard_normal((2, 2, 3)).astype(np.float16),
        "d": numbers.standard_normal((4, 6)).T.astype(np.float64),
        "e": np.asfortranarray(numbers.standard_normal((4, 6)).astype(np.float32)),
        "empty": np.zeros((0, 3), np.float32),
    }


def test_the_library_reads_it(tmp_path, tensors):
    file = tmp_path / "x.safetensors"
    write_file(file, [pending(name, array) for name, array in tensors.items()])
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    with safe_open(file, "np") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned(tmp_path, tensors):
    file = tmp_path / "x.safetensors"
    write_file(file, [pending(name, array) for name, array in tensors.items()])
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert length % 8 == 0
    header = json.loads(file.read_bytes()[8 : 8 + length])
    for name, array in tensors.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


@pytest.mark.torch
def test_torch_reads_bfloat16(tmp_path, tensors):
    import torch
    from safetensors.torch import load_file as load_torch

    write_file(tmp_path / "x", [pending("a", tensors["a"]), pending("b", tensors["b"])])
    found = load_torch(tmp_path / "x")
    assert found["a"].dtype == torch.bfloat16
    np.testing.assert_array_equal(found["a"].float().numpy(), tensors["a"].astype(np.float32))


def test_one_at_a_time(tmp_path, tensors):
    """A tensor is asked for after the one before it has been written, and let go."""
    alive = []

    def make(array):
        assert not any(ref() is not None for ref in alive)
        copy = array.copy()
        import weakref

        alive.append(weakref.ref(copy))
        return copy

    write_file(
        tmp_path / "x",
        [
            Pending(str(i), tensors["b"].shape, tensors["b"].dtype, lambda: make(tensors["b"]))
            for i in range(5)
        ],
    )
    assert len(alive) == 5


def test_shards(tmp_path, tensors):
    log = []
    arrays = {f"t{i}": np.full(100, i, np.float32) for i in range(5)}
    todo = [pending(name, array, log) for name, array in arrays.items()]
    write_shards(tmp_path, todo, 900)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert log == list(arrays)
    for name, stored in open_index(tmp_path, "model").items():
        np.testing.assert_array_equal(stored.view(), arrays[name])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"]["t4"] == files[2]


def test_one_file_has_no_index(tmp_path):
    write_shards(tmp_path, [pending("a", np.zeros(9, np.float32))], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_process_that_only_helps(tmp_path):
    log = []
    write_shards(None, [pending(name, np.zeros(3, np.float32), log) for name in "abc"], 20)
    assert log == ["a", "b", "c"]


def test_what_was_announced(tmp_path):
    wrong = Pending("a", (3,), np.dtype(np.float32), lambda: np.zeros(3, np.float64))
    with pytest.raises(ValueError, match=r"a came out as float64 .*float32"):
        write_file(tmp_path / "x", [wrong])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(dtype, value):
    array = np.ones((3, 5), dtype)
    good = finite(pending("a.weight", array), "mend it")
    np.testing.assert_array_equal(good.make(), array)
    array[2, 4] = value
    with pytest.raises(UserError, match=r"tensor a\.weight holds NaN"):
        good.make()
