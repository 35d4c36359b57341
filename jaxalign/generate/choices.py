"""Given answers weighed by a model, without writing any: multiple choice.

    weighed(decoder, params, lora, prompts, choices, how="whole")      # [[-3.1, -7.4], ...]

Of each prompt there are some choices. `whole`: a choice is a text, and what is found is the log of
its probability behind the prompt. `one_of`: a choice is a set of tokens, and what is found is the
log of the probability that the next token is one of them.

What all prompts begin with is computed once, and each prompt once: its choices stand end to end
behind it, in one pass, in which none sees another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.generate import shapes
from jaxalign.generate.loop import Model
from jaxalign.generate.run import behind
from jaxalign.model.decoder import Decoder
from jaxalign.model.layers import Cache
from jaxalign.sharding import constrain

NONE = -1  # no token
LOGITS = 2**26  # numbers of the vocabulary's that are formed at once
Choices = Sequence[Sequence[int]]  # of one prompt: the tokens of each
HOW = ("whole", "one_of")


def weighed(
    decoder: Decoder,
    params: dict,
    lora: dict | None,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Choices],
    how: str,
    batch_size: int = 32,
    share_prefix: bool = True,
) -> list[list[float]]:
    """The log-probability of each choice of each prompt; arguments as `weigh_chunks`."""
    found: list[list[float]] = [[] for _ in prompts]
    for rows, weights in weigh_chunks(
        decoder, params, lora, prompts, choices, how, batch_size, share_prefix
    ):
        for row, some in zip(rows, weights, strict=True):
            found[row] = some
    return found


def weigh_chunks(
    decoder: Decoder,
    params: dict,
    lora: dict | None,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Choices],
    how: str,
    batch_size: int = 32,
    share_prefix: bool = True,
    rows: Collection[int] | None = None,
) -> Iterator[tuple[list[int], list[list[float]]]]:
    """Row numbers and log-probabilities, chunk by chunk, the longest prompts first.

    A later call that wants only `rows` gives the chunks that hold them, bitwise the same.

    Args:
        decoder: the model; its adapter belongs to `lora`.
        params: weights.
        lora: adapter weights, or None for the base alone.
        prompts: token ids without padding.
        choices: of each prompt; none is empty.
        how: `whole` or `one_of`.
        batch_size: prompts computed together.
        share_prefix: whether the first tokens that all prompts have in common are computed once.
        rows: which prompts are wanted; None: all.

    Raises:
        UserError: a prompt is empty, holds ids that the model has not, or leaves no room.
    """
    most = max((len(tokens) for some in choices for tokens in some), default=1)
    worn = decoder.adapter if lora else None
    taken = worn.taken if worn else 0
    shapes.check(prompts, decoder.spec, most if how == "whole" else 1, taken)
    # What depends on the whole of a prompt is not shared.
    layout = shapes.lay_out(prompts, batch_size, share_prefix and not (worn and worn.by_input))
    if rows is not None:
        layout = layout.only(rows)
    alone, after = Model(params, lora), None
    # One shape for all chunks of a length: that of the longest choice, and of most choices.
    room = (max(map(len, choices), default=1), most)
    for group in layout.groups:
        ahead, width = layout.width(group)
        if ahead and after is None:
            after = behind(alone, decoder, prompts[0][:ahead])
        size = shapes.rung(len(group), batch_size)
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        listed = np.full((size, *room), NONE, np.int32)
        for row, number in enumerate(group):
            own = prompts[number][ahead:]
            lengths[row], tokens[row, : len(own)] = len(own), own
            for place, choice in enumerate(choices[number]):
                listed[row, place, : len(choice)] = choice
        model = after if after and ahead else alone
        weights = jax.device_get(PROGRAMS[how](model, tokens, lengths, listed, decoder))
        yield (
            group,
            [weights[row, : len(choices[number])].tolist() for row, number in enumerate(group)],
        )


@partial(jax.jit, static_argnums=4)
def one_of(
    model: Model,
    tokens: jax.Array,  # [B, T] int32, padded on the right
    lengths: jax.Array,  # [B] int32; 0 for a row that only fills the batch
    choices: jax.Array,  # [B, N, C] int32; NONE behind each set's tokens
    decoder: Decoder,
) -> jax.Array:
    """[B, N] float32: log of the probability that the next token is one of each set."""
    hidden, _ = model.prompt(decoder, tokens, lengths)
    chances = _log_softmax(model, decoder, _last(hidden, lengths))  # [B, V]
    found = jnp.where(choices == NONE, -jnp.inf, _of(chances[:, None], choices))
    return constrain(jax.nn.logsumexp(found, axis=2), "- -")


@partial(jax.jit, static_argnums=4)
def whole(
    model: Model,
    tokens: jax.Array,  # as `one_of`
    lengths: jax.Array,
    choices: jax.Array,
    decoder: Decoder,
) -> jax.Array:
    """[B, N] float32: log of the probability of each choice behind its prompt."""
    hidden, cache = model.prompt(decoder, tokens, lengths)
    chances = _log_softmax(model, decoder, _last(hidden, lengths))  # [B, V]
    first = _of(chances[:, None], choices[:, :, :1])  # [B, N, 1]
    if choices.shape[2] > 1:
        first = jnp.concatenate([first, _rest(model, decoder, cache, lengths, choices)], axis=2)
    return constrain(jnp.where(choices == NONE, 0.0, first).sum(axis=2), "- -")


PROGRAMS = {"whole": whole, "one_of": one_of}


def _rest(
    model: Model, decoder: Decoder, prompt: Cache, lengths: jax.Array, choices: jax.Array
) -> jax.Array:
    """[B, N, C-1]: what each token of a choice but the first one has, behind those before it."""
    rows, number, length = choices.shape
    length, width = length - 1, prompt.slots
    lengths = model.vectors(decoder) + lengths  # an adapter's vectors have slots, too
    count = number * length
    cache = prompt.grow(width + count)
    slots, own = jnp.arange(width + count), jnp.arange(count)
    after = slots - width  # the place of a slot among the choices' tokens
    same = (own[:, None] // length == after // length) & (after >= 0)
    before = same & (after <= own[:, None])  # [N·C, S]
    mask = (slots < lengths[:, None])[:, None] & (slots < width) | before  # [B, N·C, S]
    places = jnp.where(slots < width, slots, lengths[:, None] + after % length)
    hidden, _ = model.extend(
        decoder,
        jnp.maximum(choices[:, :, :-1], 0).reshape(rows, count),
        cache,
        positions=lengths[:, None] + own % length,
        places=places,
        slot=width,
        mask=mask,
    )
    next_ = jnp.moveaxis(choices[:, :, 1:].reshape(rows, count), 1, 0)  # [N·C, B]
    at_once = max(1, LOGITS // (rows * decoder.spec.vocab))
    found = jax.lax.map(
        lambda given: _of(_log_softmax(model, decoder, given[0]), given[1][:, None])[:, 0],
        (jnp.moveaxis(hidden, 1, 0), next_),
        batch_size=min(at_once, count),
    )
    return jnp.moveaxis(found, 0, 1).reshape(rows, number, length)


def _last(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, D]: the state of each row's last token."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]


def _log_softmax(model: Model, decoder: Decoder, hidden: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(decoder.logits(model.params, hidden), axis=-1)


def _of(chances: jax.Array, tokens: jax.Array) -> jax.Array:
    """The entries of [..., V] of these tokens [..., C]; any where there is none."""
    return jnp.take_along_axis(chances, jnp.maximum(tokens, 0), axis=-1)
