"""THE tensor table: our path, the Hugging Face name, and how one's axes become the other's.

A row spells both layouts in the house's letters: `(N H) D -> D N H` says that the HF tensor
[N*H, D] is ours as [D, N, H]. Shapes, imports, exports, shardings, an adapter's sites, its factors
and their PEFT names are all read off that one string, so they cannot drift apart.

    row = TARGETS['q']           # or any of base_rows(spec)
    row.name(0)                  # 'model.layers.0.self_attn.q_proj.weight'
    row.letters                  # 'L D N H': what sharding reads
    row.half, row.inputs, row.outputs            # 'attention', ('D',), ('N', 'H')
    row.hf_shape(sizes(spec))    # (N*H, D), and row.shape(...) is (L, D, N, H)
    ours = row.to_ours(tensor, sizes(spec))      # a view, no copy
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxalign.model.spec import ModelSpec

Path = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One kind of tensor."""

    path: Path  # ours; leaves under 'blocks' are stacked over L on a leading axis
    hf: str  # {layer} counts from 0
    axes: str  # 'HF letters -> our letters' of one layer; (N H) is one axis holding both
    where: tuple[str, tuple] | None = None  # a field of the spec, and the values that bring it

    def exists(self, spec: ModelSpec) -> bool:
        """Whether this model has such a tensor."""
        return self.where is None or getattr(spec, self.where[0]) in self.where[1]

    @property
    def half(self) -> str:
        """The half of a block that a projection belongs to: attention or mlp."""
        return self.path[1]

    @property
    def letters(self) -> str:
        """The axes of our leaf, its L included: `L D N H`."""
        return " ".join(["L"] * self.stacked + self._layout[1])

    @property
    def inputs(self) -> tuple[str, ...]:
        """The axes of a kernel that meet its input: D of `q`, N and H of `o`."""
        return tuple(self._layout[0][1])

    @property
    def outputs(self) -> tuple[str, ...]:
        """The other axes of a kernel: N and H of `q`, D of `o`."""
        return tuple(self._layout[0][0])

    @property
    def stacked(self) -> bool:
        """Whether our leaf holds one such tensor per layer."""
        return "{layer}" in self.hf

    def name(self, layer: int = 0) -> str:
        """The HF name in block `layer`, counted from 0 as HF does."""
        return self.hf.format(layer=layer)

    def hf_shape(self, size: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one HF tensor."""
        return tuple(math.prod(size[letter] for letter in axis) for axis in self._layout[0])

    def shape(self, size: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of our leaf, its L axis included."""
        stack = (size["L"],) if self.stacked else ()
        return stack + tuple(size[letter] for letter in self._layout[1])

    def to_ours(self, tensor: np.ndarray, size: Mapping[str, int]) -> np.ndarray:
        """The HF tensor seen in our layout (without L): a view, nothing is copied."""
        hf, ours = self._layout
        letters = [letter for axis in hf for letter in axis]
        split = tensor.reshape([size[letter] for letter in letters])  # one axis per letter
        return split.transpose([letters.index(letter) for letter in ours])

    @property
    def outer(self) -> int:
        """The axis of our layout (without L) along which a tensor's file holds row after row."""
        hf, ours = self._layout
        return ours.index(hf[0][0])

    def step(self, size: Mapping[str, int]) -> int:
        """How many rows of the file make one step along axis `outer`."""
        return math.prod(size[letter] for letter in self._layout[0][0][1:])

    def rows_to_ours(self, rows: np.ndarray, size: Mapping[str, int]) -> np.ndarray:
        """As `to_ours`, of whole steps of the HF tensor's rows."""
        steps = len(rows) // self.step(size)
        return self.to_ours(rows, {**size, self._layout[0][0][0]: steps})

    def to_hf(self, array: np.ndarray, size: Mapping[str, int]) -> np.ndarray:
        """One layer of our leaf in the HF layout, contiguous."""
        hf, ours = self._layout
        order = [ours.index(letter) for axis in hf for letter in axis]
        return np.ascontiguousarray(array.transpose(order)).reshape(self.hf_shape(size))

    @cached_property
    def _layout(self) -> tuple[list[list[str]], list[str]]:
        hf, ours = self.axes.split(" -> ")
        return [axis.strip("()").split() for axis in re.findall(r"\([^)]*\)|\S+", hf)], ours.split()


# One line per tensor kind of a block: our path under 'blocks', the HF name under
# 'model.layers.{layer}.', the axes, and what brings it where not every model has it: a flag of the
# spec, or a field and its values. Norms leave out 'scale' and 'weight'. One HF name may be two
# norms: Llama's post_attention_layernorm stands before the MLP, Gemma's behind attention.
# fmt: off
_ATTENTION_NORMS = (
    ("attention_norm",         "input_layernorm",            "D -> D",       "norms=before around"),
    ("attention_post_norm",    "post_attention_layernorm",   "D -> D",       "norms=after around"),
    ("attention/q_head_norm",  "self_attn.q_norm",           "H -> H",       "qk_norm=head"),
    ("attention/k_head_norm",  "self_attn.k_norm",           "H -> H",       "qk_norm=head"),
    ("attention/q_whole_norm", "self_attn.q_norm",           "(N H) -> N H", "qk_norm=whole"),
    ("attention/k_whole_norm", "self_attn.k_norm",           "(K H) -> K H", "qk_norm=whole"),
)
_ATTENTION = (
    ("attention/q/kernel",    "self_attn.q_proj.weight",         "(N H) D -> D N H"),
    ("attention/k/kernel",    "self_attn.k_proj.weight",         "(K H) D -> D K H"),
    ("attention/v/kernel",    "self_attn.v_proj.weight",         "(K H) D -> D K H"),
    ("attention/o/kernel",    "self_attn.o_proj.weight",         "D (N H) -> N H D"),
    ("attention/q/bias",      "self_attn.q_proj.bias",           "(N H) -> N H",  "qkv_bias"),
    ("attention/k/bias",      "self_attn.k_proj.bias",           "(K H) -> K H",  "qkv_bias"),
    ("attention/v/bias",      "self_attn.v_proj.bias",           "(K H) -> K H",  "qkv_bias"),
    ("attention/o/bias",      "self_attn.o_proj.bias",           "D -> D",        "o_bias"),
)
_MLP_NORMS = (
    ("mlp_norm",               "post_attention_layernorm",   "D -> D",       "norms=before"),
    ("mlp_norm",               "pre_feedforward_layernorm",  "D -> D",       "norms=around"),
    ("mlp_post_norm",          "post_feedforward_layernorm", "D -> D",       "norms=after around"),
)
_MLP = (
    ("mlp/gate/kernel",       "mlp.gate_proj.weight",            "F D -> D F"),
    ("mlp/up/kernel",         "mlp.up_proj.weight",              "F D -> D F"),
    ("mlp/down/kernel",       "mlp.down_proj.weight",            "D F -> F D"),
    ("mlp/gate/bias",         "mlp.gate_proj.bias",              "F -> F",        "mlp_bias"),
    ("mlp/up/bias",           "mlp.up_proj.bias",                "F -> F",        "mlp_bias"),
    ("mlp/down/bias",         "mlp.down_proj.bias",              "D -> D",        "mlp_bias"),
)
# fmt: on


def _row(path: str, name: str, axes: str, where: str = "") -> Row:
    field, _, values = where.partition("=")
    condition = (field, tuple(values.split()) or (True,)) if field else None
    return Row(("blocks", *path.split("/")), "model.layers.{layer}." + name, axes, condition)


def _norm(path: str, name: str, axes: str, where: str) -> Row:
    return _row(path + "/scale", name + ".weight", axes, where)


# In this order a base's fingerprint reads its tensors.
BASE = (
    Row(("embed",), "model.embed_tokens.weight", "V D -> V D"),
    *(_norm(*line) for line in _ATTENTION_NORMS),
    *(_row(*line) for line in _ATTENTION),
    *(_norm(*line) for line in _MLP_NORMS),
    *(_row(*line) for line in _MLP),
    Row(("norm", "scale"), "model.norm.weight", "D -> D"),
    Row(("head",), "lm_head.weight", "V D -> V D", ("tied", (False,))),
)

# The projections, which an adapter may change: our short name -> the row of that kernel. In this
# order an adapter's factors are drawn and saved.
TARGETS = {row.path[-2]: row for row in BASE if row.path[-1] == "kernel"}


def base_rows(spec: ModelSpec) -> list[Row]:
    """The rows this model has."""
    return [row for row in BASE if row.exists(spec)]


def parameter_count(spec: ModelSpec) -> int:
    """Weights and biases in all; a tied head is counted once."""
    return sum(math.prod(row.shape(sizes(spec))) for row in base_rows(spec))


def sizes(spec: ModelSpec, rank: int = 0) -> dict[str, int]:
    """The number behind every letter; R is the rank of an adapter."""
    return {
        "V": spec.vocab,
        "D": spec.dim,
        "L": spec.layers,
        "N": spec.heads,
        "K": spec.kv_heads,
        "H": spec.head_dim,
        "F": spec.ffn,
        "R": rank,
    }


def get_leaf(tree: Any, path: Path) -> Any:
    """The leaf of a nested dict at a path; KeyError where there is none."""
    for key in path:
        tree = tree[key]
    return tree


def set_leaf(tree: dict[str, Any], path: Path, leaf: Any) -> None:
    """Put a leaf into a nested dict, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def checked_leaf(row: Row, tree: Mapping[str, Any], size: Mapping[str, int]) -> Any:
    """The leaf of a row; ValueError where its shape is not the row's."""
    leaf = get_leaf(tree, row.path)
    if leaf.shape != row.shape(size):
        raise ValueError(f"{'/'.join(row.path)} is {leaf.shape}, expected {row.shape(size)}")
    return leaf
