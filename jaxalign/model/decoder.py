"""The one decoder: a stack of equal blocks over frozen weights, run by a scan.

    decoder = Decoder(spec, adapter=Lora())
    params, lora = decoder.init(key), lora_init(adapter, spec, key)
    out = decoder.forward(params, lora, tokens, pool=weights, taps=(8, 16), stop=16)
    out.pooled[16]                                   # [P, B, D]: the output of block 16, pooled
    logits = decoder.logits(params, decoder.forward(params, lora, tokens).hidden)

A pass may stop early: `stop=k` runs k blocks, so an alignment pass costs k/L of a forward and never
touches the upper blocks, the final norm or the head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.adapters.lora import Lora
from jaxalign.model.attention import causal
from jaxalign.model.layers import Block, Cache, Context, pool, rms_norm, rotary
from jaxalign.model.spec import ModelSpec, check_tap
from jaxalign.sharding import Array, constrain

REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class Output:
    """What a forward pass exposes."""

    hidden: jax.Array | None  # [B, T, D] after the final norm; None where the pass stopped early
    pooled: dict[int, jax.Array]  # tapped layer -> [P, B, D] float32, or [B, T, D] states


@dataclass(frozen=True)
class Decoder:
    """A family's facts plus how to run it. Holds no weights.

    Attributes:
      spec: the model's shape.
      adapter: the LoRA beside it, or None.
      remat: what the backward pass recomputes: none, dots (keeps matrix products), full.
      attention: backend of `jaxalign.model.attention`.
      train_base: whether gradients flow into `params`. A frozen stack is scanned by layer index,
        so that a pass over k of L blocks never copies the weights it slices; a trained one is
        scanned as stacked inputs, so that its gradient accumulates once.
    """

    spec: ModelSpec
    adapter: Lora | None = None
    remat: str = "none"
    attention: str = "auto"
    train_base: bool = False

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict:
        """Random weights, N(0, 0.02): for tests, benchmarks and pre-training."""
        spec = self.spec
        x = jnp.zeros((1, 2, spec.dim), dtype)
        context = self._context(jnp.arange(2)[None], causal(2), None)
        block = Block(spec, None, "reference")
        keys = jax.random.split(key, spec.layers + 2)
        params = {
            "embed": 0.02 * jax.random.normal(keys[0], (spec.vocab, spec.dim)),
            "blocks": jax.vmap(lambda k: block.init(k, x, context)["params"])(keys[2:]),
            "norm": {"scale": jnp.ones(spec.dim)},
        }
        if not spec.tied:
            params["head"] = 0.02 * jax.random.normal(keys[1], (spec.vocab, spec.dim))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def forward(
        self,
        params: dict,
        lora: dict | None,
        tokens: Array,  # [B, T] int
        *,
        segments: Array | None = None,  # [B, T] int, 0 for padding; None: right padding only
        positions: Array | None = None,  # [B, T] int; None: 0 .. T-1
        stop: int | None = None,
        taps: tuple[int, ...] = (),
        pool_weights: jax.Array | None = None,  # [P, B, T] float32
        sows: str = "pooled",
        dropout: jax.Array | None = None,
    ) -> Output:
        """Runs `stop` blocks (all where None) and exposes the tapped layers.

        A tap k is the output of block k, before any final norm; 0 is the embeddings.

        Args:
          sows: `pooled` for pooled vectors, `states` for whole states (parity tests only: they
            hold every layer's [B, T, D]).
          dropout: key for the adapter's dropout; None turns it off.

        Raises:
          UserError: a tap or stop past the model.
        """
        spec, last = self.spec, self.spec.layers if stop is None else stop
        for tap in (*taps, last):
            check_tap(spec, tap)
        if any(tap > last for tap in taps):
            raise ValueError(f"taps {taps} lie above stop={last}")
        place = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        weights = pool_weights if taps else None
        context = self._context(place, causal(tokens.shape[1], segments), weights)
        x = constrain(params["embed"][tokens], "B T D")
        pooled = {0: _expose(x, context, sows)} if 0 in taps else {}
        block = Block(spec, self.adapter, self.attention, sows if taps else "pooled")

        def body(x: jax.Array, layer: Any) -> Any:
            index, weights, adapter = layer
            if weights is None:
                weights = jax.tree.map(lambda w: _layer(w, index), params["blocks"])
            variables = {"params": weights, "lora": adapter or {}}
            keys = None if dropout is None else {"dropout": jax.random.fold_in(dropout, index)}
            (x, _), sown = block.apply(variables, x, context, rngs=keys, mutable=["intermediates"])
            return x, sown.get("intermediates", {}).get(sows)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        layers = (
            jnp.arange(last),
            jax.tree.map(lambda w: w[:last], params["blocks"]) if self.train_base else None,
            jax.tree.map(lambda w: w[:last], lora["blocks"]) if lora else None,
        )
        x, sown = jax.lax.scan(body, x, layers)
        pooled |= {tap: sown[tap - 1] for tap in taps if tap > 0}
        return Output(self.final_norm(params, x) if stop is None else None, pooled)

    def final_norm(self, params: dict, x: jax.Array) -> jax.Array:
        """The norm between the last block and the head."""
        return rms_norm(x, params["norm"]["scale"], self.spec.norm_eps)

    def head(self, params: dict) -> jax.Array:
        """[V, D]: the output embedding, tied or not."""
        return params["embed"] if self.spec.tied else params["head"]

    def logits(self, params: dict, hidden: jax.Array) -> jax.Array:
        """[..., V] float32 for hidden states [..., D] after the final norm."""
        head = self.head(params)
        return jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)

    def empty_cache(self, batch: int, slots: int, dtype: Any) -> Cache:
        """A cache for `slots` tokens of each of `batch` rows."""
        spec = self.spec
        shape = (spec.layers, batch, spec.kv_heads, slots, spec.head_dim)
        zeros = constrain(jnp.zeros(shape, dtype), "L B K S H")
        return Cache(zeros, zeros)

    def extend(
        self,
        params: dict,
        lora: dict | None,
        tokens: jax.Array,  # [B, T] int
        cache: Cache,
        *,
        slot: jax.Array | int,  # where the T new tokens go in the cache
        positions: jax.Array,  # [B, T] int: their rotary positions
        mask: jax.Array,  # [B or 1, T, S] bool: which of the first S slots each of them sees
    ) -> tuple[jax.Array, Cache]:
        """Hidden states after the final norm, [B, T, D], and the cache with the new tokens."""
        context = self._context(positions, mask, None, slot)
        block = Block(self.spec, self.adapter, "reference")

        def body(carry: Any, layer: Any) -> Any:
            x, cache = carry
            index, adapter = layer
            weights = jax.tree.map(lambda w: _layer(w, index), params["blocks"])
            variables = {"params": weights, "lora": adapter or {}}
            own = dataclasses.replace(context, layer=index)
            return block.apply(variables, x, own, cache), None

        x = constrain(params["embed"][tokens], "B T D")
        layers = (jnp.arange(self.spec.layers), lora["blocks"] if lora else None)
        (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
        return self.final_norm(params, x), cache

    def _context(
        self, positions: Array, mask: jax.Array, pool_weights: Any, slot: Any = None
    ) -> Context:
        cos, sin = rotary(self.spec, positions)
        return Context(cos, sin, mask, pool_weights, slot)


def _layer(stack: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _expose(x: jax.Array, context: Context, sows: str) -> jax.Array:
    if sows == "states":
        return x
    assert context.pool is not None  # a tap of pooled vectors comes with weights
    return pool(x, context.pool)
