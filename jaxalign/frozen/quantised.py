"""A frozen weight in 8 or 4 bits: numbers for storage only, wide again where a product needs them.

Weights are rounded in groups along the last of their input axes, each group with one scale, and
widened inside `project`, under the scan and the rematerialised block, so that one layer's weights
at a time are wide (QLoRA: Dettmers et al. 2023, section 3). Embeddings, head, norms, biases and
adapters stay as they are.

    small = quantise(kernel, 'nf4', inputs=1)        # [L, D, F] -> Quantised
    wide = small.widen(jnp.bfloat16)                 # [L, D, F] again, rounded
    wide = widen(kernel_or_quantised, jnp.bfloat16)

An array of our own and not qwix's: that library quantises a model by tracing its calls through
Flax, its arrays hold four bits in whole bytes on a CPU, and importing it imports NNX, while all
that is needed here in addition to a plain `dot_general` is a pytree that slices, shards and widens.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

KINDS = ("int8", "int4", "nf4")
GROUP = 64  # numbers that share a scale in 4 bits, as in QLoRA

# NormalFloat: quantiles of N(0, 1) scaled to [-1, 1], zero among them (Dettmers et al. 2023,
# appendix E, to float32's last digit).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@flax.struct.dataclass
class Quantised:
    """A weight [..., in, out...], or a stack of them: whatever slices the leaves slices it.

    4-bit numbers are stored two in a byte, along the axis of the groups: in each group the first
    half low, the second half high.
    """

    values: jax.Array  # int8 of the weight's shape, or uint8 with half the length on `axis`
    scales: jax.Array  # the weight's shape with one number for each group on `axis`
    kind: str = flax.struct.field(pytree_node=False)
    axis: int = flax.struct.field(pytree_node=False)  # of the groups, from the end: negative

    @property
    def shape(self) -> tuple[int, ...]:
        """The wide weight's."""
        shape = list(self.values.shape)
        shape[self.axis] *= 1 if self.kind == "int8" else 2
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The wide weight's."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def widen(self, dtype: Any) -> jax.Array:
        """The weight itself, formed in float32 and rounded once."""
        axis, groups = self.values.ndim + self.axis, self.scales.shape[self.axis]
        numbers = _split(self.values, axis, groups)  # [..., groups, group or half, out...]
        if self.kind != "int8":
            numbers = jnp.concatenate([numbers & 15, numbers >> 4], axis=axis + 1)
        if self.kind == "nf4":
            wide = _look_up(numbers)
        elif self.kind == "int4":
            wide = numbers.astype(jnp.float32) - 8
        else:
            wide = numbers.astype(jnp.float32)
        wide = wide * jnp.expand_dims(self.scales, axis + 1).astype(jnp.float32)
        return wide.reshape(self.shape).astype(dtype)


def quantise(weight: jax.Array, kind: str, inputs: int) -> Quantised:
    """A stack of weights [L, in..., out...] rounded, one layer after the other.

    Args:
      kind: `int8`: one scale for each output (and head, where heads are inputs), the largest number
        being 127; `int4`: one for each group, the largest being 7; `nf4`: the nearest of the
        published quantiles times the group's largest number.
      inputs: how many axes are inputs; the last of them is grouped.
    """
    axis = inputs - weight.ndim  # within a layer and within the stack
    return jax.lax.map(partial(_quantise, kind=kind, axis=axis), weight)


def _quantise(weight: jax.Array, kind: str, axis: int) -> Quantised:
    place, length = weight.ndim + axis, weight.shape[axis]
    group = length if kind == "int8" else group_of(length)
    wide = _split(weight.astype(jnp.float32), place, length // group)
    largest = jnp.max(jnp.abs(wide), axis=place + 1, keepdims=True)
    most = {"int8": 127.0, "int4": 7.0, "nf4": 1.0}[kind]
    scales = (largest / most).astype(jnp.float32 if kind == "int8" else jnp.bfloat16)
    stored = scales.astype(jnp.float32)  # numbers are chosen for the scale as it will be read
    ratio = jnp.where(stored > 0, wide / jnp.where(stored > 0, stored, 1.0), 0.0)
    if kind == "nf4":
        table = jnp.asarray(NF4, jnp.float32)
        numbers = jnp.searchsorted((table[1:] + table[:-1]) / 2, ratio).astype(jnp.uint8)
    else:
        numbers = jnp.clip(jnp.round(ratio), -most, most)
        numbers = numbers.astype(jnp.int8) if kind == "int8" else (numbers + 8).astype(jnp.uint8)
    if kind != "int8":
        low, high = jnp.split(numbers, 2, axis=place + 1)
        numbers = low | (high << 4)
    shape = list(weight.shape)
    shape[axis] //= 1 if kind == "int8" else 2
    return Quantised(numbers.reshape(shape), scales.squeeze(place + 1), kind, axis)


def group_of(length: int) -> int:
    """The largest even divisor of an axis up to GROUP: 64 of 4096, 48 of 48.

    Raises:
      ValueError: the axis is odd.
    """
    if length % 2:
        raise ValueError(f"an axis of {length} numbers cannot be stored two in a byte")
    return max(size for size in range(2, GROUP + 1, 2) if length % size == 0)


def widen(weight: jax.Array | Quantised, dtype: Any) -> jax.Array:
    """The weight in `dtype`, quantised or not."""
    return weight.widen(dtype) if isinstance(weight, Quantised) else weight.astype(dtype)


def is_quantised(tree: Any) -> bool:
    """Whether some leaf of a tree is."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return any(isinstance(leaf, Quantised) for leaf in leaves)


def quantise_on(
    weight: jax.Array, kind: str, inputs: int, sharding: Sharding | None = None
) -> Quantised:
    """`quantise` on the weight's devices; the wide weight is given up.

    Args:
      sharding: of the wide weight: values and scales are split over the mesh as it is, wherever
        their axes divide.
    """
    round_ = partial(quantise, kind=kind, inputs=inputs)
    out = None
    if isinstance(sharding, NamedSharding):
        shapes = jax.eval_shape(round_, weight)
        out = jax.tree.map(lambda leaf: _fit(sharding, leaf.shape), shapes)
    small = jax.jit(round_, out_shardings=out)(weight)
    jax.block_until_ready(small)
    weight.delete()
    return small


def _fit(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    for axis, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        if shape[axis] % math.prod(sharding.mesh.shape[name] for name in names):
            spec[axis] = None
    return NamedSharding(sharding.mesh, P(*spec))


def _look_up(numbers: jax.Array) -> jax.Array:
    """NF4's values, halving the table bit by bit: in vectors, where a gather goes one by one."""
    level: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        upper = (numbers >> bit) & 1 == 1
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [jnp.where(upper, above, below) for below, above in pairs]
    return level[0]


def _split(array: jax.Array, axis: int, groups: int) -> jax.Array:
    """[..., n, ...] -> [..., groups, n / groups, ...]."""
    shape = array.shape
    return array.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
