"""LoRA: two thin matrices beside each frozen projection, and nothing else is trained.

`y = x W + s · drop(x) A B` with `A` [in, R] random and `B` [R, out] zero, so that step 0 is the
base model (Hu et al. 2021, eq. 3; names, scale and initialisation are PEFT's). DoRA trains the
length of every column of the sum besides: `jaxalign.adapters.dora`.

    adapter = Lora.parse(spec, r=8, targets=['q', 'v'], layers='1..16')
    lora = init(adapter, spec, jax.random.key(0))    # {'blocks': {'attention': {'q': {'a', 'b'}}}}
    count(adapter, spec)                             # trained parameters

Projections may differ in rank and alpha, or lack an adapter in some blocks. Factors are stacked
all the same: columns of `a` and rows of `b` beyond a projection's own rank are zero, and so are
their gradients, each being a product with the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.adapters import dora
from jaxalign.errors import UserError
from jaxalign.model.quantised import is_quantised
from jaxalign.model.spec import ModelSpec

# Target -> where it sits in a block, and the letters of its input and output axes.
SITES = {
    "q": ("attention", "D", "N H"),
    "k": ("attention", "D", "K H"),
    "v": ("attention", "D", "K H"),
    "o": ("attention", "N H", "D"),
    "gate": ("mlp", "D", "F"),
    "up": ("mlp", "D", "F"),
    "down": ("mlp", "F", "D"),
}


@dataclass(frozen=True, order=True)
class Part:
    """One projection of one block whose rank or alpha is its own; rank 0: it has no adapter."""

    target: str
    block: int  # counted from 1
    r: int
    alpha: float


@dataclass(frozen=True)
class Lora:
    """What an adapter is, without its weights."""

    r: int = 8  # the largest rank: R of the stacked factors
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(SITES)
    layers: tuple[int, ...] = ()  # adapted blocks, counted from 1; empty: all
    rank_stabilised: bool = False
    dora: bool = False
    parts: tuple[Part, ...] = ()  # the projections that differ from r and alpha

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023), where no part says otherwise."""
        return self._scale(self.r, self.alpha)

    def rank_of(self, target: str, block: int) -> int:
        """The rank of one block's projection; 0 where it has no adapter."""
        return self._of(target, block)[0]

    def alpha_of(self, target: str, block: int) -> float:
        """The alpha of one block's projection; 0 where it has no adapter."""
        return self._of(target, block)[1]

    def scale_of(self, target: str, block: int) -> float:
        """What multiplies A B in one block's projection; 0 where it has no adapter."""
        r, alpha = self._of(target, block)
        return self._scale(r, alpha) if r else 0.0

    def table(self, blocks: int) -> dict[tuple[str, int], tuple[int, float]]:
        """(target, block) -> (rank, alpha) of everything adapted in a model of so many blocks."""
        found = {
            (target, block): self._of(target, block)
            for target in self.targets
            for block in self.layers or range(1, blocks + 1)
        }
        return {place: own for place, own in found.items() if own[0]}

    @property
    def even(self) -> bool:
        """Whether one number scales every adapter."""
        return all(self._scale(part.r, part.alpha) == self.scale for part in self.parts if part.r)

    def scales(self, target: str, blocks: int) -> np.ndarray:
        """[L] float32: `scale_of` in every block."""
        return np.array([self.scale_of(target, b + 1) for b in range(blocks)], np.float32)

    @classmethod
    def of_table(
        cls,
        table: Mapping[tuple[str, int], tuple[int, float]],
        blocks: int,
        *,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        dora: bool = False,
    ) -> Lora:
        """The adapter with these ranks and alphas: `table` turned round, one spelling for each.

        Args:
          table: (target, block) -> (rank, alpha); not empty.
          blocks: of the model.
        """
        r = max(rank for rank, _ in table.values())
        alphas = Counter(alpha for rank, alpha in table.values() if rank == r)
        alpha = alphas.most_common(1)[0][0]
        targets = tuple(name for name in SITES if any(name == target for target, _ in table))
        layers = tuple(sorted({block for _, block in table}))
        parts = (
            Part(target, block, *table.get((target, block), (0, 0.0)))
            for target in targets
            for block in layers
            if table.get((target, block)) != (r, alpha)
        )
        every = len(layers) == blocks
        return cls(
            r=r,
            alpha=alpha,
            dropout=dropout,
            targets=targets,
            layers=() if every else layers,
            rank_stabilised=rank_stabilised,
            dora=dora,
            parts=tuple(parts),
        )

    @classmethod
    def parse(
        cls,
        spec: ModelSpec,
        *,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[str] = tuple(SITES),
        layers: str = "all",
        scaling: str = "standard",
        variant: str = "lora",
        ranks: Mapping[str, int] | None = None,
        alphas: Mapping[str, float] | None = None,
    ) -> Lora:
        """The adapter that the configuration's words describe.

        Raises:
          UserError: a target that matches no projection, a layer past the model, a rank below 1.
        """
        names = tuple(name.removesuffix("_proj") for name in targets)
        unknown = [name for name in names if name not in SITES]
        if unknown or not names:
            raise UserError(
                f"lora.targets: {', '.join(unknown) or 'the empty list'} matches no projection of "
                f"this model; choose among {', '.join(SITES)}"
            )
        own_ranks = _of_targets("lora.ranks", ranks or {}, names)
        own_alphas = _of_targets("lora.alphas", alphas or {}, names)
        for key, rank in (("lora.r", r), *((f"lora.ranks.{n}", x) for n, x in own_ranks.items())):
            if rank < 1:
                raise UserError(f"{key}: {rank} is no rank; use 1 or more (the paper's is 8)")
        chosen = parse_layers(layers, spec.layers)
        table = {
            (name, block): (own_ranks.get(name, r), float(own_alphas.get(name, alpha)))
            for name in names
            for block in chosen or range(1, spec.layers + 1)
        }
        return cls.of_table(
            table,
            spec.layers,
            dropout=float(dropout),
            rank_stabilised=scaling == "rank_stabilised",
            dora=variant == "dora",
        )

    @cached_property
    def _parts(self) -> dict[tuple[str, int], tuple[int, float]]:
        return {(part.target, part.block): (part.r, part.alpha) for part in self.parts}

    def _of(self, target: str, block: int) -> tuple[int, float]:
        if target not in self.targets or (self.layers and block not in self.layers):
            return 0, 0.0
        return self._parts.get((target, block), (self.r, self.alpha))

    def _scale(self, r: int, alpha: float) -> float:
        return alpha / (math.sqrt(r) if self.rank_stabilised else r)


def parse_layers(text: str, total: int) -> tuple[int, ...]:
    """`all` -> (), `1..16` -> (1, ..., 16), `3,5` -> (3, 5); blocks are counted from 1.

    Every block named one by one is `all`, too, so that equal adapters compare equal.
    """
    if text == "all":
        return ()
    try:
        layers: list[int] = []
        for part in str(text).split(","):
            first, dots, last = part.partition("..")
            layers += range(int(first), int(last if dots else first) + 1)
    except ValueError as error:
        raise UserError(f"lora.layers: cannot read {text!r}; write all, 1..16 or 3,5,8") from error
    wrong = [layer for layer in layers if not 1 <= layer <= total]
    if wrong or not layers:
        raise UserError(
            f"lora.layers: {text!r} names block {wrong[0] if wrong else 'none'}, but the model has "
            f"blocks 1 to {total}"
        )
    return () if len(set(layers)) == total else tuple(sorted(set(layers)))


def init(adapter: Lora, spec: ModelSpec, key: jax.Array, params: dict | None = None) -> dict:
    """Fresh factors, float32: A uniform in ±1/sqrt(in) (PEFT's kaiming, a = sqrt 5), B zero.

    Args:
      params: the base; DoRA alone needs it, whose magnitudes `m` [L, out] begin as the lengths of
        the base's columns (Liu et al. 2024, section 4.1).
    """
    blocks: dict = {}
    for index, (name, (part, inputs, outputs)) in enumerate(SITES.items()):
        if name not in adapter.targets:
            continue
        fan_in, fan_out = _sizes(spec, inputs), _sizes(spec, outputs)
        bound = 1 / math.sqrt(math.prod(fan_in))
        a = jax.random.uniform(
            jax.random.fold_in(key, index),
            (spec.layers, *fan_in, adapter.r),
            jnp.float32,
            -bound,
            bound,
        )
        if adapter.parts:
            a = a * _columns(adapter, name, spec).reshape(-1, *(1,) * len(fan_in), adapter.r)
        b = jnp.zeros((spec.layers, adapter.r, *fan_out), jnp.float32)
        factors = {"a": a, "b": b}
        if adapter.dora:
            assert params is not None  # DoRA starts from the base's columns
            kernel = params["blocks"][part][name]["kernel"]
            factors["m"] = dora.lengths(kernel, _inputs(name))
        blocks.setdefault(part, {})[name] = factors
    return {"blocks": blocks}


def per_block(
    adapter: Lora | None, params: dict, lora: dict, blocks: int | None = None
) -> dict[str, Any]:
    """The adapter as a scan over the first `blocks` blocks (None: all) reads it.

    An even LoRA is its stacked factors and nothing else. Where scales differ, a constant `scale`
    [L] lies beside them; DoRA's magnitudes become `gain` [L, out].
    """
    stacks = lora["blocks"]
    if blocks is not None:
        stacks = jax.tree.map(lambda leaf: leaf[:blocks], stacks)
    if adapter is None or (adapter.even and not adapter.dora):
        return stacks

    found: dict[str, Any] = {}
    for part, sites in stacks.items():
        for name, factors in sites.items():
            scales = adapter.scales(name, factors["a"].shape[0])
            own = {"a": factors["a"], "b": factors["b"]}
            if not adapter.even:
                own["scale"] = jnp.asarray(scales)
            if adapter.dora:
                kernel = params["blocks"][part][name]["kernel"]
                own["gain"] = dora.gains(kernel, factors, scales, _inputs(name))
            found.setdefault(part, {})[name] = own
    return found


def settle(adapter: Lora | None, params: dict, lora: dict | None) -> dict | None:
    """An adapter that is not trained any further: DoRA's `norm`s are measured once and for all.

    Returns:
      A tree like `lora`; LoRA comes back as it is.
    """
    if adapter is None or lora is None or not adapter.dora:
        return lora
    return _settled(adapter, params, lora)


@partial(jax.jit, static_argnums=0)
def _settled(adapter: Lora, params: dict, lora: dict) -> dict:
    blocks: dict = {}
    for part, sites in lora["blocks"].items():
        for name, factors in sites.items():
            kernel = params["blocks"][part][name]["kernel"]
            scales = adapter.scales(name, factors["a"].shape[0])
            norm = dora.norms(kernel, factors, scales, _inputs(name))
            blocks.setdefault(part, {})[name] = factors | {"norm": norm}
    return {"blocks": blocks}


@partial(jax.jit, static_argnums=2)
def merge(params: dict, lora: dict, adapter: Lora) -> dict:
    """The base with the adapter's update: W + s A B, or DoRA's W', in the base's dtype.

    It is formed in float32 and rounded once, one block at a time.

    Returns:
      A tree like `params`.

    Raises:
      UserError: the base is quantised.
    """
    if is_quantised(params):
        raise UserError(
            "model.quantize: an adapter cannot be merged into a quantised base, its rounding would "
            "swallow the update; set model.quantize=none"
        )
    blocks = {part: dict(params["blocks"][part]) for part in params["blocks"]}
    for name in adapter.targets:
        part, inputs = SITES[name][0], _inputs(name)

        def one(layer: tuple, inputs: int = inputs) -> jax.Array:
            kernel, factors, scale = layer
            if adapter.dora:
                whole = dora.turned(kernel, factors, scale, inputs)
            else:
                whole = dora.summed(kernel, factors["a"], factors["b"], scale)
            return whole.astype(kernel.dtype)

        site, factors = blocks[part][name], lora["blocks"][part][name]
        scales = adapter.scales(name, factors["a"].shape[0])
        kernel = jax.lax.map(one, (site["kernel"], factors, jnp.asarray(scales)))
        blocks[part][name] = site | {"kernel": kernel}
    return params | {"blocks": blocks}


def count(adapter: Lora, spec: ModelSpec) -> int:
    """Number of trained parameters."""
    total = 0
    for (name, _), (r, _) in adapter.table(spec.layers).items():
        _, inputs, outputs = SITES[name]
        fan_in, fan_out = math.prod(_sizes(spec, inputs)), math.prod(_sizes(spec, outputs))
        total += r * (fan_in + fan_out) + adapter.dora * fan_out
    return total


def layer_mask(adapter: Lora, spec: ModelSpec) -> jax.Array | None:
    """[L] float32 with 1 where a block's adapter is trained, or None where all are."""
    if not adapter.layers:
        return None
    return jnp.zeros(spec.layers).at[jnp.array(adapter.layers) - 1].set(1.0)


def _of_targets(key: str, given: Mapping, targets: Sequence[str]) -> dict:
    """What a setting says of each target, under our names."""
    found = {name.removesuffix("_proj"): value for name, value in given.items()}
    for name in found:
        if name not in targets:
            raise UserError(
                f"{key}: {name} is not trained; choose among lora.targets ({', '.join(targets)})"
            )
    return found


def _inputs(name: str) -> int:
    """How many of a kernel's axes are inputs."""
    return len(SITES[name][1].split())


def _columns(adapter: Lora, name: str, spec: ModelSpec) -> np.ndarray:
    """[L, R] float32: 1 in the columns within each block's own rank."""
    ranks = np.array([adapter.rank_of(name, block + 1) for block in range(spec.layers)])
    return (np.arange(adapter.r) < ranks[:, None]).astype(np.float32)


def _sizes(spec: ModelSpec, letters: str) -> tuple[int, ...]:
    size = {
        "D": spec.dim,
        "N": spec.heads,
        "K": spec.kv_heads,
        "H": spec.head_dim,
        "F": spec.ffn,
    }
    return tuple(size[letter] for letter in letters.split())
