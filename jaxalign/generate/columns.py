"""One token a row on a CPU: weights laid out for it once, activations as columns.

XLA's CPU product of a weight [out, in] and a few dozen columns [in, B] runs about twice as fast as
that of rows and [in, out], and weights cut out of their stack once need no copy for every token.
Accelerators do neither: they read the stack in place, and have no memory for a second copy.

    columns = lay_out(decoder, params, lora)                      # once for all prompts
    cache = ColumnCache.start(prompt_cache, slots=128)
    logits, cache = columns.extend(tokens, cache, slot=64, positions=lengths, seen=mask)   # [B, V]
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.model.decoder import Decoder
from jaxalign.model.layers import Cache, rotary
from jaxalign.model.spec import ModelSpec


@flax.struct.dataclass
class Dense:
    """Projections of one input, stacked; their adapter widens the input by its ranks."""

    weight: jax.Array  # [out, in + R]
    factors: jax.Array | None  # [R, in], times the adapter's scale
    bias: jax.Array | None  # [out]

    def __call__(self, x: jax.Array) -> jax.Array:
        """[out, B] for x [in, B]."""
        if self.factors is not None:
            x = jnp.concatenate([x, self.factors @ x])
        y = self.weight @ x
        return y if self.bias is None else y + self.bias[:, None]


@flax.struct.dataclass
class Layer:
    """One block's weights."""

    qkv: Dense
    o: Dense
    gate_up: Dense
    down: Dense
    attention_norm: jax.Array  # [D, 1]
    mlp_norm: jax.Array  # [D, 1]


@flax.struct.dataclass
class ColumnCache:
    """Keys and values, an array for every layer; slots lie last in the keys, where scores do."""

    keys: tuple[jax.Array, ...]  # L times [B, K, H, S]
    values: tuple[jax.Array, ...]  # L times [B, K, S, H]

    @classmethod
    def start(cls, cache: Cache, slots: int) -> ColumnCache:
        """The prompt's cache, with room for `slots`."""
        keys = tuple(layer.swapaxes(-1, -2) for layer in cache.keys)
        return cls(keys, tuple(cache.values)).grow(slots)

    @property
    def slots(self) -> int:
        return self.keys[0].shape[-1]

    def grow(self, slots: int) -> ColumnCache:
        """The same with empty slots behind."""
        more = (0, slots - self.slots)
        return ColumnCache(
            tuple(jnp.pad(x, ((0, 0), (0, 0), (0, 0), more)) for x in self.keys),
            tuple(jnp.pad(x, ((0, 0), (0, 0), more, (0, 0))) for x in self.values),
        )

    def take(self, rows: jax.Array) -> ColumnCache:
        """These rows alone."""
        return jax.tree.map(lambda x: x[rows], self)


@flax.struct.dataclass
class Columns:
    """A decoder's weights for one token a row."""

    layers: tuple[Layer, ...]
    embed: jax.Array  # [V, D]
    head: jax.Array  # [V, D]
    norm: jax.Array  # [D, 1]
    spec: ModelSpec = flax.struct.field(pytree_node=False)

    def extend(
        self,
        tokens: jax.Array,  # [B] int32
        cache: ColumnCache,
        slot: jax.Array,  # where the token goes in the cache
        positions: jax.Array,  # [B] int32
        seen: jax.Array,  # [B, S] bool: the slots that each row looks at
    ) -> tuple[jax.Array, ColumnCache]:
        """Logits [B, V] behind the tokens, and the cache with them."""
        spec = self.spec
        cos, sin = (x[:, 0].T for x in rotary(spec, positions[:, None]))  # [H, B]
        x = self.embed[tokens].T  # [D, B]
        bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]  # [B, 1, 1, S]
        written: list[tuple[jax.Array, jax.Array]] = []
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            heads = layer.qkv(_norm(x, layer.attention_norm, spec))
            heads = heads.reshape(-1, spec.head_dim, x.shape[1])  # [N + 2K, H, B]
            q, k, v = jnp.split(heads, [spec.heads, spec.heads + spec.kv_heads])
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            put = jax.lax.dynamic_update_slice
            keys = put(keys, k.transpose(2, 0, 1)[..., None], (0, 0, 0, slot))
            values = put(values, v.transpose(2, 0, 1)[:, :, None], (0, 0, slot, 0))
            x = x + layer.o(_attend(q, keys, values, bias))
            gate, up = jnp.split(layer.gate_up(_norm(x, layer.mlp_norm, spec)), 2)
            x = x + layer.down(jax.nn.silu(gate) * up)
            written.append((keys, values))
        # Without the barrier XLA would turn the product round, to write rows.
        logits = jax.lax.optimization_barrier(self.head @ _norm(x, self.norm, spec))  # [V, B]
        return logits.T, ColumnCache(*zip(*written, strict=True))


def suits(params: dict) -> bool:
    """Whether this process should decode with columns: float32 weights on one CPU device."""
    one = jax.sharding.get_abstract_mesh().size <= 1 and jax.process_count() == 1
    return jax.default_backend() == "cpu" and one and params["embed"].dtype == jnp.float32


@partial(jax.jit, static_argnums=0)
def lay_out(decoder: Decoder, params: dict, lora: dict | None) -> Columns:
    """The decoder's weights as columns want them; blocks are copied."""
    blocks, adapters = params["blocks"], lora["blocks"] if lora else {}
    scale = decoder.adapter.scale if decoder.adapter else 1.0

    def dense(index: int, part: str, names: tuple[str, ...]) -> Dense:
        weights, first, second = [], [], []
        for name in names:
            kernel, ins = blocks[part][name]["kernel"][index], 2 if name == "o" else 1
            weight = kernel.reshape(-1, *kernel.shape[ins:])  # [in, ...]
            weights.append(weight.reshape(weight.shape[0], -1).T)  # [out, in]
            factors = adapters.get(part, {}).get(name) if decoder.adapter else None
            if factors is not None:
                rank = factors["a"].shape[-1]
                first.append(scale * factors["a"][index].reshape(-1, rank).T)  # [R, in]
                second.append(factors["b"][index].reshape(rank, -1).T)  # [out, R]
            else:
                second.append(jnp.zeros((weights[-1].shape[0], 0)))
        bias = None
        if "bias" in blocks[part][names[0]]:
            bias = jnp.concatenate([blocks[part][name]["bias"][index].ravel() for name in names])
        whole = jnp.concatenate(weights)
        if not first:
            return Dense(whole, None, bias)
        # Each projection reads the ranks of its own adapter: a block diagonal beside the weights.
        spread = jax.scipy.linalg.block_diag(*second)
        return Dense(jnp.concatenate([whole, spread], axis=1), jnp.concatenate(first), bias)

    layers = tuple(
        Layer(
            dense(index, "attention", ("q", "k", "v")),
            dense(index, "attention", ("o",)),
            dense(index, "mlp", ("gate", "up")),
            dense(index, "mlp", ("down",)),
            blocks["attention_norm"]["scale"][index][:, None],
            blocks["mlp_norm"]["scale"][index][:, None],
        )
        for index in range(decoder.spec.layers)
    )
    norm = params["norm"]["scale"][:, None]
    return Columns(layers, params["embed"], decoder.head(params), norm, decoder.spec)


def _attend(q: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array) -> jax.Array:
    """[N·H, B] for q [N, H, B], keys [B, K, H, S], values [B, K, S, H]."""
    rows, groups, width, _ = keys.shape
    q = q.reshape(groups, -1, width, rows).transpose(3, 0, 1, 2) * width**-0.5  # [B, K, G, H]
    scores = jnp.einsum("BKGH,BKHS->BKGS", q, keys) + bias
    mixed = jnp.einsum("BKGS,BKSH->BKGH", jax.nn.softmax(scores, axis=-1), values)
    return mixed.transpose(1, 2, 3, 0).reshape(-1, rows)


def _norm(x: jax.Array, scale: jax.Array, spec: ModelSpec) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + spec.norm_eps) * scale


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [heads, H, B], halves turned as in `jaxalign.model.layers.rotate`."""
    first, second = jnp.split(x, 2, axis=1)
    return x * cos + jnp.concatenate([-second, first], axis=1) * sin
