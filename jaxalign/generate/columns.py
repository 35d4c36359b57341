"""One token a row on a CPU: weights laid out for it once, activations as columns.

XLA's CPU product of a weight [out, in] and a few dozen columns [in, B] runs about twice as fast as
that of rows and [in, out], and weights cut out of their stack once need no copy for every token.
Accelerators do neither: they read the stack in place, and have no memory for a second copy.

    columns = lay_out(decoder, params, lora)                      # once for all prompts
    cache = ColumnCache.start(prompt_cache, slots=128)
    logits, cache = columns.extend(tokens, cache, slot=64, positions=lengths, seen=mask, places=at)
"""

from __future__ import annotations

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.adapters.lora import merge
from jaxalign.model.attention import near, soft_cap
from jaxalign.model.decoder import Decoder
from jaxalign.model.layers import ACTIVATIONS, Cache
from jaxalign.model.quantised import is_quantised
from jaxalign.model.rotary import rotary
from jaxalign.model.spec import ModelSpec

Norms = dict[str, jax.Array]  # a norm's name -> its scale with its offset: [D, 1], [N, H, 1], ...


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
    norms: Norms  # those that the family has


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
    norms: Norms  # the last one alone
    spec: ModelSpec = flax.struct.field(pytree_node=False)

    def extend(
        self,
        tokens: jax.Array,  # [B] int32
        cache: ColumnCache,
        slot: jax.Array,  # where the token goes in the cache
        positions: jax.Array,  # [B] int32
        seen: jax.Array,  # [B, S] bool: the slots that each row looks at
        places: jax.Array,  # [B, S] int32: positions of the tokens in the slots
    ) -> tuple[jax.Array, ColumnCache]:
        """Logits [B, V] behind the tokens, and the cache with them."""
        spec, act = self.spec, ACTIVATIONS[self.spec.activation]
        angles, biases = {}, {}
        for window in spec.kinds:
            angles[window] = [x[:, 0].T for x in rotary(spec, positions[:, None], window)]  # [H, B]
            own = seen & near(positions[:, None], places, window)[:, 0] if window else seen
            bias = jnp.where(own, 0.0, jnp.finfo(jnp.float32).min)
            biases[window] = bias[:, None, None]  # [B, 1, 1, S]
        x = self.embed[tokens].T  # [D, B]
        if spec.embed_scale != 1:
            x = x * spec.embed_scale
        windows = spec.windows or (0,) * spec.layers
        written: list[tuple[jax.Array, jax.Array]] = []
        for layer, keys, values, window in zip(
            self.layers, cache.keys, cache.values, windows, strict=True
        ):
            norm = partial(_norm, layer.norms, spec)
            heads = layer.qkv(norm("attention_norm", x))
            heads = heads.reshape(-1, spec.head_dim, x.shape[1])  # [N + 2K, H, B]
            q, k, v = jnp.split(heads, [spec.heads, spec.heads + spec.kv_heads])
            q, k = (norm(f"{name}_{spec.qk_norm}_norm", y) for name, y in (("q", q), ("k", k)))
            q, k = _rotate(q, *angles[window]), _rotate(k, *angles[window])
            put = jax.lax.dynamic_update_slice
            keys = put(keys, k.transpose(2, 0, 1)[..., None], (0, 0, 0, slot))
            values = put(values, v.transpose(2, 0, 1)[:, :, None], (0, 0, slot, 0))
            mixed = layer.o(_attend(q, keys, values, biases[window], spec))
            x = x + norm("attention_post_norm", mixed)
            gate, up = jnp.split(layer.gate_up(norm("mlp_norm", x)), 2)
            x = x + norm("mlp_post_norm", layer.down(act(gate) * up))
            written.append((keys, values))
        # Without the barrier XLA would turn the product round, to write rows.
        logits = self.head @ _norm(self.norms, spec, "norm", x)  # [V, B]
        logits = soft_cap(jax.lax.optimization_barrier(logits), spec.logit_soft_cap)
        return logits.T, ColumnCache(*zip(*written, strict=True))


def suits(params: dict) -> bool:
    """Whether this process should decode with columns: float32 weights on one CPU device."""
    one = jax.sharding.get_abstract_mesh().size <= 1 and jax.process_count() == 1
    wide = params["embed"].dtype == jnp.float32 and not is_quantised(params)
    return jax.default_backend() == "cpu" and one and wide


@partial(jax.jit, static_argnums=0)
def lay_out(decoder: Decoder, params: dict, lora: dict | None) -> Columns:
    """The decoder's weights as columns want them; blocks are copied."""
    adapter = decoder.adapter
    if adapter and lora and adapter.dora:
        # Blocks are copied anyway, and merged ones need no gains.
        params, lora, adapter = merge(params, lora, adapter), None, None
    blocks, adapters = params["blocks"], lora["blocks"] if lora else {}

    def dense(index: int, part: str, names: tuple[str, ...]) -> Dense:
        weights, first, second = [], [], []
        for name in names:
            kernel, ins = blocks[part][name]["kernel"][index], 2 if name == "o" else 1
            weight = kernel.reshape(-1, *kernel.shape[ins:])  # [in, ...]
            weights.append(weight.reshape(weight.shape[0], -1).T)  # [out, in]
            factors = adapters.get(part, {}).get(name)
            if adapter and factors is not None:
                rank, scale = factors["a"].shape[-1], adapter.scale_of(name, index + 1)
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

    def norms(index: int) -> Norms:
        scales = blocks | blocks["attention"]
        return {
            name: scales[name]["scale"][index][..., None] + decoder.spec.norm_offset
            for name in scales
            if name.endswith("_norm")
        }

    layers = tuple(
        Layer(
            dense(index, "attention", ("q", "k", "v")),
            dense(index, "attention", ("o",)),
            dense(index, "mlp", ("gate", "up")),
            dense(index, "mlp", ("down",)),
            norms(index),
        )
        for index in range(decoder.spec.layers)
    )
    last = {"norm": params["norm"]["scale"][:, None] + decoder.spec.norm_offset}
    return Columns(layers, params["embed"], decoder.head(params), last, decoder.spec)


def _attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array, spec: ModelSpec
) -> jax.Array:
    """[N·H, B] for q [N, H, B], keys [B, K, H, S], values [B, K, S, H]."""
    rows, groups, width, _ = keys.shape
    q = q.reshape(groups, -1, width, rows).transpose(3, 0, 1, 2) * spec.score_scale  # [B, K, G, H]
    scores = soft_cap(jnp.einsum("BKGH,BKHS->BKGS", q, keys), spec.attn_soft_cap) + bias
    mixed = jnp.einsum("BKGS,BKSH->BKGH", jax.nn.softmax(scores, axis=-1), values)
    return mixed.transpose(1, 2, 3, 0).reshape(-1, rows)


def _norm(norms: Norms, spec: ModelSpec, name: str, x: jax.Array) -> jax.Array:
    """x [..., B] normed over as many axes as this norm's scale has; x where there is no norm."""
    if name not in norms:
        return x
    scale = norms[name]
    axes = tuple(range(-scale.ndim, -1))
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + spec.norm_eps) * scale


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [heads, H, B], halves turned as in `jaxalign.model.rotary.rotate`."""
    first, second = jnp.split(x, 2, axis=1)
    return x * cos + jnp.concatenate([-second, first], axis=1) * sin
