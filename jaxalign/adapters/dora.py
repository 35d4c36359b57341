"""DoRA: the length of every column of a weight is trained together with a LoRA that turns it.

`W' = m · (W + s A B) / ‖W + s A B‖`, lengths taken over the inputs of each output (Liu et al.
2024, eq. 5); the length below the line counts as a constant when gradients are taken (section
4.3), as in PEFT.

    adapter = Dora(r=8, alpha=16.0)                     # otherwise a Lora
    m = lengths(kernel, inputs=1)                       # [L, out]: where m begins
    gain = gains(kernel, {'a': a, 'b': b, 'm': m}, scales, inputs=1)     # [L, out]: m / ‖...‖

Each pass forms W + s A B of every adapted projection once to measure it, one block at a time: a
second reading of the weights, 2 R · in · out operations and [in, out] float32 of passing memory,
whatever the number of tokens. With dropout the weights also meet the dropped input besides the
whole one, which doubles the base's products. What is trained or written grows by [L, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign.adapters.lora import Factors, Lora, each, summed
from jaxalign.frozen.projection import Projection
from jaxalign.frozen.quantised import Quantised, widen
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA that also trains `m` [L, out], the lengths of the weights' columns."""

    name: ClassVar[str] = "DoRA"
    kind: ClassVar[str] = "dora"
    dora: ClassVar[bool] = True

    def settle(self, params: Any, trained: Any) -> Any:
        """The tree with every `norm`, measured once and for all."""
        return _settled(self, params, trained)

    def _fresh(self, target: str, spec: ModelSpec, key: jax.Array, params: Any) -> dict:
        # Magnitudes begin as the lengths of the base's columns (section 4.1).
        return super()._fresh(target, spec, key, params) | {
            "m": lengths(_kernel(params, target), _inputs(target))
        }

    def _seen(self, params: Any, stacks: dict) -> dict:
        return each(stacks, partial(self._beside, params))

    def _beside(self, params: Any, target: str, factors: Factors) -> dict:
        scales = self.scales(target, factors["a"].shape[0])
        gain = gains(_kernel(params, target), factors, scales, _inputs(target))
        return super()._beside(params, target, factors) | {"gain": gain}

    def _add(
        self, y: jax.Array, part: jax.Array, x: jax.Array, dropped: jax.Array, site: Projection,
        own: Factors,
    ) -> jax.Array:  # fmt: skip
        """`x W + b + (g - 1) · drop(x) W + g · part`: dropout falls on all that the gain changes.

        In float32: a gain differs from 1 by less than bfloat16 can hold.
        """
        gain = own["gain"]
        if dropped is not x:
            return (y + (gain - 1) * site.product(dropped) + gain * part).astype(y.dtype)
        # One product, that of y, and one on the way back.
        return site.shifted(gain * (site.product(x) + part)).astype(y.dtype)

    def _merged(self, kernel: jax.Array, factors: Factors, scale: Any, inputs: int) -> jax.Array:
        return turned(kernel, factors, scale, inputs)


@partial(jax.jit, static_argnums=0)
def _settled(adapter: Dora, params: dict, trained: dict) -> dict:
    def measured(target: str, factors: Factors) -> dict:
        scales = adapter.scales(target, factors["a"].shape[0])
        norm = norms(_kernel(params, target), factors, scales, _inputs(target))
        return {**factors, "norm": norm}

    return {"blocks": each(trained["blocks"], measured)}


def _kernel(params: Any, target: str) -> jax.Array | Quantised:
    return params["blocks"][TARGETS[target].half][target]["kernel"]


def _inputs(target: str) -> int:
    return len(TARGETS[target].inputs)


def length(weight: jax.Array, inputs: int) -> jax.Array:
    """[out...]: the length of each column of a weight [in..., out...] with `inputs` input axes."""
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=tuple(range(inputs))))


def turned(kernel: jax.Array, factors: Mapping[str, jax.Array], scale: Any, inputs: int) -> Any:
    """W' of one projection, float32; W itself where the scale is 0 (no adapter there)."""
    whole = summed(kernel, factors["a"], factors["b"], scale)
    gain = factors["m"] / _no_zero(length(whole, inputs))
    return jnp.where(scale == 0, whole, gain * whole)


def lengths(kernel: jax.Array | Quantised, inputs: int) -> jax.Array:
    """[L, out...] float32: the columns' lengths of a stack of weights, block by block."""
    return jax.lax.map(lambda weight: length(widen(weight, jnp.float32), inputs), kernel)


def norms(
    kernel: jax.Array | Quantised, factors: Mapping[str, jax.Array], scales: Any, inputs: int
) -> jax.Array:
    """[L', out...] float32: ‖W + s A B‖ of the first L' blocks, as many as the factors have."""
    a, b = (jax.lax.stop_gradient(factors[name]) for name in ("a", "b"))

    def one(block: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        index, a, b, scale = block
        # By index, so that some blocks of a long stack are measured without a copy of it.
        take = partial(jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False)
        weight = jax.tree.map(take, kernel)
        return length(summed(weight, a, b, scale), inputs)

    return jax.lax.map(one, (jnp.arange(a.shape[0]), a, b, jnp.asarray(scales)))


def gains(
    kernel: jax.Array | Quantised, factors: Mapping[str, jax.Array], scales: Any, inputs: int
) -> jax.Array:
    """[L', out...] float32: m / ‖W + s A B‖, and 1 where the scale is 0.

    `factors` may bring the lengths as `norm`: a generation measures once, not for every token.
    """
    norm = factors["norm"] if "norm" in factors else norms(kernel, factors, scales, inputs)
    adapted = jnp.asarray(scales != 0).reshape(-1, *(1,) * (norm.ndim - 1))
    return jnp.where(adapted, factors["m"] / _no_zero(norm), 1.0)


def _no_zero(norm: jax.Array) -> jax.Array:
    # A column of zeros has no direction: it stays zero, where PEFT's quotient would be NaN.
    return jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)
