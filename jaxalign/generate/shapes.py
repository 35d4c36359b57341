"""Which rows are decoded together, and in which few shapes: functions of lengths alone.

    chunks([5, 90, 80, 7], batch_size=2)      # [[1, 2], [3, 0]]: longest first
    padded(90)                                # 96
    rungs(32)                                 # (32, 16, 8)

A chunk's shapes depend on its own rows, never on its neighbours, so that a run which leaves out
finished chunks writes the others with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec

LEAST_ROWS = 8  # below that, fewer rows save no time
LEAST_LENGTH = 16
SEGMENT = 32  # new tokens that a cache has room for at first


def chunks(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers of each batch, the longest prompts first; equal lengths keep their order.

    Without some whole chunks the other rows fall into the same chunks again.

    Args:
        lengths: tokens of every prompt.
        batch_size: prompts decoded together.

    Raises:
        UserError: batch_size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} should be 1 or more")
    # Longest first: what does not fit into memory fails at once, not after an hour.
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padded(length: int) -> int:
    """The next of few lengths: multiples of 16, from 128 on four in every doubling."""
    step = LEAST_LENGTH
    while step * 8 < length:
        step *= 2
    return -(-length // step) * step


def rungs(batch_size: int) -> tuple[int, ...]:
    """Batch sizes from the full one down, each half of the one before."""
    found = [batch_size]
    while found[-1] > LEAST_ROWS:
        found.append(-(-found[-1] // 2))
    return tuple(found)


def first_slots(width: int, new: int) -> int:
    """Slots of a fresh cache behind a prompt of `width` slots, for at most `new` more tokens.

    Attention reads every slot, filled or not, so a cache starts short where that saves a quarter.
    """
    whole, short = padded(width + new), padded(width + min(new, SEGMENT))
    return whole if whole <= 1.25 * short else short


def more_slots(slots: int, width: int, new: int) -> int:
    """Slots of the next, larger cache."""
    whole, larger = padded(width + new), padded(slots + slots // 2)
    return whole if whole <= 1.25 * larger else larger


def check(prompts: Sequence[Sequence[int]], spec: ModelSpec, new: int) -> None:
    """Says what is wrong with a prompt.

    Raises:
        UserError: a prompt is empty, holds ids that the model has not, or leaves no room for `new`.
    """
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
