"""Where arrays live: one mesh and one table from axis letters to mesh axes.

Arrays are described by the house's letters (`'L D N H'`, `'B T D'`); the tables below say on which
mesh axes a letter is split, once for weights and once for activations. A dimension that its mesh
axes do not divide stays whole.

    mesh = make_mesh(data=1, fsdp=-1, tensor=1, seq=1)
    with jax.set_mesh(mesh):
        shardings = shard_tree(mesh, params)            # a NamedSharding for every weight
        x = constrain(x, 'B T D')                        # inside a jitted function
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.errors import UserError
from jaxalign.model.spec.tensors import BASE

Array = jax.Array | np.ndarray  # what a pass takes: NumPy batches are put on devices on the way

AXES = ("data", "fsdp", "tensor", "seq")
# The compiler spreads what is not constrained; newer JAX would have every operation say how.
TYPES = (AxisType.Auto,) * len(AXES)

# Devices that share a sequence share its weights, too.
WEIGHTS = {"D": ("fsdp", "seq"), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",)}
VOCABULARY = {"V": ("fsdp", "tensor", "seq")}
ACTIVATIONS = {
    "B": ("data", "fsdp"),
    "T": ("seq",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
}
# Against a vocabulary split over every model axis: logits exist only as [tokens, V / devices].
LOGITS = {"B": ("data",), "V": ("fsdp", "tensor", "seq")}
TABLES = {"activations": ACTIVATIONS, "logits": LOGITS}

# Path of a weight without 'blocks/' -> its letters. Adapters (a, b) are small and stay whole.
LETTERS = {"/".join(row.path).removeprefix("blocks/"): row.letters for row in BASE}


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, seq: int = 1, devices: Any = None
) -> Mesh:
    """The device mesh with axes (data, fsdp, tensor, seq); one size may be -1: it takes the rest.

    Raises:
      UserError: sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, seq, len(devices))
    # TPU slices, and GPU nodes without NVLink between them: fast within, slow across.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = split_slices(sizes, slices)
    within = [size // share for size, share in zip(sizes, across, strict=True)]
    # An axis may be half a side of a slice, as 4 of 8 x 8 chips is; `jax.make_mesh` only lets v5e.
    make: Any = mesh_utils.create_device_mesh
    if slices > 1:
        make = partial(mesh_utils.create_hybrid_device_mesh, dcn_mesh_shape=across)
    array = make(within, devices=devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=TYPES)


def mesh_of_shapes(sizes: Sequence[int]) -> Any:
    """A mesh of these sizes without devices: shapes can be placed on it, programs not compiled."""
    return AbstractMesh(tuple(sizes), AXES, axis_types=TYPES)


def mesh_sizes(data: int, fsdp: int, tensor: int, seq: int, devices: int) -> list[int]:
    """The sizes of the axes over so many devices, -1 resolved; errors as of `make_mesh`."""
    sizes = [data, fsdp, tensor, seq]
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}: {size} should be 1 or more, or -1 for the rest")
    if sizes.count(-1) > 1:
        raise UserError("mesh: only one of data, fsdp, tensor and seq may be -1")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(devices // known, 1)
    if math.prod(sizes) != devices:
        shape = " x ".join(
            f"{axis} {size}"
            for axis, size in zip(AXES, sizes, strict=True)
            if axis != "seq" or size != 1
        )
        raise UserError(
            f"mesh: {shape} needs {math.prod(sizes)} devices and {devices} are here; "
            "set one of mesh.data, mesh.fsdp, mesh.tensor to -1"
        )
    return sizes


def split_slices(sizes: Sequence[int], slices: int) -> list[int]:
    """How many slices there are along each axis of the mesh: the outer ones, data and fsdp, first.

    Raises:
      UserError: tensor or seq, which communicate within every layer, would cross slices.
    """
    across, left = [], slices
    for size in sizes[:2]:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        raise UserError(
            f"mesh: data {sizes[0]} x fsdp {sizes[1]} cannot be laid over {slices} slices (TPU "
            f"slices, or GPU nodes); set mesh.data={slices} mesh.fsdp=-1 mesh.tensor=1"
        )
    return [*across, *[1] * (len(sizes) - 2)]


def letters_of(path: str) -> str | None:
    """The axis letters of the weight at this path, or None for adapters and scalars.

    Values and scales of a quantised weight are split along the weight's axes.
    """
    path = path.removesuffix("/.values").removesuffix("/.scales")
    for suffix, letters in LETTERS.items():
        if path == suffix or path.endswith("/" + suffix):
            return letters
    return None


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """How the weight at `path` is split over the mesh."""
    letters = letters_of(path)
    if letters is None or len(letters.split()) != len(shape):
        return P()
    # Next to a split vocabulary the model dimension stays whole: a mesh axis splits one dimension.
    table = VOCABULARY if letters.startswith("V") else WEIGHTS
    return _spec(letters, shape, mesh, table)


def shard_tree(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every leaf (arrays or ShapeDtypeStructs) of a tree of weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh)), tree
    )


def path_name(path: tuple) -> str:
    """`blocks/attention/q/kernel` for a JAX key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def constrain(x: jax.Array, letters: str, table: str = "activations") -> jax.Array:
    """`x`, kept split as its letters say. Without it the partitioner replicates work.

    Args:
      table: `activations`, or `logits` for what stands against a split vocabulary.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(letters, x.shape, mesh, table))


def activation_spec(
    letters: str, shape: tuple[int, ...], mesh: Any, table: str = "activations"
) -> P:
    """How an array of these letters is split; see `constrain`."""
    spec = _spec(letters, shape, mesh, TABLES[table])
    if table == "logits" and spec[letters.split().index("V")] is None:
        # A vocabulary that cannot be split is whole everywhere: rows stay where they are.
        return _spec(letters, shape, mesh, ACTIVATIONS)
    return spec


def devices() -> int:
    """Devices of the mesh in use; 1 where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def platform() -> str:
    """`tpu`, `gpu` or `cpu`: of the mesh in use, which need not be of this machine."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def batch_sharding(mesh: Mesh, stacked: bool = False) -> NamedSharding:
    """Rows over data and fsdp; `stacked`: behind a leading axis of micro-batches."""
    rows = ACTIVATIONS["B"]
    return NamedSharding(mesh, P(None, rows) if stacked else P(rows))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def row_ways(mesh: Mesh) -> int:
    """Shares of a batch's rows on different devices."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_shards(mesh: Mesh, process: int | None = None) -> tuple[int, ...]:
    """Which of the data x fsdp shares of a batch's rows are on devices of a process (this one).

    Several processes have the same share where tensor or seq cross them; the shares of one process
    need not be neighbours, because a mesh follows the links of a slice and not its hosts.
    """
    process = jax.process_index() if process is None else process
    shares = mesh.devices.reshape(row_ways(mesh), -1)
    return tuple(
        number
        for number, devices in enumerate(shares)
        if any(device.process_index == process for device in devices)
    )


def rows_here(mesh: Mesh, size: int, process: int | None = None) -> np.ndarray:
    """The places, among the `size` rows of a batch, that devices of a process (this one) hold.

    Returns:
      int64 [rows], increasing; what `Stream.stack` is asked for and `put_batch` is given.
    """
    places = np.arange(size).reshape(row_ways(mesh), -1)
    return places[list(row_shards(mesh, process))].ravel()


def put_batch(mesh: Mesh, batch: Any, stacked: bool = False) -> Any:
    """The rows that this process holds (`rows_here`, NumPy) as global arrays split over the mesh.

    Args:
      stacked: rows are the second axis, behind that of micro-batches.
    """
    sharding = batch_sharding(mesh, stacked)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    axis, shares = int(stacked), row_shards(mesh)
    ways = row_ways(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        share = rows.shape[axis] // len(shares)
        shape = (*rows.shape[:axis], share * ways, *rows.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            first = share * shares.index((index[axis].start or 0) // share)
            return rows[(*index[:axis], slice(first, first + share))]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(lambda rows: put(np.asarray(rows)), batch)


def _spec(letters: str, shape: tuple[int, ...], mesh: Any, table: dict) -> P:
    entries: list[Any] = []
    for letter, size in zip(letters.split(), shape, strict=True):
        axes = tuple(axis for axis in table.get(letter, ()) if mesh.shape[axis] > 1)
        divides = axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0
        entries.append(axes if divides else None)
    return P(*entries)
