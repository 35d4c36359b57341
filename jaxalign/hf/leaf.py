"""One leaf of the parameters from its tensors, read only where devices of this process need it.

A tensor is stored in its file row by row. Where several processes share a leaf that is split by
columns, each would have to read every row; so each reads whole rows, as many as it has devices,
and the devices swap blocks: the processes together read a leaf once per copy of it, wherever so
many devices divide its rows.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jaxalign.hf.tensors import StoredTensor
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import Row, sizes

# A transposed copy in strips of this many rows stays within the processor's cache.
_STRIP = 16

Bounds = tuple[tuple[int, int], ...]


def load_leaf(
    row: Row,
    index: Mapping[str, StoredTensor],
    spec: ModelSpec,
    dtype: np.dtype,
    sharding: Sharding,
    readers: ThreadPoolExecutor,
) -> jax.Array:
    """The leaf of this row, blocks stacked over L, where `sharding` wants it.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    size = sizes(spec)
    shape, step, at = row.shape(size), row.step(size), row.outer + row.stacked
    reading = sharding if jax.process_count() == 1 else by_rows(row, shape, sharding)

    # Devices that hold the same piece share one host copy; pieces of the same rows one read.
    pieces: dict[Bounds, np.ndarray] = {}
    groups: dict[tuple[int, int], list[Bounds]] = defaultdict(list)
    for where in reading.addressable_devices_indices_map(shape).values():
        bounds = _bounds(where, shape)
        if bounds not in pieces:
            pieces[bounds] = np.empty([stop - start for start, stop in bounds], dtype)
            groups[bounds[at]].append(bounds)

    def fill(layer: int) -> None:
        for rows, group in groups.items():
            group = [one for one in group if not row.stacked or layer in range(*one[0])]
            if not group:
                continue
            tensor = index[row.name(layer)]
            stored = tensor.rows(rows[0] * step, rows[1] * step)
            tensor.refuse_broken(stored)
            ours = row.rows_to_ours(stored, size)
            for bounds in group:
                inner = [slice(*pair) for pair in bounds]
                inner[at] = slice(None)  # these rows and no others were read
                piece = pieces[bounds]
                target = piece[layer - bounds[0][0]] if row.stacked else piece
                _copy(target, ours[tuple(inner[row.stacked :])])

    list(readers.map(fill, range(spec.layers if row.stacked else 1)))
    leaf = jax.make_array_from_callback(
        shape, reading, lambda where: pieces[_bounds(where, shape)], dtype=dtype
    )
    if reading is not sharding:
        leaf = jax.device_put(leaf, sharding, donate=True)
    # Wait for the transfer: the host copy of this leaf must go before the next one is made.
    return leaf.block_until_ready()


def by_rows(row: Row, shape: tuple[int, ...], sharding: Sharding) -> Sharding:
    """The same devices, with all that splits a leaf splitting the rows of its files.

    `sharding` itself where nothing else is split, or so many devices do not divide the rows.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    at = row.outer + row.stacked
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in sharding.spec]
    entries += [()] * (len(shape) - len(entries))
    others = itertools.chain.from_iterable(entries[:at] + entries[at + 1 :])
    axes = (*entries[at], *others)
    devices = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if len(axes) == len(entries[at]) or shape[at] % devices:
        return sharding
    return NamedSharding(sharding.mesh, P(*[axes if i == at else None for i in range(len(shape))]))


def _bounds(where: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    assert where is not None
    return tuple(axis.indices(length)[:2] for axis, length in zip(where, shape, strict=True))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Fill `target`, converting; in strips, because a transposed source is slow to walk whole."""
    if source.ndim < 2:
        target[...] = source
        return
    for start in range(0, target.shape[-1], _STRIP):
        strip = (..., slice(start, start + _STRIP))
        target[strip] = source[strip]
