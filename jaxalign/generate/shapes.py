"""Which rows are decoded together, and in which few shapes: functions of the prompts alone.

    chunks([5, 90, 80, 7], batch_size=2)      # [[1, 2], [3, 0]]: longest first
    padded(90)                                # 96
    rungs(32)                                 # (32, 16, 8)
    layout = lay_out(prompts, 32)
    layout.ahead, layout.computed             # first tokens that all share; tokens that are run

A chunk's shapes depend on its own rows and on what all prompts share, never on its neighbours, so
that a run which leaves out finished chunks writes the others with the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec

LEAST_ROWS = 8  # below that, fewer rows save no time
LEAST_LENGTH = 16
SEGMENT = 32  # new tokens that a cache has room for at first
LEAST_SHARED = 16  # tokens; fewer would not make the rows much shorter
LEAST_SAVED = 512  # tokens that are not run again; below, one more program costs more
SCORES = 2**19  # of a head and row that are formed behind shared tokens; for more there are kernels


@dataclass(frozen=True)
class Layout:
    """How prompts are computed: what all of them share once, then chunk by chunk."""

    lengths: tuple[int, ...]
    batch: int
    ahead: int  # first tokens that all prompts share
    groups: tuple[list[int], ...]  # row numbers of each chunk, the longest first

    def width(self, group: Sequence[int]) -> tuple[int, int]:
        """Tokens of these rows that are shared, and slots for those that are not."""
        longest = self.lengths[group[0]]
        own = padded(longest - self.ahead)
        if own * (self.ahead + own) > SCORES:
            return 0, padded(longest)
        return self.ahead, own

    def only(self, rows: Collection[int]) -> Layout:
        """The chunks that hold one of these rows."""
        kept = tuple(group for group in self.groups if not set(rows).isdisjoint(group))
        return Layout(self.lengths, self.batch, self.ahead, kept)

    @property
    def rows(self) -> int:
        """Prompts in these chunks."""
        return sum(map(len, self.groups))

    @property
    def asked(self) -> int:
        """Tokens of their prompts."""
        return sum(self.lengths[row] for group in self.groups for row in group)

    @property
    def computed(self) -> int:
        """Tokens that are run for them, with padding."""
        shapes = [(rung(len(group), self.batch), *self.width(group)) for group in self.groups]
        once = padded(self.ahead) if any(ahead for _, ahead, _ in shapes) else 0
        return once + sum(rows * own for rows, _, own in shapes)

    @property
    def counted(self) -> int:
        """Of these, those that are no padding; a shared token counts once."""
        ahead = [self.width(group)[0] for group in self.groups for _ in group]
        return self.asked - sum(ahead) + max(ahead, default=0)

    def __str__(self) -> str:
        return (
            f"{self.rows:,} prompts of {self.asked:,} tokens share their first {self.ahead:,}: "
            f"{self.computed:,} tokens computed, with padding"
        )


def lay_out(prompts: Sequence[Sequence[int]], batch_size: int, share: bool = True) -> Layout:
    """The layout of prompts; see `chunks`.

    Args:
        prompts: token ids.
        batch_size: prompts decoded together.
        share: whether what all prompts share is computed once.

    Raises:
        UserError: batch_size below 1.
    """
    lengths = tuple(len(prompt) for prompt in prompts)
    ahead = common(prompts) if share else 0
    return Layout(lengths, batch_size, ahead, tuple(chunks(lengths, batch_size)))


def common(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share; 0 where it would not pay to compute them once.

    Each prompt keeps a token of its own, from which its answer goes on.
    """
    if len(prompts) < 2:
        return 0
    rows = [list(prompt) for prompt in prompts]
    first, last = min(rows), max(rows)  # in the order of a dictionary: all others are between them
    most = min(map(len, rows)) - 1
    shared = next((at for at in range(most) if first[at] != last[at]), most)
    pays = shared >= LEAST_SHARED and shared * (len(prompts) - 1) >= LEAST_SAVED
    return shared if pays else 0


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


def rung(rows: int, batch_size: int) -> int:
    """The smallest batch that holds so many rows."""
    return min(size for size in rungs(batch_size) if size >= rows)


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


def check(prompts: Sequence[Sequence[int]], spec: ModelSpec, new: int, taken: int = 0) -> None:
    """Says what is wrong with a prompt; an adapter has taken so many positions in front of it.

    Raises:
        UserError: a prompt is empty, holds ids that the model has not, or leaves no room for `new`.
    """
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens; a model cannot continue nothing")
        if len(prompt) + new + taken > spec.max_position:
            adapter = f", behind the adapter's {taken}," if taken else ""
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and with max_new_tokens={new}{adapter} "
                f"passes the model's {spec.max_position} positions; shorten it or lower "
                "max_new_tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < spec.vocab:
            raise UserError(
                f"prompt {number} holds token ids outside 0..{spec.vocab - 1}; the tokenizer is "
                "another model's"
            )
