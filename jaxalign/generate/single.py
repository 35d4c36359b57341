"""One answer a row: the best token each time, or a draw.

A draw's key is made of (seed, number of the row, place of the token), so that a row draws the same
in every batch. `nucleus` narrows the choice as transformers does: temperature, top_k, top_p.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.generate.decoding import Decoding


@flax.struct.dataclass
class Single:
    """What a batch has written so far."""

    step: jax.Array  # tokens chosen, a scalar
    numbers: jax.Array  # [B] uint32: the rows' numbers
    written: jax.Array  # [B, max_new_tokens] int32; 0 where nothing is written
    counts: jax.Array  # [B] int32: tokens of the answer, without the stop token
    done: jax.Array  # [B] bool

    @classmethod
    def empty(cls, numbers: jax.Array, unused: jax.Array, new: int, rule: Decoding) -> Single:
        """Nothing written; `unused` [B] marks rows that only fill the batch."""
        rows = numbers.shape[0]
        written = jnp.zeros((rows, new), jnp.int32)
        return cls(jnp.int32(0), numbers, written, jnp.zeros(rows, jnp.int32), unused)

    def choose(
        self, logits: jax.Array, stops: jax.Array, seed: jax.Array, rule: Decoding
    ) -> tuple[Single, None]:
        """One more token for each open row, from logits [B, V]; None: no row moved."""
        if rule.method == "greedy":
            token = best(logits)
        else:
            token = draw(logits, self.numbers, self.step, seed, rule)
        done = self.done | (token[:, None] == stops).any(axis=1)
        state = dataclasses.replace(
            self,
            step=self.step + 1,
            written=self.written.at[:, self.step].set(jnp.where(done, 0, token)),
            counts=self.counts + ~done,
            done=done,
        )
        return state, None

    def latest(self) -> jax.Array:
        """[B]: the token of each row that the model has not read yet."""
        return jax.lax.dynamic_index_in_dim(self.written, self.step - 1, 1, keepdims=False)

    def take(self, rows: jax.Array) -> Single:
        """These rows alone."""
        return Single(
            self.step,
            *(x[rows] for x in (self.numbers, self.written, self.counts, self.done)),
        )

    def answers(self) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, max_new_tokens] and how many of them are the answer [B]."""
        return self.written, self.counts


def best(logits: jax.Array) -> jax.Array:
    """argmax [B] int32 over logits [B, V]; of equal ones the first."""
    # A maximum and a minimum run over whole vectors on a CPU; argmax goes number by number.
    place = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    top = logits == logits.max(axis=-1, keepdims=True)
    return jnp.where(top, place, logits.shape[-1] - 1).min(axis=-1)


def draw(
    logits: jax.Array, numbers: jax.Array, step: jax.Array, seed: jax.Array, rule: Decoding
) -> jax.Array:
    """A token [B] for each row of logits [B, V]."""
    key = jax.random.key(seed)

    def one(number: jax.Array, row: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, number), step)
        return jax.random.categorical(own, row).astype(jnp.int32)

    return jax.vmap(one)(numbers, nucleus(logits, rule))


def nucleus(logits: jax.Array, rule: Decoding) -> jax.Array:
    """Logits [B, V] at the rule's temperature, -inf where a token is not to be drawn.

    top_p keeps the fewest of the best tokens whose probabilities reach it (Holtzman et al. 2020,
    eq. 2); tokens that tie with the last one kept stay, too.
    """
    logits = logits.astype(jnp.float32) / rule.temperature
    if rule.top_k:
        logits = _keep(logits, jnp.ones_like(logits), rule.top_k)
    if rule.top_p < 1:
        logits = _keep(logits, jax.nn.softmax(logits, axis=-1), rule.top_p)
    return logits


def _keep(logits: jax.Array, mass: jax.Array, limit: float) -> jax.Array:
    """`logits` where the mass of all larger ones is below `limit`, elsewhere -inf.

    The threshold is found by halving the range of float32's bit patterns, 32 sums over the
    vocabulary: exact, and far cheaper than sorting it.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # sorts like the floats

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # high keeps few enough, low (where it is not the start) does not
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # without overflow
        above = jnp.where(order > middle, mass, 0).sum(axis=-1, keepdims=True)
        few = above < limit
        return jnp.where(few, low, middle), jnp.where(few, middle, high)

    column = jnp.zeros((*logits.shape[:-1], 1), jnp.int32)
    low, high = column + jnp.iinfo(jnp.int32).min, order.max(axis=-1, keepdims=True)
    _, threshold = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= threshold, logits, -jnp.inf)
