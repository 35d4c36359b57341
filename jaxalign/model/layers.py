"""One transformer block in Flax Linen: the only file that imports flax.

Three collections match three lifetimes: `params` (frozen), `intermediates` (sown in one step) and
the `dropout` key (given per call, so a replay under rematerialisation or after a resume draws the
same masks). What is trained comes as an argument, a block's part of the adapter, and only the
adapter knows what is in it. What leaves a block besides its output leaves by `sow`: pooled vectors,
never whole states of all layers.

    block = Block(spec, adapter)
    run = partial(block.apply, {'params': p}, mutable=['intermediates'])
    y, sown = run(x, context, None, own)             # own: {'attention': {'q': ...}, 'mlp': ...}
    sown['intermediates']['pooled']                  # [P, B, D] float32
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.frozen.projection import Attached, Projection
from jaxalign.frozen.quantised import Quantised
from jaxalign.model.attention import Before, Sight, attend, near
from jaxalign.model.rotary import rotate
from jaxalign.model.spec import NORMS, QK_NORMS, ModelSpec
from jaxalign.sharding import constrain, letters_of

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": partial(nn.gelu, approximate=True),
}


@flax.struct.dataclass
class Front:
    """What several texts have in common and comes before them: computed once, seen by all.

    It is either a stem, the first P tokens of each sequence, which run in the same pass, or a cache
    of such tokens.
    """

    seen: jax.Array  # [B or 1, T, P] bool: which of them each token of the pass sees
    places: tuple[jax.Array, jax.Array]  # positions of those tokens [.., T], of these [.., P]
    cache: Cache | None = None  # of one row

    @property
    def tokens(self) -> int:
        return self.seen.shape[-1]

    def near(self, window: jax.Array) -> Front:
        """The same in a layer with a window."""
        return Front(self.seen & near(*self.places, window), self.places, self.cache)


@flax.struct.dataclass
class Context:
    """What the blocks of one forward pass share; where layers differ, the decoder picks theirs."""

    cos: jax.Array  # [B or 1, T, H] float32
    sin: jax.Array  # [B or 1, T, H] float32
    mask: jax.Array  # [B or 1, T, S] bool, or as `attention.local` has it
    pool: jax.Array | None = None  # [P, B, T] or [P, B, R, T] float32: weights of P poolings
    slot: jax.Array | int | None = None  # where this call writes into the cache
    layer: jax.Array | None = None  # whose part of the cache it is
    places: tuple[jax.Array, jax.Array] | None = None  # of queries [.., T] and keys [.., S]
    sight: Sight | None = None  # what the mask says of whole causal rows
    front: Front | None = None  # what comes before these tokens
    # Positions of these tokens [B or 1, T] and of a trained prefix [1, P], where there is one.
    prefix: tuple[jax.Array, jax.Array] | None = None
    prefix_seen: jax.Array | None = None  # [B or 1, T, P] bool; None: all see all of it


@flax.struct.dataclass
class Cache:
    """Keys and values of all layers; a slot is the same place in every row.

    Both stacks stay whole and take a token's few numbers in place: a layer cut out, changed and
    put back would be copied for every token. K stands before S, so that the slots of a head are
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

    def read(self, context: Context, dtype: Any, slots: int) -> tuple[jax.Array, jax.Array]:
        """This layer's keys and values, each [B, S, K, H], in the first S slots."""
        assert context.layer is not None  # a cache comes with it
        _, rows, heads, _, width = self.keys.shape
        start, sizes = (context.layer, 0, 0, 0, 0), (1, rows, heads, slots, width)
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


class Kernel(nn.Module):
    """The weights of one projection `inputs -> outputs`."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool = False

    @nn.compact
    def __call__(self) -> Projection:
        kernel: Any = self.get_variable("params", "kernel")
        if not isinstance(kernel, Quantised):  # whose leaves have shapes of their own
            scaled = nn.initializers.normal(0.02)
            kernel = self.param("kernel", scaled, (*self.inputs, *self.outputs))
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs)
        letters = letters_of("/".join((*self.path, "kernel")))
        return Projection(kernel, bias, len(self.inputs), letters and letters.removeprefix("L "))


class Key(nn.Module):
    """The random key of an adapter's dropout, None where nothing is dropped.

    Its name is a part of what the key is made of: a run that is resumed draws the same masks.
    """

    @nn.compact
    def __call__(self) -> jax.Array | None:
        return self.make_rng("dropout") if self.has_rng("dropout") else None


def project(
    x: jax.Array,
    sites: Mapping[str, Projection],  # of one input, in the order of the results
    adapter: Attached | None,
    own: Mapping[str, Any],  # of this half of the block; see `Attached.per_block`
    key: Key,
) -> list[jax.Array]:
    """The outputs of some projections of one input, as the adapter changes them."""
    outputs = {name: site(x) for name, site in sites.items()}
    own = {name: own[name] for name in sites if name in own}
    if adapter is not None and own:
        outputs |= adapter.project(x, outputs, sites, own, key() if adapter.dropout else None)
    return list(outputs.values())


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    spec: ModelSpec
    adapter: Attached | None = None
    backend: str = "auto"

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, own: Mapping[str, Any]
    ) -> Any:
        spec = self.spec
        wide, narrow = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim)
        qkv = {
            name: Kernel((spec.dim,), heads, spec.qkv_bias, name=name)()
            for name, heads in (("q", wide), ("k", narrow), ("v", narrow))
        }
        o = {"o": Kernel(wide, (spec.dim,), spec.o_bias, name="o")()}
        queries, keys, values = project(x, qkv, self.adapter, own, Key(name="Dropout_0"))
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
                keys, values = cache.read(context, x.dtype, context.mask.shape[-1])
        mixed = self._mix(queries, keys, values, context, own)
        (y,) = project(mixed, o, self.adapter, own, Key(name="Dropout_1"))
        return y, cache

    def _mix(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        context: Context,
        own: Mapping[str, Any],
    ) -> jax.Array:
        """[B, T, N, H]: what each token reads, of its sequence and of what comes before."""
        mix = partial(
            attend,
            backend=self.backend,
            scale=self.spec.score_scale,
            cap=self.spec.attn_soft_cap,
        )
        front, before = context.front, None
        if "prefix" in own:  # trained keys and values, without positions of their own
            # First one for each row and then rounded: gradients of rows are summed in float32.
            k, v = (
                jnp.broadcast_to(x, (keys.shape[0], *x.shape)).astype(keys.dtype)
                for x in (own["prefix"]["k"], own["prefix"]["v"])
            )
            seen = context.prefix_seen
            if seen is None:
                seen = jnp.ones((1, queries.shape[1], k.shape[1]), bool)
            before = Before(k, v, seen)
        if front is not None:
            k, v = (
                (x[:, : front.tokens] for x in (keys, values))
                if front.cache is None
                else front.cache.read(context, keys.dtype, front.tokens)
            )
            before = Before(k, v, front.seen).behind(before)
        return mix(queries, keys, values, context.mask, sight=context.sight, before=before)


class Mlp(nn.Module):
    """A gated MLP: SwiGLU or, by the spec's activation, GeGLU (Shazeer 2020)."""

    spec: ModelSpec
    adapter: Attached | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, neurons: jax.Array | None, own: Mapping[str, Any]
    ) -> jax.Array:
        """`neurons` [P, B, T] pools the gates' activations on their way, to be sown."""
        spec, wide, narrow = self.spec, (self.spec.ffn,), (self.spec.dim,)
        pair = {name: Kernel(narrow, wide, spec.mlp_bias, name=name)() for name in ("gate", "up")}
        down = {"down": Kernel(wide, narrow, spec.mlp_bias, name="down")()}
        gated, raised = project(x, pair, self.adapter, own, Key(name="Dropout_0"))
        gated, raised = checkpoint_name(gated, "gate"), checkpoint_name(raised, "up")
        if neurons is not None:
            fired = pool(ACTIVATIONS[spec.activation](gated), neurons)
            self.sow("intermediates", "neurons", fired, reduce_fn=lambda _, new: new)
        hidden = constrain(_gated(gated, raised, spec.activation), "B T F")
        return project(hidden, down, self.adapter, own, Key(name="Dropout_1"))[0]


class Block(nn.Module):
    """Attention and MLP with norms, around a residual stream that is pooled on the way out."""

    spec: ModelSpec
    adapter: Attached | None = None
    backend: str = "auto"
    # pooled: [P, B, (R,) D] float32 | neurons: [P, B, F] | states: [B, T, D], for parity tests
    sows: str = "pooled"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: Context,
        cache: Cache | None = None,
        own: Mapping[str, Any] | None = None,  # this block's part of the adapter
    ) -> Any:
        own = own or {}
        attention = Attention(self.spec, self.adapter, self.backend, name="attention")
        before = self._norm(x, "attention", "before")
        mixed, cache = attention(before, context, cache, own.get("attention", {}))
        x = constrain(x + self._norm(mixed, "attention", "after"), "B T D")
        x = checkpoint_name(x, "residual")
        mlp = Mlp(self.spec, self.adapter, name="mlp")
        neurons = context.pool if self.sows == "neurons" else None
        mixed = mlp(self._norm(x, "mlp", "before"), neurons, own.get("mlp", {}))
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
    """Weighted sums over the tokens of x [B, T, D], float32.

    Args:
      weights: [P, B, T] -> [P, B, D]; [P, B, R, T] of R texts in a sequence -> [P, B, R, D].
    """
    product = "PBT,BTD->PBD" if weights.ndim == 3 else "PBRT,BTD->PBRD"
    return jnp.einsum(product, weights, x, preferred_element_type=jnp.float32)
