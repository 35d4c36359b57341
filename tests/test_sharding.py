"""Meshes of eight devices, and where every weight lies on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.hf.load import abstract_params
from jaxalign.plan import topology
from jaxalign.sharding import (
    batch_sharding,
    constrain,
    make_mesh,
    path_name,
    put_batch,
    replicated,
    rows_here,
    shard_tree,
    split_slices,
)
from tests.hf.conftest import LLAMA

# Every bias and an own head; V 96, D 32, N 4, K 2, H 8, F 48, L 3.
SPEC = dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True)

FSDP, TENSOR, BOTH = ("fsdp",), ("tensor",), ("fsdp", "tensor")


@pytest.fixture(scope="module", autouse=True)
def eight_devices():
    if len(jax.devices()) != 8:
        pytest.skip("needs eight devices; XLA_FLAGS asks for another number")


def specs(mesh, spec=SPEC) -> dict[str, P]:
    """Path -> how it is split."""
    shardings = shard_tree(mesh, abstract_params(spec, jnp.float32))
    return {
        path_name(path).removeprefix("blocks/"): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
    }


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, 1, 1), (8, 1, 1)),
        ((1, 1, 8), (1, 1, 8)),
        ((2, -1, 4), (2, 1, 4)),
    ],
)
def test_mesh(asked, found):
    mesh = make_mesh(*asked)
    assert mesh.axis_names == ("data", "fsdp", "tensor", "seq")
    assert tuple(mesh.shape.values()) == (*found, 1)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_mesh_of_some_devices():
    devices = jax.devices()[:4]
    mesh = make_mesh(1, -1, 2, devices=devices)
    assert tuple(mesh.shape.values()) == (1, 2, 2, 1)
    assert set(mesh.devices.flat) == set(devices)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ((-1, -1, 1), "only one of data, fsdp, tensor and seq may be -1"),
        ((1, 4, 1), "data 1 x fsdp 4 x tensor 1 needs 4 devices and 8 are here"),
        ((4, 4, 1), "needs 16 devices and 8 are here"),
        ((3, -1, 1), "data 3 x fsdp 2 x tensor 1 needs 6 devices and 8 are here"),
        ((16, -1, 1), "data 16 x fsdp 1 x tensor 1 needs 16 devices"),
        ((0, -1, 1), "mesh.data: 0 should be 1 or more, or -1 for the rest"),
        ((1, -1, -2), "mesh.tensor: -2 should be 1 or more, or -1 for the rest"),
    ],
)
def test_meshes_that_do_not_fit(asked, sentence):
    with pytest.raises(UserError) as error:
        make_mesh(*asked)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


WHOLE = {
    "embed": P(None, None),
    "head": P(None, None),
    "norm/scale": P(None),
    "attention_norm/scale": P(None, None),
    "mlp_norm/scale": P(None, None),
    "attention/q/kernel": P(None, None, None, None),
    "attention/k/kernel": P(None, None, None, None),
    "attention/v/kernel": P(None, None, None, None),
    "attention/o/kernel": P(None, None, None, None),
    "attention/q/bias": P(None, None, None),
    "attention/k/bias": P(None, None, None),
    "attention/v/bias": P(None, None, None),
    "attention/o/bias": P(None, None),
    "mlp/gate/kernel": P(None, None, None),
    "mlp/up/kernel": P(None, None, None),
    "mlp/down/kernel": P(None, None, None),
    "mlp/gate/bias": P(None, None),
    "mlp/up/bias": P(None, None),
    "mlp/down/bias": P(None, None),
}


def test_data_parallel_holds_everything_everywhere():
    assert specs(make_mesh(8, 1, 1)) == WHOLE


def test_fsdp_splits_the_model_dimension():
    assert specs(make_mesh(1, 8, 1)) == WHOLE | {
        "embed": P(FSDP, None),  # the vocabulary; the model dimension stays whole beside it
        "head": P(FSDP, None),
        "norm/scale": P(FSDP),
        "attention_norm/scale": P(None, FSDP),
        "mlp_norm/scale": P(None, FSDP),
        "attention/q/kernel": P(None, FSDP, None, None),
        "attention/k/kernel": P(None, FSDP, None, None),
        "attention/v/kernel": P(None, FSDP, None, None),
        "attention/o/kernel": P(None, None, None, FSDP),
        "attention/o/bias": P(None, FSDP),
        "mlp/gate/kernel": P(None, FSDP, None),
        "mlp/up/kernel": P(None, FSDP, None),
        "mlp/down/kernel": P(None, None, FSDP),
        "mlp/down/bias": P(None, FSDP),
    }


def test_three_axes_at_once():
    assert specs(make_mesh(2, 2, 2)) == {
        "embed": P(BOTH, None),
        "head": P(BOTH, None),
        "norm/scale": P(FSDP),
        "attention_norm/scale": P(None, FSDP),
        "mlp_norm/scale": P(None, FSDP),
        "attention/q/kernel": P(None, FSDP, TENSOR, None),
        "attention/k/kernel": P(None, FSDP, TENSOR, None),
        "attention/v/kernel": P(None, FSDP, TENSOR, None),
        "attention/o/kernel": P(None, TENSOR, None, FSDP),
        "attention/q/bias": P(None, TENSOR, None),
        "attention/k/bias": P(None, TENSOR, None),
        "attention/v/bias": P(None, TENSOR, None),
        "attention/o/bias": P(None, FSDP),
        "mlp/gate/kernel": P(None, FSDP, TENSOR),
        "mlp/up/kernel": P(None, FSDP, TENSOR),
        "mlp/down/kernel": P(None, TENSOR, FSDP),
        "mlp/gate/bias": P(None, TENSOR),
        "mlp/up/bias": P(None, TENSOR),
        "mlp/down/bias": P(None, FSDP),
    }


def test_dimensions_that_do_not_divide_stay_whole():
    found = specs(make_mesh(1, 1, 8), dataclasses.replace(SPEC, vocab=97))
    assert found["attention/q/kernel"] == P(None, None, None, None)  # 4 heads, 8 devices
    assert found["attention/k/bias"] == P(None, None, None)
    assert found["embed"] == P(None, None)  # 97 rows
    assert found["mlp/gate/kernel"] == P(None, None, TENSOR)  # 48 divides
    found = specs(make_mesh(1, 2, 4))
    assert found["attention/q/kernel"] == P(None, FSDP, TENSOR, None)
    assert found["attention/k/kernel"] == P(None, FSDP, None, None)  # 2 heads, 4 devices


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_every_leaf_can_be_placed(shape):
    mesh = make_mesh(*shape)
    shardings = shard_tree(mesh, abstract_params(SPEC, jnp.float32))
    jax.tree.map(
        lambda leaf, where: where.shard_shape(leaf.shape),  # raises where it does not divide
        abstract_params(SPEC, jnp.float32),
        shardings,
    )


def test_adapters_and_moments_stay_whole():
    mesh = make_mesh(2, 2, 2)
    lora = jax.eval_shape(lambda: Lora().init(SPEC, jax.random.key(0)))
    for sharding in jax.tree.leaves(shard_tree(mesh, {"mu": lora, "step": np.zeros(())})):
        assert sharding.is_fully_replicated


def test_moments_lie_with_their_weights():
    mesh = make_mesh(2, 2, 2)
    params = abstract_params(SPEC, jnp.float32)
    below = shard_tree(mesh, {"optimiser": [{"mu": params}]})["optimiser"][0]["mu"]
    assert below == shard_tree(mesh, params)


def test_batches_are_split_by_row():
    mesh = make_mesh(2, 2, 2)
    rows = np.arange(8 * 6).reshape(8, 6)
    placed = put_batch(mesh, {"tokens": rows})["tokens"]
    assert placed.sharding == batch_sharding(mesh) == NamedSharding(mesh, P(("data", "fsdp")))
    assert placed.sharding.shard_shape(placed.shape) == (2, 6)
    np.testing.assert_array_equal(placed, rows)
    stacked = put_batch(mesh, rows[None], stacked=True)
    assert stacked.sharding.shard_shape(stacked.shape) == (1, 2, 6)
    assert replicated(mesh).shard_shape((8, 6)) == (8, 6)


# (topology, slices) -> sizes of the mesh. `tensor` 4 crosses hosts on all of them, and a mesh of
# fsdp alone follows a ring through the slice, in which a host's chips are not neighbours.
SLICES = {
    ("v5e:4x4", 1): ((1, 16, 1, 1), (1, 4, 4, 1), (2, 2, 2, 2), (1, 1, 16, 1)),
    ("v5e:4x8", 1): ((1, 32, 1, 1), (1, 8, 4, 1), (1, 8, 1, 4)),
    ("v6e:8x8", 1): ((1, 64, 1, 1), (2, 8, 4, 1)),
    ("v5p:4x4x4", 1): ((1, 64, 1, 1), (1, 16, 4, 1), (4, 4, 2, 2)),
    ("v5e:4x4", 2): ((2, 16, 1, 1), (2, 4, 4, 1), (1, 32, 1, 1)),
}


@pytest.mark.parametrize("place", SLICES, ids=lambda place: f"{place[1]} x {place[0]}")
def test_each_process_makes_the_rows_of_its_own_devices(place):
    """On the device orders of real slices: neither more nor fewer, whatever crosses hosts."""
    pytest.importorskip("libtpu")
    devices = topology.devices(topology.parse(*place))
    crossed = 0
    for sizes in SLICES[place]:
        mesh = make_mesh(*sizes, devices=devices)
        size = 2 * sizes[0] * sizes[1]
        held = {}  # what JAX says that devices hold
        for device, (rows,) in batch_sharding(mesh).devices_indices_map((size,)).items():
            held.setdefault(device.process_index, set()).update(range(*rows.indices(size)))
        for process, rows in held.items():
            assert rows_here(mesh, size, process).tolist() == sorted(rows)
        assert set().union(*held.values()) == set(range(size))
        crossed += sum(map(len, held.values())) > size
    assert crossed, "no two processes shared rows"


def test_rows_from_a_callback_are_the_batch(monkeypatch):
    """The way of several processes, here with all devices in one."""
    mesh = make_mesh(2, 2, 2)
    rows = np.arange(3 * 8 * 5).reshape(3, 8, 5)
    plain = put_batch(mesh, rows, stacked=True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for stacked, array in ((True, rows), (False, rows[0])):
        placed = put_batch(mesh, {"rows": array}, stacked)["rows"]
        np.testing.assert_array_equal(placed, array)
    assert put_batch(mesh, rows, stacked=True).sharding == plain.sharding


def test_constrain():
    x = jnp.arange(8.0 * 3 * 4).reshape(8, 3, 4)
    assert constrain(x, "B T N") is x  # no mesh: nothing to do
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(2 * x, "B T N"))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 3, 2)
    np.testing.assert_array_equal(y, 2 * x)


@pytest.mark.parametrize(
    ("sizes", "slices", "expected"),
    [
        ((2, 16, 1), 2, [2, 1, 1]),
        ((1, 32, 1), 2, [1, 2, 1]),
        ((2, 8, 1), 4, [2, 2, 1]),
        ((3, 4, 2), 4, [1, 4, 1]),
    ],
)
def test_slices_lie_along_the_outer_axes(sizes, slices, expected):
    assert split_slices(sizes, slices) == expected


def test_tensor_parallelism_stays_within_a_slice():
    with pytest.raises(UserError, match=r"set mesh\.data=4"):
        split_slices((1, 2, 8), 4)
