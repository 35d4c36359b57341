"""The compiled programs: a prompt in one pass, tokens in a loop, rows moved to a smaller batch.

    shared = share(model, first, count, decoder)                       # what all prompts begin with
    model = dataclasses.replace(model, shared=shared)
    batch = start(model, tokens, lengths, numbers, stops, seed, decoder, rule, new, slots)
    batch = advance(model, batch, stops, seed, few, decoder, rule)     # until few rows are open
    batch = regroup(batch, places, unused, slots, rule)                  # and a longer cache

A program's shape is that of the batch and its cache. All rows write their n-th new token to the
same cache slot, behind the longest prompt; each keeps its own rotary position, that of its text.
Behind a shared start, prompts, slots and lengths are those of the rows' own tokens. An adapter's
vectors are in the first slots of what comes first, and count as tokens there.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.generate.beam import Beams
from jaxalign.generate.decoding import Decoding
from jaxalign.generate.single import Single
from jaxalign.model.attention import Sight, causal
from jaxalign.model.decoder import Decoder
from jaxalign.model.layers import Cache
from jaxalign.sharding import constrain, platform

WRITERS: dict[str, type[Single] | type[Beams]] = {
    "greedy": Single,
    "sample": Single,
    "beam": Beams,
}
PATIENCE = 32  # a batch shrinks only where as many tokens may come: a program must pay for itself


@flax.struct.dataclass
class Shared:
    """The tokens that all prompts begin with."""

    cache: Cache  # of one row
    count: jax.Array  # in its first slots, a scalar


@flax.struct.dataclass
class Model:
    """What a call decodes with."""

    params: dict
    lora: dict | None
    shared: Shared | None = None

    def extend(
        self, decoder: Decoder, tokens: jax.Array, cache: Cache, **how: Any
    ) -> tuple[jax.Array, Cache]:
        """`Decoder.extend` behind what is shared, from where positions and places count."""
        if self.shared is not None:
            ahead = self.shared.count
            how |= {name: ahead + how[name] for name in ("positions", "places")}
            how |= {"shared": self.shared.cache, "ahead": ahead}
        return decoder.extend(self.params, self.lora, tokens, cache, **how)

    def vectors(self, decoder: Decoder) -> int:
        """How many vectors of the adapter are in front of each row; what is shared has its own."""
        return 0 if self.shared is not None else decoder.vectors(self.lora)

    def prompt(
        self, decoder: Decoder, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Hidden states [B, T, D] and the cache of prompts that are padded on the right."""
        rows, ahead = tokens.shape[0], self.vectors(decoder)
        width = ahead + tokens.shape[1]
        # XLA writes bfloat16 in place on GPU and TPU, but on a CPU by way of a float32 copy of the
        # whole array, for every token; there the cache is float32 and holds the same numbers.
        dtype = jnp.float32 if platform() == "cpu" else self.params["embed"].dtype
        place = jnp.arange(width)[None]
        # A row that only fills the batch is asked for a token, too.
        asked = jnp.arange(tokens.shape[1]) < jnp.maximum(lengths, 1)[:, None]
        hidden, cache = self.extend(
            decoder,
            tokens,
            decoder.empty_cache(rows, width, dtype),
            positions=place,
            places=place,
            slot=0,
            mask=causal(width),
            sight=Sight(windows=decoder.spec.kinds),  # no token looks at the padding
            asked=asked if ahead else None,
        )
        return hidden[:, ahead:], cache


@flax.struct.dataclass
class Batch:
    """A batch between two programs."""

    width: jax.Array  # the prompts' slots: the first new token goes here, a scalar
    lengths: jax.Array  # [B] int32: tokens of the prompts, and vectors in front of them
    state: Single | Beams
    cache: Cache  # rows B·W for W beams

    def choose(self, logits: jax.Array, stops: jax.Array, seed: jax.Array, rule: Decoding) -> Batch:
        state, sources = self.state.choose(logits, stops, seed, rule)
        cache = self.cache if sources is None else self.cache.take(sources)
        return dataclasses.replace(self, state=state, cache=cache)


@partial(jax.jit, static_argnums=3)
def share(model: Model, tokens: jax.Array, count: jax.Array, decoder: Decoder) -> Shared:
    """The first `count` of these tokens [1, P], with which all prompts begin."""
    _, cache = model.prompt(decoder, tokens, count[None])
    return Shared(cache, model.vectors(decoder) + count)


@partial(jax.jit, static_argnums=(6, 7, 8, 9))
def start(
    model: Model,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32; 0 for a row that only fills the batch
    numbers: jax.Array,  # [B] uint32
    stops: jax.Array,  # [any] int32
    seed: jax.Array,
    decoder: Decoder,
    rule: Decoding,
    new: int,
    slots: int,
) -> Batch:
    """The batch with its first token, and a cache of `slots`."""
    rows, width = tokens.shape
    hidden, prompt = model.prompt(decoder, tokens, lengths)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]  # [B, D]
    logits = decoder.logits(model.params, hidden)
    cache = prompt.grow(slots)
    state = WRITERS[rule.method].empty(numbers, lengths == 0, new, rule)
    if rule.rows > 1:
        copies = jnp.repeat(jnp.arange(rows), rule.rows)
        logits, cache = logits[copies], cache.take(copies)
    ahead = model.vectors(decoder)
    batch = Batch(jnp.int32(ahead + width), ahead + lengths, state, cache)
    return _readable(batch.choose(logits, stops, seed, rule))


@partial(jax.jit, static_argnums=(5, 6), donate_argnums=1)
def advance(
    model: Model,
    batch: Batch,
    stops: jax.Array,
    seed: jax.Array,
    few: jax.Array,
    decoder: Decoder,
    rule: Decoding,
) -> Batch:
    """The batch when no row is open, `few` are and many tokens may come, or the cache is full."""
    slots = jnp.arange(batch.cache.slots)
    lengths = jnp.repeat(batch.lengths, rule.rows)  # [B·W]
    prompt = slots < lengths[:, None]  # [B·W, S]
    places = jnp.where(slots < batch.width, slots, slots - batch.width + lengths[:, None])
    new = _longest(batch)
    # The last token is chosen but never read, so it needs no slot.
    limit = jnp.minimum(new, batch.cache.slots - batch.width + 1)

    def open_(batch: Batch) -> jax.Array:
        rows, step = (~batch.state.done).sum(), batch.state.step
        return (step < limit) & (rows > jnp.where(step + PATIENCE <= new, few, 0))

    def step(batch: Batch) -> Batch:
        latest = batch.state.step - 1  # the newest token's place among the new ones
        slot, positions = batch.width + latest, lengths + latest
        seen = prompt | ((slots >= batch.width) & (slots <= slot))
        tokens = batch.state.latest()
        hidden, cache = model.extend(
            decoder,
            tokens[:, None],
            batch.cache,
            positions=positions[:, None],
            places=places,
            slot=slot,
            mask=seen[:, None],
        )
        logits = decoder.logits(model.params, hidden[:, 0])
        return dataclasses.replace(batch, cache=cache).choose(logits, stops, seed, rule)

    return _readable(jax.lax.while_loop(open_, step, batch))


@partial(jax.jit, static_argnums=(3, 4))
def regroup(
    batch: Batch, places: jax.Array, unused: jax.Array, slots: int, rule: Decoding
) -> Batch:
    """The batch of the rows at `places` [b], with a cache of `slots`; `unused` ones are done."""
    state = batch.state.take(places)
    rows = (places[:, None] * rule.rows + jnp.arange(rule.rows)).reshape(-1)
    cache = batch.cache.take(rows).grow(slots)
    state = dataclasses.replace(state, done=state.done | unused)
    return _readable(Batch(batch.width, batch.lengths[places], state, cache))


def _longest(batch: Batch) -> int:
    """The bound on new tokens: the last axis of what is written."""
    return batch.state.answers()[0].shape[-1]


def _readable(batch: Batch) -> Batch:
    """The batch with a state that every process reads whole: letters that no mesh axis splits."""
    keep = lambda x: constrain(x, " ".join("-" * x.ndim)) if x.ndim else x  # noqa: E731
    state = jax.tree.map(keep, batch.state)
    return dataclasses.replace(batch, state=state, lengths=keep(batch.lengths))
