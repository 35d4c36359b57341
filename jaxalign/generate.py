"""Answers, greedily: prompts of similar length share a batch, and one compiled loop decodes it.

    stops = stop_ids(spec, tokenizer)
    prompts = [list(ids) for ids in encode_prompts(examples, tokenizer)]
    answers = generate(decoder, params, lora, prompts, max_new_tokens=128, stop_ids=stops)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)

Prompts are padded on the right to a few lengths, so that few shapes are compiled. All rows write
their n-th new token to the same cache slot; each keeps its own rotary position, that of its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.chat import encode_examples
from jaxalign.data.sampling import choose_buckets
from jaxalign.data.tasks import Example
from jaxalign.errors import UserError
from jaxalign.model.attention import causal
from jaxalign.model.decoder import Decoder
from jaxalign.model.layers import Cache
from jaxalign.model.spec import ModelSpec
from jaxalign.sharding import constrain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, template: str = "chat"
) -> tuple[int, ...]:
    """The tokens that end an answer.

    They are those of the model's configuration (`load_spec` adds generation_config.json's), the
    tokenizer's end token, and the token with which the template ends a turn: what training taught.

    Args:
        spec: the model.
        tokenizer: the tokenizer; without a chat template `chat` adds nothing.
        template: as in `jaxalign.data.chat`.
    """
    ids = list(spec.eos_ids)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if template != "chat" or tokenizer.chat_template:
        (row,) = encode_examples([Example("a", "b", system="")], tokenizer, template)
        ids.append(int(row.tokens[-1]))
    return tuple(dict.fromkeys(ids))


def generate(
    decoder: Decoder,
    params: dict,
    lora: dict | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 32,
    report: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The greedy continuation of every prompt, in the order of the prompts.

    Every process of a run calls this with the same prompts and gets all answers.

    Args:
        decoder: the model; its adapter belongs to `lora`.
        params: weights; their dtype is the cache's.
        lora: adapter weights, or None for the base alone.
        prompts: token ids without padding.
        max_new_tokens: longest continuation.
        stop_ids: a row ends at the first of these.
        batch_size: rows decoded together; also the last, smaller batch has this many.
        report: called after every batch with the numbers of finished and of all prompts.

    Returns:
        New token ids of each prompt without the stop token; a row of `max_new_tokens` ids never
        came to one.

    Raises:
        UserError: a prompt is empty, holds ids that the model has not, or leaves no room for
            `max_new_tokens`; max_new_tokens or batch_size below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError("generation needs max_new_tokens and batch_size of 1 or more")
    _check(prompts, decoder.spec, max_new_tokens)
    # Longest first: what does not fit into memory fails at once, not after an hour.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    longest = [len(prompts[group[0]]) for group in groups]
    buckets = choose_buckets(longest, 1) if groups else ()
    stops = np.array(sorted(set(stop_ids)), np.int32)
    answers: list[list[int]] = [[] for _ in prompts]
    finished = 0
    for group, length in zip(groups, longest, strict=True):
        width = next(bucket for bucket in buckets if bucket >= length)
        tokens = np.zeros((batch_size, width), np.int32)
        lengths = np.zeros(batch_size, np.int32)
        for row, i in enumerate(group):
            lengths[row] = len(prompts[i])
            tokens[row, : lengths[row]] = prompts[i]
        found = _continue(params, lora, tokens, lengths, stops, decoder, max_new_tokens)
        written, counts = jax.device_get((found.written, found.counts))
        for row, i in enumerate(group):
            answers[i] = written[row, : counts[row]].tolist()
        finished += len(group)
        if report:
            report(finished, len(prompts))
    return answers


@flax.struct.dataclass
class _State:
    """A batch between two steps of the loop."""

    step: jax.Array  # tokens chosen so far, a scalar
    written: jax.Array  # [B, max_new_tokens] int32; 0 where nothing is written
    counts: jax.Array  # [B] int32: tokens of the answer, without the stop token
    done: jax.Array  # [B] bool
    cache: Cache

    def take(self, logits: jax.Array, stops: jax.Array) -> _State:
        """The state with one more token for each row that is not done; logits [B, V]."""
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        done = self.done | (token[:, None] == stops).any(axis=1)
        return self.replace(
            step=self.step + 1,
            written=self.written.at[:, self.step].set(jnp.where(done, 0, token)),
            counts=self.counts + ~done,
            done=done,
        )


@partial(jax.jit, static_argnums=(5, 6))
def _continue(
    params: dict,
    lora: dict | None,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32; 0 for a row that only fills the batch
    stops: jax.Array,  # [any] int32
    decoder: Decoder,
    most: int,
) -> Any:
    """The final `_State` without its cache: the prompt in one pass, then a token at a time."""
    rows, width = tokens.shape
    # XLA writes bfloat16 in place on GPU and TPU, but on a CPU by way of a float32 copy of the
    # whole array, for every token; there the cache is float32 and holds the same numbers.
    dtype = jnp.float32 if jax.default_backend() == "cpu" else params["embed"].dtype
    # The last token is chosen but never read, so it needs no slot.
    cache = decoder.empty_cache(rows, width + most - 1, dtype)
    place = jnp.arange(width)[None]
    hidden, cache = decoder.extend(
        params, lora, tokens, cache, slot=0, positions=place, mask=causal(width)
    )
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)  # [B, 1, D]
    zeros = jnp.zeros(rows, jnp.int32)
    state = _State(jnp.int32(0), jnp.zeros((rows, most), jnp.int32), zeros, lengths == 0, cache)
    state = state.take(decoder.logits(params, hidden[:, 0]), stops)
    slots = jnp.arange(width + most - 1)
    prompt = slots < lengths[:, None]  # [B, S]

    def step(state: _State) -> _State:
        new = state.step - 1  # the latest token's place among the new ones
        seen = prompt | ((slots >= width) & (slots <= width + new))
        hidden, cache = decoder.extend(
            params,
            lora,
            jax.lax.dynamic_slice_in_dim(state.written, new, 1, axis=1),
            state.cache,
            slot=width + new,
            positions=(lengths + new)[:, None],
            mask=seen[:, None],
        )
        logits = decoder.logits(params, hidden[:, 0])
        return state.replace(cache=cache).take(logits, stops)

    state = jax.lax.while_loop(lambda s: (s.step < most) & ~s.done.all(), step, state)
    # Letters that no mesh axis splits: every process reads all rows.
    return state.replace(
        written=constrain(state.written, "- -"), counts=constrain(state.counts, "-"), cache=None
    )


def _check(prompts: Sequence[Sequence[int]], spec: ModelSpec, new: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens; a model cannot continue nothing")
        if len(prompt) + new > spec.max_position:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and with max_new_tokens={new} passes "
                f"the model's {spec.max_position} positions; shorten it or lower max_new_tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < spec.vocab:
            raise UserError(
                f"prompt {number} holds token ids outside 0..{spec.vocab - 1}; the tokenizer is "
                "another model's"
            )
