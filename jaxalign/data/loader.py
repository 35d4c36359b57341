"""Streams: endless rows as batches, each a pure function of its index.

Everything is tokenised once, when a stream is built. A batch depends on the seed and its index
alone, so a resumed run, another host or a second look sees the same one. A process makes only the
rows that its devices hold. Grain's threads prefetch.

    tasks = streams.task_stream(config, tokenizer, "train")
    tasks.batch(7)                                  # TaskBatch, [B, T]
    tasks.stack(range(8, 12))                       # four micro-batches in one, [4, B, T]
    tasks.batch(7, rows_here(mesh, tasks.size))     # of 7, what the devices of this process hold
    for item in prefetch(tasks.batch, 8, 100):      # batches 8 to 99, made by threads beforehand
        ...
"""

from __future__ import annotations

import abc
import bisect
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np

from jaxalign.data.batch import (
    NO_LANGUAGE,
    Encoded,
    EncodedPair,
    EncodedPrompts,
    PairBatch,
    PromptBatch,
    TaskBatch,
    collate_pairs,
    collate_tasks,
    cover,
)
from jaxalign.data.flat import Layout, own_of
from jaxalign.data.languages import language_number, namesakes
from jaxalign.data.report import Report
from jaxalign.data.sampling import Grouped, Packed, Sequential, Shuffled, Slot

Row = TypeVar("Row", Encoded, EncodedPair, EncodedPrompts)
Batch = TypeVar("Batch", TaskBatch, PairBatch, PromptBatch)
Order = Sequential | Shuffled | Grouped | Packed

CAPACITY_STEP = 16  # answer capacities are multiples of it, to keep compiled shapes few
THREADS, AHEAD = 2, 4  # of the prefetch


class Counted(NamedTuple):
    """Tokens that count: no padding, shared ones once in each sequence."""

    sides: dict[str, int]  # of each side, without those that are shared
    shared: int

    def of(self, sides: Iterable[str]) -> int:
        """Those that a pass over these sides wants."""
        return self.shared + sum(self.sides[side] for side in sides)


class Stream(abc.ABC, Generic[Row, Batch]):
    """Rows in an order, cut into micro-batches of `size`.

    Attributes:
        rows: every encoded row, in file order.
        size: B, rows (packed: sequences) of a micro-batch over all hosts.
        buckets: the padded lengths T that occur, increasing.
        report: counts.
        spoken: the languages of the sides of a row, as they occur.
        languages: of all rows, sorted; a batch names them by `language_number`.
        epoch_batches: micro-batches of one pass; the last of a training pass reaches into the
            next one, the last of a validation pass is filled up with empty rows.
        endless: whether passes follow one another (training) or there is only one (validation).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        order: Order,
        size: int,
        buckets: Sequence[int],
        pad_id: int,
        report: Report,
        layout: Layout | None = None,
    ) -> None:
        """Takes what `data.streams` prepares; `layout` lays rows end to end."""
        self.rows: list[Row] = list(rows)
        self.size = size
        self.buckets = tuple(buckets)
        self.report = report
        self.spoken = {self._spoken(row) for row in self.rows}
        self.languages = tuple(sorted({name for row in self.spoken for name in row}))
        self.endless = order.endless
        self.epoch_batches = -(-order.epoch_slots // size)
        self.layout = layout
        self._order = order
        self._pad_id = pad_id

    @property
    def len_rows(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def batch(self, index: int, places: np.ndarray | None = None) -> Batch:
        """Micro-batch number `index`, from 0.

        Args:
            index: counts on through the epochs.
            places: which of the B rows are made, as `sharding.rows_here` says for a process; None:
                all. The length T is that of the whole batch.

        Raises:
            IndexError: a validation stream has no such batch.
        """
        return each(lambda array: array[0], self.stack([index], places))

    def stack(self, indices: Sequence[int], places: np.ndarray | None = None) -> Batch:
        """Several micro-batches with one common length: arrays [M, B (or `places`), ...]."""
        chosen = [self._slots(index) for index in indices]
        length = self._common(chosen)
        mine = range(self.size) if places is None else places
        parts = [self._made([slots[place] for place in mine], length) for slots in chosen]
        return each(lambda *arrays: np.stack(arrays), *parts)

    def _common(self, batches: Sequence[Sequence[Slot]]) -> int:
        """The padded length of these."""
        if self.layout:
            return self.layout.fitting(batches)
        needed = max((self._length(slot) for slots in batches for slot in slots), default=0)
        return next(bucket for bucket in self.buckets if bucket >= needed)

    def _made(self, slots: Sequence[Slot], length: int) -> Batch:
        if not self.layout:
            return self._collate(slots, length)
        # A place for each row of a slot, as each is a text of its own.
        alone = [
            (slot[number],) if number < len(slot) else ()
            for slot in slots
            for number in range(self._order.most)
        ]
        batch = self._collate(alone, cover(self.layout.whole, 8))
        return batch._replace(flat=self.layout.flat(slots, length))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The buckets that a micro-batch can need: none beyond the longest row's."""
        if self.layout:
            return tuple(self.layout.lengths)
        return self.buckets[: bisect.bisect_left(self.buckets, self.longest) + 1]

    @property
    def longest(self) -> int:
        """Tokens of the longest row; of two texts, of its longer one."""
        return max((self._length((i,)) for i in range(len(self.rows))), default=0)

    def blank(self, length: int, number: int, places: np.ndarray | None = None) -> Batch:
        """`number` stacked micro-batches without rows: the shapes in which this length T comes."""
        part = self._made([()] * (self.size if places is None else len(places)), length)
        return each(lambda array: np.stack([array] * number), part)

    def tokens(self, index: int) -> tuple[int, int]:
        """Of micro-batch `index` over all hosts: tokens that count, and all that are computed.

        A shared token counts once in each sequence, as nothing can compute it less often.
        """
        sequences = self.layout.ways if self.layout else self.size * len(self.sides)
        computed = sequences * self._common([self._slots(index)])
        return self.counted([index]).of(self.sides), computed

    def counted(self, indices: Sequence[int]) -> Counted:
        """Tokens that count in these micro-batches."""
        rows = [row for index in indices for slot in self._slots(index) for row in slot]
        own = np.array([self._own(row) for row in rows], int).reshape(-1, len(self.sides))
        found = dict(zip(self.sides, own.sum(axis=0).tolist(), strict=True))
        layout = self.layout
        shared = len(layout.stem.tokens) * layout.ways * len(indices) if layout else 0
        return Counted(found, shared)

    def _own(self, row: int) -> tuple[int, ...]:
        """Tokens of a row's sides that are not shared."""
        if self.layout is None:
            return self._texts(self.rows[row])
        return tuple(map(own_of, self.layout.rows[row]))

    @property
    def shape(self) -> str:
        """For people: how rows are laid out."""
        share = f"{100 * self.share():.0f} % of computed tokens count"
        if self.layout is None:
            return f"padded lengths {list(self.lengths)}, {share}"
        shared = len(self.layout.stem.tokens)
        first = f"{shared} shared tokens once, then " if shared else ""
        return f"{first}rows end to end, lengths {list(self.lengths)}, {share}"

    def share(self, most: int = 256) -> float:
        """The share of computed tokens that count, over the first micro-batches."""
        number = most if self.endless else min(most, self.epoch_batches)
        counted, computed = np.sum([self.tokens(index) for index in range(number)], axis=0)
        return float(counted / computed)

    def digest(self) -> str:
        """SHA-256 of everything that a batch is made of but the seed: rows, sizes and lengths."""
        found = hashlib.sha256(repr((self.size, self.buckets, self._pad_id)).encode())
        for row in self.rows:
            for content in self._contents(row):
                found.update(len(content).to_bytes(8, "big") + content)
        return found.hexdigest()

    def also_in(self, other: Self) -> int:
        """How many of these rows stand in another stream, too, token by token.

        Only these are held in memory; the other stream may be much larger.
        """
        own = Counter(map(self._contents, self.rows))
        both = {content for row in other.rows if (content := other._contents(row)) in own}
        return sum(own[content] for content in both)

    @property
    def namesakes(self) -> dict[str, list[str]]:
        """Languages that prompts call by one name; see `languages`. Most rows name none."""
        return {}

    @property
    def packed(self) -> list[Slot]:
        """The rows of each packed sequence of the first epoch; none where rows are not packed."""
        order = self._order
        return order.slots(0, order.epoch_slots) if isinstance(order, Packed) else []

    def real_rows(self, index: int) -> int:
        """Rows in micro-batch `index` over all hosts; fewer than B in a last validation batch."""
        return sum(len(slot) for slot in self._slots(index))

    def _slots(self, index: int) -> list[Slot]:
        if index < 0 or (not self.endless and index >= self.epoch_batches):
            raise IndexError(f"micro-batch {index} of {self.epoch_batches}")
        slots = self._order.slots(index * self.size, (index + 1) * self.size)
        return self.layout.balanced(slots) if self.layout else slots

    @property
    @abc.abstractmethod
    def sides(self) -> tuple[str, ...]:
        """The texts of a row, as a batch names them."""

    @abc.abstractmethod
    def _texts(self, row: Row) -> tuple[int, ...]:
        """Tokens of a row's sides."""

    @abc.abstractmethod
    def _spoken(self, row: Row) -> tuple[str, ...]:
        """The languages of a row's sides."""

    @abc.abstractmethod
    def _contents(self, row: Row) -> tuple[bytes, ...]:
        """What of a row reaches a batch."""

    @abc.abstractmethod
    def _length(self, slot: Slot) -> int:
        """Tokens of a slot."""

    @abc.abstractmethod
    def _collate(self, slots: Sequence[Slot], length: int) -> Batch:
        """The batch of some slots, padded to `length`."""


class TaskStream(Stream[Encoded, TaskBatch]):
    """Task rows."""

    sides = ("text",)

    @functools.cached_property
    def capacities(self) -> dict[int, int]:
        """A for each T: room for the longest answer of all rows that may come with this T."""
        if isinstance(self._order, Packed) and not self.layout:
            return dict.fromkeys(self.buckets, self._order.capacity)
        lengths = (cover(self.layout.whole, 8),) if self.layout else self.buckets
        return capacities_of(lengths, [(len(row.tokens), row.targets) for row in self.rows])

    @property
    def namesakes(self) -> dict[str, list[str]]:
        """Languages of translations that their prompts call by one name; see `languages`."""
        return namesakes({side for row in self.rows for side in row.languages})

    def _spoken(self, row: Encoded) -> tuple[str, ...]:
        return (row.language,)

    def _contents(self, row: Encoded) -> tuple[bytes, ...]:
        return row.tokens.tobytes(), str(row.first).encode(), row.language.encode()

    def _length(self, slot: Slot) -> int:
        return sum(len(self.rows[i].tokens) for i in slot)

    def _texts(self, row: Encoded) -> tuple[int, ...]:
        return (len(row.tokens),)

    def _collate(self, slots: Sequence[Slot], length: int) -> TaskBatch:
        sequences = [[self.rows[i] for i in slot] for slot in slots]
        most = 1 if self.layout else self._order.most
        numbers = np.full((len(slots), most), -1, np.int32)
        languages = np.full((3, *numbers.shape), NO_LANGUAGE, np.int32)
        for b, slot in enumerate(slots):
            numbers[b, : len(slot)] = slot
            for place, row in enumerate(self.rows[i] for i in slot):
                names = (row.language, *row.languages)
                languages[:, b, place] = [language_number(name) for name in names]
        arrays = length, self.capacities[length], self._pad_id, numbers, languages
        return collate_tasks(sequences, *arrays)


class PairStream(Stream[EncodedPair, PairBatch]):
    """Sentence pairs."""

    sides = ("source", "target")

    def _spoken(self, row: EncodedPair) -> tuple[str, ...]:
        return row.languages

    def _contents(self, row: EncodedPair) -> tuple[bytes, ...]:
        return row.source.tobytes(), row.target.tobytes(), row.language.encode()

    def _length(self, slot: Slot) -> int:
        return max((longer(self.rows[i]) for i in slot), default=0)

    def _texts(self, row: EncodedPair) -> tuple[int, ...]:
        return len(row.source), len(row.target)

    def _collate(self, slots: Sequence[Slot], length: int) -> PairBatch:
        pairs = [self.rows[slot[0]] if slot else None for slot in slots]
        numbers, languages = numbers_of(slots, pairs)
        return collate_pairs(pairs, length, self._pad_id, numbers, languages)


def capacities_of(buckets: Sequence[int], rows: Sequence[tuple[int, int]]) -> dict[int, int]:
    """T -> A, room for the targets of all rows (tokens, targets) that may come with this T."""
    found = {}
    for bucket in buckets:
        most = max((targets for length, targets in rows if length <= bucket), default=1)
        found[bucket] = min(cover(most, CAPACITY_STEP), bucket)
    return found


def numbers_of(
    slots: Sequence[Slot], rows: Sequence[EncodedPair | EncodedPrompts | None]
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B] row numbers and [2, B] languages of both sides, of slots with a row or none."""
    numbers = np.array([slot[0] if slot else -1 for slot in slots], np.int32)
    spoken = [row and [language_number(name) for name in row.languages] for row in rows]
    return numbers, np.array([both or [NO_LANGUAGE] * 2 for both in spoken], np.int32).T


def each(change: Callable[..., np.ndarray], *batches: Any) -> Any:
    """A batch of what `change` makes of each array of one batch, or of several together."""
    first = batches[0]
    if first is None:
        return None
    if not isinstance(first, tuple):
        return change(*batches)
    return type(first)(*(each(change, *arrays) for arrays in zip(*batches, strict=True)))


def prefetch(item: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    """`item(start)`, `item(start + 1)`, ... up to `stop`, made ahead of time by Grain's threads.

    Args:
        item: a pure function of its number, such as a stream's `batch`.
        start: the first number; a resumed run passes the updates it has done.
        stop: the number after the last.

    Raises:
        RuntimeError: an item ended the iteration (`StopIteration`), which Grain takes for the end.
    """
    import grain

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    iterator = iter(grain.MapDataset.range(start, stop).map(item).to_iter_dataset(options))
    done = start
    try:
        for made in iterator:
            yield made
            done += 1
        if done < stop:
            raise RuntimeError(f"the input ended at item {done} of {stop}")
    finally:
        iterator.close()


def longer(row: EncodedPair | EncodedPrompts) -> int:
    """Tokens of the longer side."""
    return max(map(len, row.sides))
