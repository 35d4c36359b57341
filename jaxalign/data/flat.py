"""Texts end to end: the layout of a batch in which no token is padding and none is computed twice.

The texts of a device's share of a batch stand one behind the other in one sequence, after the stem
that they have in common (`stem.py`). How many rows a batch has stays as it is; its length follows
from them and is rounded up to one of a few.

    layout = Layout.of(pieces, order, size=32, ways=1, pad_id=0)
    layout.lengths                                   # {912: 320, 976: 336}: T -> answer places A
    layout.flat(slots, 912)                          # Flat, [W, T]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from jaxalign.data.batch import NO_TARGET, Flat, cover
from jaxalign.data.sampling import Slot, choose_buckets
from jaxalign.data.stem import Shareable, Start, Stem, find

PLANNED, LEAST_PLANNED = 1 << 16, 128  # slots, and at least batches, whose lengths are looked at
LENGTHS = 6  # padded lengths of a stream, as each is compiled
STEP, ANSWER_STEP = 16, 16
GAIN, LONG_GAIN = 0.02, 0.25  # of all tokens: what a stem must save, before texts for kernels, too
KERNEL_STEP, KERNEL_REACH = 128, 256  # lengths for kernels, where texts are as long as they want


class Text(NamedTuple):
    """A text of a row: one of a task, two of a pair."""

    tokens: np.ndarray  # int32 [t]
    limit: int  # tokens at the start that may be shared
    first: int  # the first token that is predicted; t: none
    roles: np.ndarray | None = None  # int8 [t]

    @property
    def shareable(self) -> Shareable:
        """What `stem.find` looks at."""
        return Shareable(self.tokens, self.limit, self.roles)


Begun = tuple[Text, Start]


class Order(Protocol):
    """What `sampling` says of a line of slots."""

    endless: bool
    epoch_slots: int
    most: int

    def slots(self, start: int, stop: int) -> list[Slot]:
        """Slots start..stop-1."""
        ...


@dataclass(frozen=True)
class Layout:
    """How the rows of a stream are laid.

    Attributes:
      rows: the texts of each row, and where each begins.
      stem: what they share.
      size: slots of a batch; each holds up to `most` rows.
      ways: W, sequences of a batch, one for each share of its rows over the devices.
      lengths: T -> A, increasing.
      pad_id: token at padding.
      block: consecutive slots that may change places with one another; see `balanced`.
      parts: parts of a batch that a rule takes apart: slot i is of part i % parts, and sequences
        alternate between them.
    """

    rows: Sequence[Sequence[Begun]]
    stem: Stem
    size: int
    most: int
    ways: int
    lengths: dict[int, int]
    pad_id: int
    block: int
    parts: int = 1

    @functools.cached_property
    def reach(self) -> int:
        """Own tokens of the longest text."""
        return max((len(text.tokens) - start.depth for row in self.rows for text, start in row))

    @functools.cached_property
    def whole(self) -> int:
        """Tokens of the longest text."""
        return max((len(text.tokens) for row in self.rows for text, _ in row))

    @functools.cached_property
    def answered(self) -> bool:
        """Whether a token of any row is predicted."""
        return any(map(targets_of, self.rows))

    def own(self, slots: Sequence[Slot]) -> int:
        """Tokens of these slots that are not shared."""
        return sum(own_of(text) for slot in slots for row in slot for text in self.rows[row])

    def fitting(self, batches: Sequence[Sequence[Slot]]) -> int:
        """The length T with room for each of these batches; a function of them alone.

        A batch beyond all that were looked at gets a length of its own.
        """
        length = answers = 0
        for slots in batches:
            for share in self.shares(slots):
                length = max(length, len(self.stem.tokens) + self.own(share))
                answers = max(answers, sum(targets_of(self.rows[r]) for s in share for r in s))
        for known, places in self.lengths.items():
            if known >= length and places >= answers:
                return known
        longest = max(self.lengths)
        return cover(max(length, longest + 1), cover(longest // 16, step_of(self.reach)))

    def places(self, length: int) -> int:
        """A, answer places of a sequence of T tokens."""
        return self.lengths.get(length, length)

    def balanced(self, slots: Sequence[Slot]) -> list[Slot]:
        """The slots of a batch in another order, in which its sequences are about equally long.

        The longest share sets the length of all. The longest slots go first, each to the share with
        the fewest tokens that has room; each stays within its block, and parts stay apart.
        """
        each = self.size // self.ways
        parts = [self._balanced(slots[part :: self.parts]) for part in range(self.parts)]
        starts = range(0, len(parts[0]), each)
        return [slot for start in starts for part in parts for slot in part[start : start + each]]

    def _balanced(self, slots: Sequence[Slot]) -> list[Slot]:
        each = self.size // self.ways
        if self.ways == self.parts or self.block <= each or self.block % each:
            return list(slots)
        found: list[Slot] = []
        for first in range(0, len(slots), self.block):
            part = slots[first : first + self.block]
            own = [self.own([slot]) for slot in part]
            shares: list[list[Slot]] = [[] for _ in range(-(-len(part) // each))]
            tokens = [0] * len(shares)
            for place in sorted(range(len(part)), key=lambda place: -own[place]):
                open_ = [number for number, share in enumerate(shares) if len(share) < each]
                share = min(open_, key=tokens.__getitem__)
                shares[share].append(part[place])
                tokens[share] += own[place]
            found += [slot for share in shares for slot in share]
        return found

    def shares(self, slots: Sequence[Slot]) -> list[Sequence[Slot]]:
        """The slots of each sequence."""
        each = self.size // self.ways
        return [slots[start : start + each] for start in range(0, len(slots), each)]

    def flat(self, slots: Sequence[Slot], length: int) -> Flat:
        """These slots in sequences of T tokens."""
        stem, shares = self.stem, self.shares(slots)
        ways, shared, sides = len(shares), len(stem.tokens), len(self.rows[0])
        each = self.size // self.ways * self.most  # texts of one side in a sequence
        tokens = np.full((ways, length), self.pad_id, np.int32)
        segments, positions, sees = (np.zeros((ways, length), np.int32) for _ in range(3))
        roles = np.zeros((ways, length), np.int8)
        texts = np.zeros((ways, sides * each), np.int32)
        answer_at = np.zeros((ways, self.places(length)), np.int32)
        answers = np.full_like(answer_at, NO_TARGET)
        tokens[:, :shared], positions[:, :shared] = stem.tokens, stem.positions
        sees[:, :shared], roles[:, :shared] = stem.sees, stem.roles
        for w, share in enumerate(shares):
            at, filled = shared, 0
            for side in range(sides):
                for place, slot in enumerate(share):
                    for number, row in enumerate(slot, start=side * each + place * self.most):
                        text, start = self.rows[row][side]
                        end = at + len(text.tokens) - start.depth
                        tokens[w, at:end] = text.tokens[start.depth :]
                        segments[w, at:end], sees[w, at:end] = number + 1, start.sees
                        positions[w, at:end] = np.arange(start.depth, len(text.tokens))
                        if text.roles is not None:
                            roles[w, at:end] = text.roles[start.depth :]
                        texts[w, number] = start.sees
                        count = len(text.tokens) - text.first
                        answers[w, filled : filled + count] = text.tokens[text.first :]
                        # The token at position i is predicted by the state at i - 1.
                        answer_at[w, filled : filled + count] = np.arange(end - count, end) - 1
                        at, filled = end, filled + count
        nodes = np.tile(stem.bits, (ways, 1))
        reach = np.zeros((ways, self.reach), np.int8)
        told = roles if self.rows[0][0][0].roles is not None else None
        own = (answer_at, answers) if self.answered else ()
        return Flat(tokens, segments, positions, sees, nodes, texts, reach, told, *own)


def begin(rows: Sequence[Sequence[Text]], stem: Stem) -> list[list[Begun]]:
    """Each text of each row, and where it begins."""
    return [[(text, stem.start(text.shareable)) for text in row] for row in rows]


def lay(
    started: Sequence[Sequence[Begun]],
    order: Order,
    size: int,
    ways: int,
    pad_id: int,
    stem: Stem,
    packed: int = 0,
    block: int = 0,
    parts: int = 1,
) -> Layout:
    """The layout of these rows, with lengths for the batches that are to come.

    Args:
      started: the texts of each row (`begin`).
      order: of slots.
      size: slots of a batch.
      ways: sequences of a batch.
      pad_id: token at padding.
      stem: what the texts share.
      packed: own tokens of a slot, where all are filled to one length; 0: they are not.
      block: consecutive slots that may change places with one another; 0: all of a batch, 1: none.
      parts: see `Layout`.
    """
    layout = Layout(started, stem, size, order.most, ways, {}, pad_id, block or size, parts)
    step = step_of(layout.reach)
    shared = len(stem.tokens)
    number = max(PLANNED // size, LEAST_PLANNED)
    if not order.endless:
        number = min(number, -(-order.epoch_slots // size))
    slots = order.slots(0, number * size)
    needed, answers = [], []
    own = np.array([sum(map(own_of, row)) for row in started])
    targets = np.array([targets_of(row) for row in started])
    for first in range(0, len(slots), size):
        shares = layout.shares(layout.balanced(slots[first : first + size]))
        chosen = [[row for slot in share for row in slot] for share in shares]
        needed.append(shared + max(int(own[share].sum()) for share in chosen))
        answers.append(max(int(targets[share].sum()) for share in chosen))
    if packed:
        lengths: tuple[int, ...] = (cover(shared + size // ways * packed, step),)
    else:
        lengths = choose_buckets(needed, 1, LENGTHS, step, 0.005)
    found = np.searchsorted(lengths, needed)
    for number, length in enumerate(lengths):  # a longer one has room for what shorter ones have
        here = [count for count, bucket in zip(answers, found, strict=True) if bucket <= number]
        layout.lengths[length] = cover(max(here, default=1) or 1, ANSWER_STEP)
    return layout


def shared_by(rows: Sequence[Sequence[Text]], uses: float) -> Stem:
    """What these rows have in common, where so many of them share a sequence; empty if little."""
    texts = [text.shareable for row in rows for text in row]
    uses *= len(rows[0])
    mean = float(np.mean([len(text.tokens) for text in texts]))
    stem = find(texts, uses, mean)
    longest = max(len(text.tokens) - stem.start(text).depth for text in texts)
    # Behind a stem attention forms its scores (`model.attention`); long texts run in kernels.
    least = LONG_GAIN if longest >= KERNEL_REACH else GAIN
    saved = sum(node.gain for node in stem.nodes)
    return stem if saved >= least * uses * mean else Stem()


def step_of(reach: int) -> int:
    """Lengths are multiples of it, where texts have so many own tokens."""
    return KERNEL_STEP if reach >= KERNEL_REACH else STEP


def own_of(begun: Begun) -> int:
    """Tokens of a text that are not shared."""
    text, start = begun
    return len(text.tokens) - start.depth


def targets_of(row: Sequence[Begun]) -> int:
    """Tokens of a row that are predicted."""
    return sum(len(text.tokens) - text.first for text, _ in row)
