"""LoRA: two thin matrices beside each frozen projection, and nothing else is trained.

`y = x W + s · drop(x) A B` with `A` [in, R] random and `B` [R, out] zero, so that step 0 is the
base model (Hu et al. 2021, eq. 3; names, scale and initialisation are PEFT's).

    adapter = Lora.parse(spec, r=8, targets=['q', 'v'], layers='1..16')
    lora = init(adapter, spec, jax.random.key(0))    # {'blocks': {'attention': {'q': {'a', 'b'}}}}
    count(adapter, spec)                             # trained parameters
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxalign.errors import UserError
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


@dataclass(frozen=True)
class Lora:
    """What an adapter is, without its weights."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(SITES)
    layers: tuple[int, ...] = ()  # trained blocks, counted from 1; empty: all
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)

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
        if r < 1:
            raise UserError(f"lora.r: {r} is no rank; use 1 or more (the paper's is 8)")
        return cls(
            r,
            float(alpha),
            float(dropout),
            tuple(name for name in SITES if name in names),
            parse_layers(layers, spec.layers),
            scaling == "rank_stabilised",
        )


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


def init(adapter: Lora, spec: ModelSpec, key: jax.Array) -> dict:
    """Fresh factors, float32: A uniform in ±1/sqrt(in) (PEFT's kaiming, a = sqrt 5), B zero."""
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
        b = jnp.zeros((spec.layers, adapter.r, *fan_out), jnp.float32)
        blocks.setdefault(part, {})[name] = {"a": a, "b": b}
    return {"blocks": blocks}


@partial(jax.jit, static_argnums=2)
def merge(params: dict, lora: dict, adapter: Lora) -> dict:
    """The base with the adapter's update added, W + s A B, in the base's dtype.

    The sum is formed in float32 and rounded once, one block at a time.

    Returns:
      A tree like `params`.
    """

    def add(layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        kernel, a, b = layer
        update = a.reshape(-1, adapter.r) @ b.reshape(adapter.r, -1)  # [in, out]
        return (kernel + adapter.scale * update.reshape(kernel.shape)).astype(kernel.dtype)

    blocks = {part: dict(params["blocks"][part]) for part in params["blocks"]}
    for name in adapter.targets:
        site, factors = blocks[SITES[name][0]], lora["blocks"][SITES[name][0]][name]
        kernel = jax.lax.map(add, (site[name]["kernel"], factors["a"], factors["b"]))
        site[name] = site[name] | {"kernel": kernel}
    return params | {"blocks": blocks}


def count(adapter: Lora, spec: ModelSpec) -> int:
    """Number of trained parameters."""
    per_block = sum(
        adapter.r * (math.prod(_sizes(spec, inputs)) + math.prod(_sizes(spec, outputs)))
        for name, (_, inputs, outputs) in SITES.items()
        if name in adapter.targets
    )
    return per_block * (len(adapter.layers) or spec.layers)


def layer_mask(adapter: Lora, spec: ModelSpec) -> jax.Array | None:
    """[L] float32 with 1 where a block's adapter is trained, or None where all are."""
    if not adapter.layers:
        return None
    return jnp.zeros(spec.layers).at[jnp.array(adapter.layers) - 1].set(1.0)


def _sizes(spec: ModelSpec, letters: str) -> tuple[int, ...]:
    size = {
        "D": spec.dim,
        "N": spec.heads,
        "K": spec.kv_heads,
        "H": spec.head_dim,
        "F": spec.ffn,
    }
    return tuple(size[letter] for letter in letters.split())
