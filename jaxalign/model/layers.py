"""One transformer block in Flax Linen: the only file that imports flax.

Four collections match four lifetimes: `params` (frozen), `lora` (trained), `intermediates` (sown
in one step) and the `dropout` key (given per call, so a replay under rematerialisation or after a
resume draws the same masks). What leaves a block besides its output leaves by `sow`: pooled
vectors, never whole states of all layers.

    block = Block(spec, Lora())
    y, sown = block.apply({'params': p, 'lora': l}, x, context, mutable=['intermediates'])
    sown['intermediates']['pooled']                  # [P, B, D] float32
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.adapters.lora import Lora
from jaxalign.model.attention import attend
from jaxalign.model.spec import ModelSpec
from jaxalign.sharding import Array, constrain


@flax.struct.dataclass
class Context:
    """What every block of one forward pass shares."""

    cos: jax.Array  # [B or 1, T, H] float32
    sin: jax.Array  # [B or 1, T, H] float32
    mask: jax.Array  # [B or 1, T, S] bool
    pool: jax.Array | None = None  # [P, B, T] float32: weights of P poolings
    slot: jax.Array | int | None = None  # where this call writes into the cache
    layer: jax.Array | None = None  # whose part of the cache it is


@flax.struct.dataclass
class Cache:
    """Keys and values of all layers; a slot is the same place in every row.

    Both stacks stay whole and take a token's few numbers in place: a layer cut out, changed and
    put back would be copied for every token. K stands before S, so that the slots of a head lie
    together, as its two products read them.
    """

    keys: jax.Array  # [L, B, K, S, H]
    values: jax.Array  # [L, B, K, S, H]

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def grow(self, slots: int) -> Cache:
        """The same with empty slots behind."""
        more = ((0, 0), (0, 0), (0, 0), (0, slots - self.slots), (0, 0))
        return jax.tree.map(lambda x: constrain(jnp.pad(x, more), "L B K S H"), self)

    def take(self, rows: jax.Array) -> Cache:
        """These rows alone."""
        return jax.tree.map(lambda x: constrain(x[:, rows], "L B K S H"), self)

    def write(self, context: Context, keys: jax.Array, values: jax.Array) -> Cache:
        """The cache with T more tokens: keys and values [B, T, K, H]."""
        assert context.layer is not None and context.slot is not None  # a cache comes with both
        start = (context.layer, 0, 0, context.slot, 0)
        put = jax.lax.dynamic_update_slice
        keys = keys.swapaxes(1, 2)[None].astype(self.keys.dtype)
        values = values.swapaxes(1, 2)[None].astype(self.values.dtype)
        return Cache(put(self.keys, keys, start), put(self.values, values, start))

    def read(self, context: Context, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, each [B, S, K, H], in the first S slots: the mask's."""
        assert context.layer is not None  # a cache comes with it
        _, rows, heads, _, width = self.keys.shape
        start, sizes = (context.layer, 0, 0, 0, 0), (1, rows, heads, context.mask.shape[-1], width)
        stacks = (self.keys, self.values)
        keys, values = (jax.lax.dynamic_slice(stack, start, sizes)[0] for stack in stacks)
        return keys.swapaxes(1, 2).astype(dtype), values.swapaxes(1, 2).astype(dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, computed in float32."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (self.spec.dim,))
        return rms_norm(x, scale, self.spec.norm_eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Llama's norm: the scale multiplies after the cast back, as in transformers."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Projection(nn.Module):
    """The weights of one projection `inputs -> outputs` and of its adapter, if it has one."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = False

    def setup(self) -> None:
        scaled = nn.initializers.normal(0.02)
        self.kernel = self.param("kernel", scaled, (*self.inputs, *self.outputs))
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, self.outputs)

    def factors(self) -> tuple[jax.Array, jax.Array] | None:
        """`a` [inputs, R] and `b` [R, outputs]; None where this projection is not adapted."""
        if not self.has_variable("lora", "a"):
            return None
        return self.get_variable("lora", "a"), self.get_variable("lora", "b")

    def base(self, x: jax.Array) -> jax.Array:
        y = jax.lax.dot_general(x, self.kernel, _contract(x, len(self.inputs)))
        return y + self.bias if self.use_bias else y


def project(
    x: jax.Array, projections: list[Projection], adapter: Lora | None, dropout: Any
) -> list[jax.Array]:
    """All projections of one input: `x W + b + s · drop(x) A B` for each.

    The A factors run as one product over the concatenated ranks: at rank 8 a product alone would
    leave a matrix unit almost idle. Projections of one input share a dropout mask.
    """
    results = [projection.base(x) for projection in projections]
    adapted = [(i, *pair) for i, p in enumerate(projections) if (pair := p.factors()) is not None]
    if not adapted or adapter is None:
        return results
    joined = [a.reshape(-1, a.shape[-1]).astype(x.dtype) for _, a, _ in adapted]
    # Tokens lie in one axis: the factors' gradients, sums over tokens, then need no transposes.
    rows = dropout(x).reshape(-1, joined[0].shape[0])  # [B·T, in]
    # A goes in turned, so that its gradient is a product [ΣR, B·T] x [B·T, in]: on a CPU up to
    # eight times as fast as its transpose, to which XLA would return without the barrier.
    turned = jax.lax.optimization_barrier(jnp.concatenate(joined, axis=-1).T)  # [ΣR, in]
    low = jax.lax.dot_general(rows, turned, (((1,), (1,)), ((), ()))) * adapter.scale  # [B·T, ΣR]
    start = 0
    for i, a, b in adapted:
        rank = a.shape[-1]
        wide = b.astype(x.dtype).reshape(rank, -1)  # [R, out]
        part = jax.lax.slice_in_dim(low, start, start + rank, axis=-1)
        results[i] = results[i] + (part @ wide).reshape(results[i].shape)
        start += rank
    return results


def _contract(x: jax.Array, axes: int) -> Any:
    """dot_general dimensions: the last `axes` of x against the first `axes` of the kernel."""
    return ((tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))), ((), ()))


class Dropout(nn.Module):
    """Dropout on an adapter's input; half the random bits of Flax's own."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rate == 0 or not self.has_rng("dropout"):
            return x
        # 16 random bits a value: the keep rate is then exact to 1/65536, at half the cost of 32.
        kept = 65536 - round(self.rate * 65536)
        bits = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint16)
        return jnp.where(bits < kept, x * (65536 / kept), 0).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    spec: ModelSpec
    adapter: Lora | None = None
    backend: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> Any:
        spec = self.spec
        wide, narrow = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim)
        q = Projection((spec.dim,), wide, spec.qkv_bias, name="q")
        k = Projection((spec.dim,), narrow, spec.qkv_bias, name="k")
        v = Projection((spec.dim,), narrow, spec.qkv_bias, name="v")
        o = Projection(wide, (spec.dim,), spec.o_bias, name="o")
        rate = self.adapter.dropout if self.adapter else 0.0
        queries, keys, values = project(x, [q, k, v], self.adapter, Dropout(rate))
        queries = constrain(rotate(queries, context), "B T N H")
        keys = constrain(rotate(keys, context), "B T K H")
        if cache is not None:
            cache = cache.write(context, keys, values)
            if context.mask.shape[-1] > x.shape[1]:  # else there is nothing before these tokens
                keys, values = cache.read(context, x.dtype)
        mixed = attend(queries, keys, values, context.mask, self.backend)
        (y,) = project(mixed, [o], self.adapter, Dropout(rate))
        return y, cache


class Mlp(nn.Module):
    """SwiGLU."""

    spec: ModelSpec
    adapter: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        gate = Projection((spec.dim,), (spec.ffn,), spec.mlp_bias, name="gate")
        up = Projection((spec.dim,), (spec.ffn,), spec.mlp_bias, name="up")
        down = Projection((spec.ffn,), (spec.dim,), spec.mlp_bias, name="down")
        rate = self.adapter.dropout if self.adapter else 0.0
        gated, raised = project(x, [gate, up], self.adapter, Dropout(rate))
        hidden = constrain(_swiglu(gated, raised), "B T F")
        return project(hidden, [down], self.adapter, Dropout(rate))[0]


class Block(nn.Module):
    """Norm, attention, norm, MLP, each beside a residual stream that is pooled on the way out."""

    spec: ModelSpec
    adapter: Lora | None = None
    backend: str = "auto"
    sows: str = "pooled"  # pooled: [P, B, D] float32 | states: [B, T, D], for parity tests

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> Any:
        attention = Attention(self.spec, self.adapter, self.backend, name="attention")
        mixed, cache = attention(RMSNorm(self.spec, name="attention_norm")(x), context, cache)
        x = constrain(x + mixed, "B T D")
        mlp = Mlp(self.spec, self.adapter, name="mlp")
        x = constrain(x + mlp(RMSNorm(self.spec, name="mlp_norm")(x)), "B T D")
        if self.sows == "states":
            self.sow("intermediates", "states", x, reduce_fn=lambda _, new: new)
        elif context.pool is not None:
            self.sow("intermediates", "pooled", pool(x, context.pool), reduce_fn=lambda _, new: new)
        return x, cache


# Cheaper to compute again than to keep: without this the backward pass stores three more [B, T, F].
@partial(jax.checkpoint, prevent_cse=False)
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return nn.silu(gate) * up


def pool(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sums over the tokens: x [B, T, D], weights [P, B, T] -> [P, B, D] float32."""
    return jnp.einsum("PBT,BTD->PBD", weights, x, preferred_element_type=jnp.float32)


def rotate(x: jax.Array, context: Context) -> jax.Array:
    """Rotary positions, halves rotated as in transformers: x [B, T, heads, H]."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = context.cos[:, :, None], context.sin[:, :, None]  # [B, T, 1, H]
    return (x * cos + turned * sin).astype(x.dtype)


def rotary(spec: ModelSpec, positions: Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [B or 1, T, H] float32: in bf16 position 257 equals position 256."""
    inverse = _inverse_frequencies(spec)
    angles = positions[..., None].astype(jnp.float32) * inverse  # [B, T, H/2]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def _inverse_frequencies(spec: ModelSpec) -> jax.Array:
    steps = jnp.arange(0, spec.head_dim, 2, dtype=jnp.float32) / spec.head_dim
    inverse = 1.0 / (spec.rope_theta**steps)  # [H/2]
    scaling = spec.rope_scaling
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    # Llama 3.1: long wavelengths are stretched by the factor, short ones kept, in between blended.
    wavelength = 2 * math.pi / inverse
    turns = scaling.original_max_position / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return (1 - blend) * inverse / scaling.factor + blend * inverse
