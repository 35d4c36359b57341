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

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.adapters.lora import Lora
from jaxalign.model.attention import Sight, attend
from jaxalign.model.masks import random_bits
from jaxalign.model.quantised import Quantised
from jaxalign.model.rotary import rotate
from jaxalign.model.spec import NORMS, QK_NORMS, ModelSpec
from jaxalign.sharding import constrain, letters_of

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": partial(nn.gelu, approximate=True),
}


@flax.struct.dataclass
class Context:
    """What the blocks of one forward pass share; where layers differ, the decoder picks theirs."""

    cos: jax.Array  # [B or 1, T, H] float32
    sin: jax.Array  # [B or 1, T, H] float32
    mask: jax.Array  # [B or 1, T, S] bool
    pool: jax.Array | None = None  # [P, B, T] float32: weights of P poolings
    slot: jax.Array | int | None = None  # where this call writes into the cache
    layer: jax.Array | None = None  # whose part of the cache it is
    places: tuple[jax.Array, jax.Array] | None = None  # of queries [.., T] and keys [.., S]
    sight: Sight | None = None  # what the mask says of whole causal rows


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
    """`rms_norm` with a scale of its own."""

    spec: ModelSpec
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = nn.initializers.constant(1.0 - self.spec.norm_offset)
        return rms_norm(x, self.param("scale", one, self.shape), self.spec)


def rms_norm(x: jax.Array, scale: jax.Array, spec: ModelSpec) -> jax.Array:
    """x / rms(x) · (scale + offset) over as many last axes as the scale has, in float32.

    Llama's scale multiplies after the cast back, Gemma's and OLMo 2's before it, as in
    transformers.
    """
    axes = tuple(range(-scale.ndim, 0))
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + spec.norm_eps)
    dtype = jnp.float32 if spec.wide_norms else x.dtype
    scale = scale.astype(dtype) + spec.norm_offset if spec.norm_offset else scale.astype(dtype)
    return (wide.astype(dtype) * scale).astype(x.dtype)


class Projection(nn.Module):
    """The weights of one projection `inputs -> outputs` and of its adapter, if it has one."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = False

    def setup(self) -> None:
        scaled = nn.initializers.normal(0.02)
        kernel: Any = self.get_variable("params", "kernel")
        if isinstance(kernel, Quantised):  # whose leaves have shapes of their own
            self.kernel: jax.Array | Quantised = kernel
        else:
            self.kernel = self.param("kernel", scaled, (*self.inputs, *self.outputs))
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, self.outputs)

    def factors(self, name: str) -> Any:
        """What lies beside this projection in one block (see `per_block`), None where nothing.

        `a` [inputs, R], `b` [R, outputs], `scale` a number, `gain` [outputs].
        """
        return self.get_variable("lora", name) if self.has_variable("lora", name) else None

    def base(self, x: jax.Array) -> jax.Array:
        """`x W + b`."""
        y = self.product(x)
        return y + self.bias if self.use_bias else y

    def product(self, x: jax.Array) -> jax.Array:
        """`x W`."""
        axes = _contract(x, len(self.inputs))
        if not isinstance(self.kernel, Quantised):
            return jax.lax.dot_general(x, self.kernel, axes)

        # Kept for the backward pass as it is stored, and widened again there. What was split for
        # storage is gathered as it is stored: wide, it would be two to four times the bytes.
        letters = letters_of("/".join((*self.path, "kernel")))
        assert letters is not None  # the table of sharding has every projection
        letters = letters.removeprefix("L ")

        @partial(jax.checkpoint, prevent_cse=False)
        def widened(x: jax.Array, kernel: Quantised) -> jax.Array:
            kernel = jax.tree.map(lambda leaf: constrain(leaf, letters), kernel)
            return jax.lax.dot_general(x, kernel.widen(x.dtype), axes)

        return widened(x, self.kernel)

    def reweighed(
        self, y: jax.Array, x: jax.Array, dropped: jax.Array, part: jax.Array, gain: jax.Array
    ) -> jax.Array:
        """DoRA's `x W + b + (g - 1) · drop(x) W + g · part`, from y = `x W + b`.

        In float32: a gain differs from 1 by less than bfloat16 can tell.
        """
        if dropped is not x:
            return (y + (gain - 1) * self.product(dropped) + gain * part).astype(y.dtype)
        # One product, that of y, and one on the way back.
        whole = gain * (self.product(x) + part)
        return (whole + self.bias if self.use_bias else whole).astype(y.dtype)


def project(
    x: jax.Array, projections: list[Projection], adapter: Lora | None, dropout: Any
) -> list[jax.Array]:
    """All projections of one input: `x W + b + s · drop(x) A B` for each.

    The A factors run as one product over the concatenated ranks: at rank 8 a product alone would
    leave a matrix unit almost idle. Projections of one input share a dropout mask. With DoRA the
    sum of both products is multiplied by `g`, each output's gain (`jaxalign.adapters.dora`);
    dropout falls as in PEFT on all that the gain changes.
    """
    results = [projection.base(x) for projection in projections]
    adapted = [(i, p) for i, p in enumerate(projections) if p.factors("a") is not None]
    if not adapted or adapter is None:
        return results
    factors = [p.factors("a") for _, p in adapted]
    joined = [a.reshape(-1, a.shape[-1]) for a in factors]
    dropped = dropout(x)
    # Tokens lie in one axis: the factors' gradients, sums over tokens, then need no transposes.
    rows = dropped.reshape(-1, joined[0].shape[0])  # [B·T, in]
    # A goes in turned, so that its gradient is a product [ΣR, B·T] x [B·T, in]: on a CPU up to
    # eight times as fast as its transpose, to which XLA would return without the barrier.
    turned = jax.lax.optimization_barrier(jnp.concatenate(joined, axis=-1).T)  # [ΣR, in]
    scale = _scale([p for _, p in adapted], adapter, x.dtype)
    low = _times(rows, turned, 1) * scale  # [B·T, ΣR]
    start = 0
    for i, p in adapted:
        b, gain = p.factors("b"), p.factors("gain")
        rank = b.shape[0]
        wide = b.reshape(rank, -1)  # [R, out]
        part = jax.lax.slice_in_dim(low, start, start + rank, axis=-1)
        part = _times(part, wide, 0).reshape(results[i].shape)
        if gain is None:
            results[i] = results[i] + part
        else:
            results[i] = p.reweighed(results[i], x, dropped, part, gain)
        start += rank
    return results


def _times(x: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    """x [M, in] times a trained factor whose `axis` is `in`, in x's dtype: [M, out].

    A cast of the factor would be transposed into a cast of its gradient, which each device would
    round before the sum over devices: its sum over tokens stays as wide as the factor instead.
    """
    if factor.dtype == x.dtype:
        return jax.lax.dot_general(x, factor, (((1,), (axis,)), ((), ())))
    return _narrowed(x, factor, axis)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrowed(x: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(x, factor.astype(x.dtype), (((1,), (axis,)), ((), ())))


def _narrowed_forward(x: jax.Array, factor: jax.Array, axis: int) -> Any:
    return _narrowed(x, factor, axis), (x, factor)


def _narrowed_backward(axis: int, kept: Any, slope: jax.Array) -> Any:
    x, factor = kept
    by_x = jax.lax.dot_general(slope, factor.astype(x.dtype), (((1,), (1 - axis,)), ((), ())))
    left, right = (x, slope) if axis == 0 else (slope, x)
    over_tokens = (((0,), (0,)), ((), ()))
    wide = factor.dtype
    by_factor = jax.lax.dot_general(left, right, over_tokens, preferred_element_type=wide)
    return by_x, by_factor


_narrowed.defvjp(_narrowed_forward, _narrowed_backward)


def _scale(projections: list[Projection], adapter: Lora, dtype: Any) -> Any:
    """One number for all, or [ΣR] where scales differ."""
    own = [(p.factors("scale"), p.factors("b")) for p in projections]
    if any(scale is None for scale, _ in own):
        return adapter.scale
    return jnp.concatenate([jnp.full(b.shape[0], scale, dtype) for scale, b in own])


def _contract(x: jax.Array, axes: int) -> Any:
    """dot_general dimensions: the last `axes` of x against the first `axes` of the kernel."""
    return ((tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))), ((), ()))


class Dropout(nn.Module):
    """Dropout on an adapter's input, with masks that cost nothing beside a product."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rate == 0 or not self.has_rng("dropout"):
            return x
        kept = min(round((1 - self.rate) * 2**32), 2**32 - 1)
        keep = random_bits(self.make_rng("dropout"), x.shape) < jnp.uint32(kept)
        # In float32: bfloat16 would round 1 / 0.9 itself, and every sum would be 0.2 % too small.
        scaled = x.astype(jnp.float32) * (2**32 / kept)
        return jnp.where(keep, scaled, 0).astype(x.dtype)


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
        if axes := QK_NORMS[spec.qk_norm]:
            name = f"{{}}_{spec.qk_norm}_norm"
            queries = RMSNorm(spec, queries.shape[-axes:], name=name.format("q"))(queries)
            keys = RMSNorm(spec, keys.shape[-axes:], name=name.format("k"))(keys)
        queries = constrain(rotate(queries, context.cos, context.sin), "B T N H")
        keys = constrain(rotate(keys, context.cos, context.sin), "B T K H")
        queries, keys = checkpoint_name(queries, "queries"), checkpoint_name(keys, "keys")
        values = checkpoint_name(values, "values")
        if cache is not None:
            cache = cache.write(context, keys, values)
            if context.mask.shape[-1] > x.shape[1]:  # else there is nothing before these tokens
                keys, values = cache.read(context, x.dtype)
        how = {"scale": spec.score_scale, "cap": spec.attn_soft_cap}
        sight = context.sight
        mixed = attend(queries, keys, values, context.mask, self.backend, sight=sight, **how)
        mixed = checkpoint_name(mixed, "mixed")
        (y,) = project(mixed, [o], self.adapter, Dropout(rate))
        return y, cache


class Mlp(nn.Module):
    """A gated MLP: SwiGLU or, by the spec's activation, GeGLU (Shazeer 2020)."""

    spec: ModelSpec
    adapter: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array, neurons: jax.Array | None = None) -> jax.Array:
        """`neurons` [P, B, T] pools the gates' activations on their way, to be sown."""
        spec = self.spec
        gate = Projection((spec.dim,), (spec.ffn,), spec.mlp_bias, name="gate")
        up = Projection((spec.dim,), (spec.ffn,), spec.mlp_bias, name="up")
        down = Projection((spec.ffn,), (spec.dim,), spec.mlp_bias, name="down")
        rate = self.adapter.dropout if self.adapter else 0.0
        gated, raised = project(x, [gate, up], self.adapter, Dropout(rate))
        gated, raised = checkpoint_name(gated, "gate"), checkpoint_name(raised, "up")
        if neurons is not None:
            fired = pool(ACTIVATIONS[spec.activation](gated), neurons)
            self.sow("intermediates", "neurons", fired, reduce_fn=lambda _, new: new)
        hidden = constrain(_gated(gated, raised, spec.activation), "B T F")
        return project(hidden, [down], self.adapter, Dropout(rate))[0]


class Block(nn.Module):
    """Attention and MLP with norms, beside a residual stream that is pooled on the way out."""

    spec: ModelSpec
    adapter: Lora | None = None
    backend: str = "auto"
    # pooled: [P, B, D] float32 | neurons: [P, B, F] | states: [B, T, D], for parity tests
    sows: str = "pooled"

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None = None) -> Any:
        attention = Attention(self.spec, self.adapter, self.backend, name="attention")
        mixed, cache = attention(self._norm(x, "attention", "before"), context, cache)
        x = constrain(x + self._norm(mixed, "attention", "after"), "B T D")
        x = checkpoint_name(x, "residual")
        mlp = Mlp(self.spec, self.adapter, name="mlp")
        neurons = context.pool if self.sows == "neurons" else None
        mixed = mlp(self._norm(x, "mlp", "before"), neurons)
        x = constrain(x + self._norm(mixed, "mlp", "after"), "B T D")
        if self.sows == "states":
            self.sow("intermediates", "states", x, reduce_fn=lambda _, new: new)
        elif self.sows == "pooled" and context.pool is not None:
            self.sow("intermediates", "pooled", pool(x, context.pool), reduce_fn=lambda _, new: new)
        return x, cache

    def _norm(self, x: jax.Array, half: str, side: str) -> jax.Array:
        """`x` normed, where this family has a norm on this side of this half."""
        if side not in NORMS[self.spec.norms]:
            return x
        name = f"{half}_{'post_' if side == 'after' else ''}norm"
        return RMSNorm(self.spec, (self.spec.dim,), name=name)(x)


# Cheaper to compute again than to keep: without this the backward pass stores three more [B, T, F].
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    return ACTIVATIONS[activation](gate) * up


def pool(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sums over the tokens: x [B, T, D], weights [P, B, T] -> [P, B, D] float32."""
    return jnp.einsum("PBT,BTD->PBD", weights, x, preferred_element_type=jnp.float32)
