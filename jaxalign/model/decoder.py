"""The one decoder: a stack of equal blocks over frozen weights, run by a scan.

    decoder = Decoder(spec, adapter)
    params, lora = decoder.init(key), adapter.init(spec, key)
    out = decoder.forward(params, lora, tokens, pool=weights, taps=(8, 16), stop=16)
    out.pooled[16]                                   # [P, B, D]: the output of block 16, pooled
    logits = decoder.logits(params, decoder.forward(params, lora, tokens).hidden)

A pass may stop early: `stop=k` runs k blocks, so an alignment pass costs k/L of a forward and never
touches the upper blocks, the final norm or the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.frozen.projection import Attached
from jaxalign.model import cudnn, splash
from jaxalign.model.attention import MIXED, Sight, causal, chunks, cut_of, local, near, soft_cap
from jaxalign.model.front import Entered, Stem
from jaxalign.model.layers import Block, Cache, Context, Front, pool, rms_norm
from jaxalign.model.rotary import rotary
from jaxalign.model.spec import ModelSpec, check_tap
from jaxalign.sharding import Array, constrain

# What a backward pass needs of a block and what is dear to compute again (`layers.py` names them).
SMALL = ("queries", "keys", "values", MIXED, "residual", splash.SAVED)
WIDE = ("gate", "up")  # [B, T, F]: most of the memory


def with_kernels(policy: Callable[..., Any]) -> Callable[..., Any]:
    """`policy`, and what attention kernels without names give: else they run again."""

    def keeps(primitive: Any, *given: Any, **facts: Any) -> Any:
        return cudnn.keeps(primitive) or policy(primitive, *given, **facts)

    return keeps


REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": with_kernels(jax.checkpoint_policies.save_only_these_names(*SMALL, *WIDE)),
    "offload": with_kernels(
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=SMALL,
            names_which_can_be_offloaded=WIDE,
            offload_src="device",
            offload_dst="pinned_host",
        )
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
EVERYTHING = 1 << 30  # a window that no text fills


@flax.struct.dataclass
class Output:
    """What a forward pass exposes."""

    hidden: jax.Array | None  # [B, T, D] after the final norm; None where the pass stopped early
    pooled: dict[int, jax.Array]  # tapped layer -> [P, B, (R,) D] float32, or [B, T, D] states
    whole: dict[int, jax.Array] = flax.struct.field(default_factory=dict)  # layer -> [B, T, D]


@dataclass(frozen=True)
class Decoder:
    """A family's facts plus how to run it. Holds no weights.

    Attributes:
      spec: the model's shape.
      adapter: what changes its projections, or None.
      remat: what the backward pass recomputes: none; dots (keeps matrix products); names (keeps
        what `SMALL` and `WIDE` name); offload (the same, the wide ones in the host's memory); full.
      attention: backend of `jaxalign.model.attention`.
      train_base: whether gradients flow into `params`. A frozen stack is scanned by layer index,
        so that a pass over k of L blocks never copies the weights it slices; a trained one is
        scanned as stacked inputs, so that its gradient accumulates once.
    """

    spec: ModelSpec
    adapter: Attached | None = None
    remat: str = "none"
    attention: str = "auto"
    train_base: bool = False

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict:
        """Random weights, N(0, 0.02): for tests, benchmarks and pre-training."""
        spec = self.spec
        x = jnp.zeros((1, 2, spec.dim), dtype)
        place = jnp.arange(2)[None]
        context = self._own(self._context(place, causal(2), (place, place)), 0)
        block = Block(spec, None, "reference")
        keys = jax.random.split(key, spec.layers + 2)
        params = {
            "embed": 0.02 * jax.random.normal(keys[0], (spec.vocab, spec.dim)),
            "blocks": jax.vmap(lambda k: block.init(k, x, context)["params"])(keys[2:]),
            "norm": {"scale": jnp.full(spec.dim, 1.0 - spec.norm_offset)},
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
        pool_weights: jax.Array | None = None,  # [P, B, T] or [P, B, R, T] float32
        whole: tuple[int, ...] = (),
        sows: str = "pooled",
        dropout: jax.Array | None = None,
        reach: int = 0,
        stem: Stem | None = None,
        asked: Array | None = None,  # [B, T] bool; None: all
    ) -> Output:
        """Runs `stop` blocks (all where None) and exposes the tapped layers.

        A tap k is the output of block k, before any final norm; 0 is the embeddings.

        Args:
          whole: layers whose states [B, T, D] are wanted as they are.
          sows: `pooled` for pooled vectors, `neurons` for the activations of the feed-forward
            gates pooled likewise ([P, B, F]; no tap 0), `states` for whole states (parity tests
            only: they hold every layer's [B, T, D]).
          dropout: key for the adapter's dropout; None turns it off.
          reach: of segments end to end: no text has more tokens, which spares it the scores of
            all others; 0: unknown.
          stem: the first tokens of each sequence are the start of the texts behind them; needs
            segments and positions, which go on from the start's.
          asked: the tokens that an adapter's vectors may depend on: what is known before an answer.

        Positions go on from what an adapter puts in front; what comes out is of the tokens alone.

        Raises:
          UserError: a tap or stop past the model.
        """
        spec, last = self.spec, self.spec.layers if stop is None else stop
        for tap in (*taps, *whole, last):
            check_tap(spec, tap)
        if any(tap > last for tap in (*taps, *whole)):
            raise ValueError(f"taps {taps} are above stop={last}")
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        entered = Entered(
            self.embed(params, tokens), positions, segments, stem, pool_weights if taps else None
        )
        if vectors := self.vectors(lora):
            entered = entered.behind(self._vectors(lora, entered.x, asked))
        x, positions, stem = entered.x, entered.positions, entered.stem
        front = None if stem is None else stem.front(jnp.asarray(positions))
        context = self._context(
            positions,
            *_texts(x.shape[1], entered.segments, reach, self.spec.kinds, front),
            entered.weights,
            front=front,
            prefix=self._prefix(lora),
        )
        pooled = {0: _expose(x, context, sows)} if 0 in taps else {}
        block = Block(spec, self.adapter, self.attention, sows if taps else "pooled")

        def body(x: jax.Array, layer: Any) -> Any:
            index, weights, own = layer
            if weights is None:
                weights = jax.tree.map(lambda w: _layer(w, index), params["blocks"])
            keys = None if dropout is None else {"dropout": jax.random.fold_in(dropout, index)}
            run = partial(block.apply, {"params": weights}, rngs=keys, mutable=["intermediates"])
            (x, _), sown = run(x, self._own(context, index), None, own)
            sown = sown.get("intermediates", {})
            return x, (sown.get("mlp", {}) if sows == "neurons" else sown).get(sows)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        layers = (
            jnp.arange(last),
            jax.tree.map(lambda w: w[:last], params["blocks"]) if self.train_base else None,
            self._per_block(params, lora, last),
        )
        # One scan, or one up to each layer whose states are wanted whole.
        states, first = {0: x} if 0 in whole else {}, 0
        for end in sorted({*whole, last} - {0}):
            part = layers if end - first == last else jax.tree.map(lambda w: w[first:end], layers)  # noqa: B023
            x, sown = jax.lax.scan(body, x, part)
            pooled |= {tap: sown[tap - 1 - first] for tap in taps if first < tap <= end}
            states |= {end: x} if end in whole else {}
            first = end
        hidden = self.final_norm(params, x) if stop is None else None
        if vectors:
            hidden = None if hidden is None else hidden[:, vectors:]
            states = {layer: found[:, vectors:] for layer, found in states.items()}
            if sows == "states":
                pooled = {tap: found[:, vectors:] for tap, found in pooled.items()}
        return Output(hidden, pooled, states)

    def embed(self, params: dict, tokens: Array) -> jax.Array:
        """[B, T, D]: what enters the first block."""
        x = params["embed"][tokens]
        if self.spec.embed_scale != 1:
            # Rounded to the weights' dtype first, as in transformers.
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        return constrain(x, "B T D")

    def vectors(self, lora: dict | None) -> int:
        """How many vectors the adapter puts in front of a text."""
        return self.adapter.prompt_length if self.adapter and lora else 0

    def _vectors(self, lora: dict | None, x: jax.Array, asked: Array | None) -> jax.Array:
        """These vectors, [B or 1, P, D], in front of embeddings [B, T, D]."""
        assert self.adapter is not None and lora  # or there would be none
        asked = jnp.ones(x.shape[:2], bool) if asked is None else jnp.asarray(asked) != 0
        return self.adapter.prompt(lora, x, asked)

    def _prefix(self, lora: dict | None) -> int:
        """How many positions the adapter's keys and values take in front of a text."""
        return self.adapter.prefix_length if self.adapter and lora else 0

    def final_norm(self, params: dict, x: jax.Array) -> jax.Array:
        """The norm between the last block and the head."""
        return rms_norm(x, params["norm"]["scale"], self.spec)

    def head(self, params: dict) -> jax.Array:
        """[V, D]: the output embedding, tied or not."""
        return params["embed"] if self.spec.tied else params["head"]

    def logits(self, params: dict, hidden: jax.Array) -> jax.Array:
        """[..., V] float32 for hidden states [..., D] after the final norm."""
        head = self.head(params)
        logits = jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.spec.logit_soft_cap)

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
        places: jax.Array | None = None,  # [B or 1, S] int: positions of the tokens in these slots
        sight: Sight | None = None,
        shared: Cache | None = None,  # of one row: P slots before those of `cache`, for all rows
        ahead: jax.Array | int | None = None,  # tokens in its first slots; None: P
        asked: jax.Array | None = None,  # [B, T] bool; see below
    ) -> tuple[jax.Array, Cache]:
        """Hidden states after the final norm, [B, T, D], and the cache with the new tokens.

        Layers with a window see fewer slots than `mask` says; they need `places`. With `sight` the
        tokens are whole causal rows of an empty cache, which kernels may run. Positions go on from
        those of the tokens in `shared`, 0 .. ahead-1.

        With `asked` texts begin here, and an adapter's vectors come in front of them: T of
        positions, mask and result counts these, too. They may depend on the tokens it marks.
        """
        x = self.embed(params, tokens)
        if asked is not None and self.vectors(lora):
            vectors = self._vectors(lora, x, asked)
            x = Entered(x, jnp.zeros_like(tokens), None, None, None).behind(vectors).x
        between, front = None if places is None else (positions, places), None
        if shared is not None:
            before = jnp.arange(shared.slots)[None]
            filled = before[:, None] < (shared.slots if ahead is None else ahead)
            seen = jnp.broadcast_to(filled, (1, x.shape[1], shared.slots))
            front = Front(seen, (positions, before), cache=shared)
        prefix = self._prefix(lora)
        context = self._context(
            positions, mask, between, sight, slot=slot, front=front, prefix=prefix
        )
        # A kernel that was asked for by name takes the prompts that it can, as `auto` does.
        backend = "reference" if self.attention == "reference" else "auto"
        block = Block(self.spec, self.adapter, backend)

        def body(carry: Any, layer: Any) -> Any:
            x, cache = carry
            index, own = layer
            weights = jax.tree.map(lambda w: _layer(w, index), params["blocks"])
            here = dataclasses.replace(self._own(context, index), layer=index)
            return block.apply({"params": weights}, x, here, cache, own), None

        layers = (jnp.arange(self.spec.layers), self._per_block(params, lora))
        (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
        return self.final_norm(params, x), cache

    def _per_block(self, params: dict, lora: dict | None, blocks: int | None = None) -> Any:
        if self.adapter is None or not lora:
            return None
        return self.adapter.per_block(params, lora, blocks)

    def _context(
        self,
        positions: Array,
        mask: jax.Array,
        places: Any = None,
        sight: Sight | None = None,
        pool_weights: Any = None,
        slot: Any = None,
        front: Front | None = None,
        prefix: int = 0,
    ) -> Context:
        """What the layers share; cos and sin are stacked where windows differ in theta.

        Behind a prefix of P keys and values positions are P larger, and so are its tokens' own.
        """
        behind = None
        if prefix:
            positions = prefix + jnp.asarray(positions)
            behind = positions, jnp.arange(prefix)[None]
        kinds = self.spec.kinds if self.spec.local_rope_theta else self.spec.kinds[:1]
        tables = [rotary(self.spec, positions, window) for window in kinds]
        cos, sin = tables[0] if len(kinds) == 1 else map(jnp.stack, zip(*tables, strict=True))
        return Context(cos, sin, mask, pool_weights, slot, places=places, sight=sight, front=front,
                       prefix=behind)  # fmt: skip

    def _own(self, context: Context, layer: jax.Array | int) -> Context:
        """The part of this layer, from 0: what it sees and how it rotates; one scan runs all."""
        spec, front = self.spec, context.front
        slots = context.mask.shape[-1] + (0 if front is None else front.tokens)
        slots += 0 if context.prefix is None else context.prefix[1].shape[-1]
        limits = [window if 0 < window < slots else EVERYTHING for window in spec.kinds]
        turns, narrows = context.cos.ndim > 3, min(limits) < EVERYTHING
        if not turns and not narrows:
            return context
        kind: Any = 0
        if len(spec.kinds) > 1:
            kind = jnp.array([spec.kinds.index(window) for window in spec.windows])[layer]
            if context.sight is not None:
                context = dataclasses.replace(
                    context, sight=dataclasses.replace(context.sight, kind=kind)
                )
        if turns:
            context = dataclasses.replace(context, cos=context.cos[kind], sin=context.sin[kind])
        if narrows:
            if context.places is None:
                raise ValueError("layers with a window need the places of the keys")
            limit = jnp.array(limits)[kind]
            seen = near(*context.places, limit)
            context = dataclasses.replace(context, mask=context.mask & seen)
            if front is not None:
                context = dataclasses.replace(context, front=front.near(limit))
            if context.prefix is not None:
                context = dataclasses.replace(context, prefix_seen=near(*context.prefix, limit))
        return context


def _texts(
    length: int,
    segments: Array | None,
    reach: int,
    kinds: tuple[int, ...],
    front: Front | None,
) -> tuple[jax.Array, tuple[Array, Array], Sight | None]:
    """Mask, places and sight of the texts of sequences; of a front's tokens they see nothing."""
    place = jnp.arange(length)[None]  # in one segment as far apart as positions
    way = None if segments is None else cut_of(length, reach)
    if segments is None or way is None:
        mask = causal(length, segments)
        if front is not None and segments is not None:
            mask &= segments[:, :, None] > 0
        return mask, (place, place), Sight(segments, kinds)
    # A kernel visits blocks of hundreds of keys: it gains where texts are as long.
    windows = tuple(min(window, reach) if window else reach for window in kinds)
    sight = Sight(segments, windows) if reach >= splash.LEAST else None
    chunk, back = way
    mask = local(segments, chunk, back)
    if front is not None:
        mask &= chunks(segments, chunk)[0][..., None] > 0
    return mask, chunks(place, chunk, back), sight


def _layer(stack: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _expose(x: jax.Array, context: Context, sows: str) -> jax.Array:
    if sows == "states":
        return x
    assert context.pool is not None  # a tap of pooled vectors comes with weights
    return pool(x, context.pool)
