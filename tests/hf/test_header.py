"""Damaged safetensors files are refused: by the library's rules, and never by fewer."""

import json
import random
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxalign.errors import UserError
from jaxalign.hf.header import BITS, parse_header
from jaxalign.hf.tensors import DTYPES, all_finite, open_index

A, B = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, {
    "dtype": "BF16", "shape": [4], "data_offsets": [24, 32],
}  # fmt: skip
ROOM = 32


def text(**entries) -> bytes:
    return json.dumps(entries).encode()


def write(folder, header: bytes, body: int = ROOM, length: int | None = None):
    length = len(header) if length is None else length
    content = struct.pack("<Q", length) + header + bytes(body)
    (folder / "model.safetensors").write_bytes(content)
    return folder / "model.safetensors"


def theirs(file) -> set[str] | None:
    """Names, by the library; None where it refuses."""
    try:
        with safe_open(file, "np") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError):
        return None


def ours(file) -> set[str] | None:
    try:
        return set(open_index(file.parent, "model"))
    except UserError as error:
        assert "\n" not in str(error)
        assert str(file) in str(error)
        return None


BROKEN = {
    "negative": text(a=A | {"data_offsets": [-24, 0]}, b=B | {"data_offsets": [0, 8]}),
    "overlapping": text(a=A, b=B | {"data_offsets": [20, 28]}),
    "the same bytes twice": text(a=A, b=A),
    "shifted": text(a=A | {"data_offsets": [1, 25]}, b=B | {"data_offsets": [25, 33]}),
    "a hole": text(a=A, b=B | {"shape": [2], "data_offsets": [28, 32]}),
    "a byte at the end": text(a=A, b=B | {"shape": [3], "data_offsets": [24, 30]}),
    "backwards": text(a=A | {"data_offsets": [24, 0]}, b=B),
    "a name twice": b'{"a": %s, "a": %s}' % (text(**A), text(**B)),
    "fewer numbers than the shape": text(a=A | {"shape": [2, 2]}, b=B),
    "another dtype": text(a=A | {"dtype": "F16"}, b=B),
    "an unknown dtype": text(a=A | {"dtype": "F33"}, b=B),
    "dtype is a number": text(a=A | {"dtype": 32}, b=B),
    "dtype is a list": text(a=A | {"dtype": ["F32"]}, b=B),
    "shape is a text": text(a=A | {"shape": "23"}, b=B),
    "shape holds texts": text(a=A | {"shape": ["2", "3"]}, b=B),
    "shape holds fractions": text(a=A | {"shape": [2.0, 3.0]}, b=B),
    "shape holds true": text(a=A | {"shape": [True, 6]}, b=B),
    "shape is negative": text(a=A | {"shape": [-2, -3]}, b=B),
    "shape is huge": text(a=A | {"shape": [10**30, 0]}, b=B),
    "offsets are texts": text(a=A | {"data_offsets": ["0", "24"]}, b=B),
    "offsets are null": text(a=A | {"data_offsets": None}, b=B),
    "three offsets": text(a=A | {"data_offsets": [0, 12, 24]}, b=B),
    "no offsets": text(a={"dtype": "F32", "shape": [2, 3]}, b=B),
    "an entry is a list": text(a=[1], b=B),
    "a list": b"[1, 2]",
    "not JSON": b"{" * 40,
    "very deep": b'{"a":' + b"[" * 100_000,
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "metadata of numbers": text(a=A, b=B, __metadata__={"format": 1}),
    "control characters": text(**{"\x1b[2J": A, "b": B}),
    "nothing": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_headers(tmp_path, name):
    file = write(tmp_path, BROKEN[name])
    assert ours(file) is None
    if name not in ("control characters", "a name twice"):  # the library takes the first
        assert theirs(file) is None


@pytest.mark.parametrize("change", [-1, 1, -8, 8, 10**6, 10**8 + 1, 2**63, 2**64 - 1 - 200])
def test_a_header_length_that_is_wrong(tmp_path, change):
    header = text(a=A, b=B)
    header += b" " * (-len(header) % 8)
    file = write(tmp_path, header, length=len(header) + change)
    assert ours(file) is None
    assert theirs(file) is None


def test_a_sound_header(tmp_path):
    file = write(tmp_path, text(a=A, b=B, c=B | {"shape": [0, 7], "data_offsets": [32, 32]}))
    assert ours(file) == theirs(file) == {"a", "b", "c"}


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_of_the_library_is_known(tmp_path, dtype):
    size = 8 * BITS[dtype] // 8
    file = write(tmp_path, text(a={"dtype": dtype, "shape": [8], "data_offsets": [0, size]}), size)
    assert theirs(file) == ours(file) == {"a"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "x"]) | JSON,
                "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(-2, 40), min_size=2, max_size=2) | JSON,
            }
        ),
        max_size=3,
    )
)
def test_any_json(tmp_path_factory, header):
    folder = tmp_path_factory.mktemp("any")
    try:
        found = parse_header(json.dumps(header).encode(), ROOM)
    except ValueError:
        return
    file = write(folder, json.dumps(header).encode())
    assert theirs(file) == set(found)


def test_flipped_bits_of_a_real_file(tmp_path):
    """What the library refuses we refuse; what both take points at the same bytes."""
    numbers = np.random.default_rng(0)
    tensors = {f"t{i}": numbers.standard_normal((3, i + 1)).astype(np.float32) for i in range(6)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    dice = random.Random(0)
    for _ in range(400):
        bit = dice.randrange(8 * header)
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        found = ours(file)
        if found is None:
            continue
        assert found == theirs(file)
        with safe_open(file, "np") as library:
            for name, tensor in open_index(tmp_path, "model").items():
                if tensor.dtype_name in DTYPES:
                    np.testing.assert_array_equal(tensor.view(), library.get_tensor(name))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_not_a_number_is_found(dtype):
    array = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    largest = ml_dtypes.finfo(dtype)
    array[:4] = [largest.max, largest.min, -0.0, largest.smallest_subnormal]
    assert all_finite(array)
    assert all_finite(array[:0])
    for broken in (np.nan, -np.nan, np.inf, -np.inf):
        other = array.copy()
        other[17] = broken
        assert not all_finite(other)


# --- the index of several files ------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight_map",
    [
        None, [], {}, 3, "a", {"a": 1}, {"a": ["x"]}, {"a": None}, {"a": ""}, {"a": "."},
        {"a": "../one.safetensors"}, {"a": "/etc/passwd"}, {"a": "sub/one.safetensors"},
        {"a": "one.safetensors\0"}, {"a": "..", "b": 2},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_that_is_wrong(tmp_path, weight_map):
    save_file({"a": np.ones(3, np.float32)}, tmp_path.parent / "one.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as error:
        open_index(tmp_path, "model")
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_the_index_says_which_of_two_copies_counts(tmp_path):
    one, two = np.ones(3, np.float32), np.zeros(3, np.float32)
    save_file({"a": one, "b": one}, tmp_path / "one.safetensors")
    save_file({"a": two, "c": two}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    shards = {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    np.testing.assert_array_equal(open_index(tmp_path, "model")["a"].view(), two)
    del shards["a"]
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match="which one counts"):
        open_index(tmp_path, "model")


def test_folders_and_dead_links_are_not_files(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        open_index(tmp_path, "model")
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match="holds neither"):
        open_index(tmp_path, "model")
