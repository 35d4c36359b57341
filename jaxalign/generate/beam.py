"""Beam search with the scores and the end of transformers' (early_stopping=False).

Of each prompt `beams` unfinished hypotheses run on, and the `beams` best finished ones are kept. A
prompt is done when no running hypothesis, scored at its present length, beats the worst kept one.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.generate.decoding import Decoding

NEVER = -1e9  # a log-probability below all others; transformers' number, as sums hold it


@flax.struct.dataclass
class Beams:
    """The hypotheses of a batch; W of each prompt."""

    step: jax.Array  # tokens chosen, a scalar
    running: jax.Array  # [B, W, max_new_tokens] int32
    scores: jax.Array  # [B, W] float32: sum of log-probabilities, best first
    kept: jax.Array  # [B, W, max_new_tokens] int32: finished
    kept_counts: jax.Array  # [B, W] int32: tokens without the stop token
    kept_scores: jax.Array  # [B, W] float32: with the length penalty, best first
    kept_real: jax.Array  # [B, W] bool: a finished hypothesis stands here
    done: jax.Array  # [B] bool

    @classmethod
    def empty(cls, numbers: jax.Array, unused: jax.Array, new: int, rule: Decoding) -> Beams:
        """Nothing written; `unused` [B] marks prompts that only fill the batch."""
        shape = (numbers.shape[0], rule.beams)
        tokens, counts = jnp.zeros((*shape, new), jnp.int32), jnp.zeros(shape, jnp.int32)
        # All start alike: only the first may choose, or the beams would stay copies.
        scores = jnp.full(shape, NEVER).at[:, 0].set(0.0)
        real = jnp.zeros(shape, bool)
        return cls(
            jnp.int32(0), tokens, scores, tokens, counts, jnp.full(shape, NEVER), real, unused
        )

    def choose(
        self, logits: jax.Array, stops: jax.Array, seed: jax.Array, rule: Decoding
    ) -> tuple[Beams, jax.Array]:
        """One more token for every hypothesis, from logits [B·W, V].

        Returns:
            The new state, and for each of its B·W rows the row whose text it continues.
        """
        prompts, beams, new = self.running.shape
        vocab = logits.shape[-1]
        chances = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        chances = chances.reshape(prompts, beams, vocab) + self.scores[:, :, None]
        # Even if all stop tokens of all beams are among the best, W others are.
        many = min(max(2, 1 + stops.shape[0]) * beams, beams * vocab)
        scores, places = jax.lax.top_k(chances.reshape(prompts, -1), many)  # [B, C]
        origin, token = places // vocab, (places % vocab).astype(jnp.int32)
        texts = _rows(self.running, origin).at[:, :, self.step].set(token)  # [B, C, new]
        stopped = (token[:, :, None] == stops).any(axis=2)
        ended = stopped | (self.step + 1 == new)

        # The best W that go on.
        going, next_ = jax.lax.top_k(scores + ended * NEVER, beams)

        # The best W of those kept and those that end now; an end counts among the first W only.
        fresh = ended & (jnp.arange(many) < beams)
        length = (self.step + 1).astype(jnp.float32)
        ends = scores / length**rule.length_penalty + (~fresh) * NEVER + self.done[:, None] * NEVER
        kept_scores, chosen = jax.lax.top_k(
            jnp.concatenate([self.kept_scores, ends], axis=1), beams
        )
        join = lambda old, new: _rows(jnp.concatenate([old, new], axis=1), chosen)  # noqa: E731
        real = join(self.kept_real, fresh)

        worst = jnp.where(real, kept_scores[:, -1:], NEVER).min(axis=1)
        hopeless = going[:, 0] / length**rule.length_penalty <= worst
        state = Beams(
            step=self.step + 1,
            running=_rows(texts, next_),
            scores=going,
            kept=join(self.kept, texts),
            kept_counts=join(self.kept_counts, self.step + ~stopped),
            kept_scores=kept_scores,
            kept_real=real,
            done=self.done | hopeless,
        )
        sources = jnp.arange(prompts)[:, None] * beams + _rows(origin, next_)
        return state, sources.reshape(-1)

    def latest(self) -> jax.Array:
        """[B·W]: the token of each row that the model has not read yet."""
        tokens = jax.lax.dynamic_index_in_dim(self.running, self.step - 1, 2, keepdims=False)
        return tokens.reshape(-1)

    def take(self, rows: jax.Array) -> Beams:
        """These prompts alone."""
        return jax.tree.map(lambda x: x[rows] if x.ndim else x, self)

    def answers(self) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, max_new_tokens] of the best and how many of them are the answer [B]."""
        return self.kept[:, 0], self.kept_counts[:, 0]


def _rows(x: jax.Array, places: jax.Array) -> jax.Array:
    """x [B, M, ...] at places [B, C]."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)
