"""Streams: endless task rows and sentence pairs as batches, each a pure function of its index.

Everything is tokenised once, when a stream is built. A batch depends on the seed and its index
alone, so a resumed run, another host or a second look sees the same one. A process makes only the
rows that its devices hold. Grain's threads prefetch.

    tasks = task_stream(config, tokenizer, "train")
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from jaxalign.data import sources, tasks
from jaxalign.data.batch import (
    Encoded,
    EncodedPair,
    PairBatch,
    TaskBatch,
    collate_pairs,
    collate_tasks,
    cover,
)
from jaxalign.data.chat import encode_examples
from jaxalign.data.languages import split_direction
from jaxalign.data.pairs import encode_pairs, shuffle_targets, to_pair
from jaxalign.data.sampling import (
    Packed,
    Sequential,
    Shuffled,
    Slot,
    choose_buckets,
    mixture,
)
from jaxalign.errors import UserError
from jaxalign.settings import AlignConfig, Config, TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", Encoded, EncodedPair)
Batch = TypeVar("Batch", TaskBatch, PairBatch)
Order = Sequential | Shuffled | Packed

CAPACITY_STEP = 16  # answer capacities are multiples of it, to keep compiled shapes few
THREADS, AHEAD = 2, 4  # of the prefetch


@dataclass(frozen=True)
class Report:
    """What became of the data, for the log."""

    read: int  # rows in the files, after the language filter
    kept: int
    cut: int  # kept rows that lost tokens on the right
    dropped: int  # rows whose whole answer was cut away
    languages: dict[str, int]  # kept rows of each

    def __str__(self) -> str:
        """One line for people."""
        parts = [f"{self.kept} rows"]
        if self.cut:
            parts.append(f"{self.cut} cut to the maximum length")
        if self.dropped:
            parts.append(f"{self.dropped} dropped, their answer lay beyond it")
        named = [f"{name} {count}" for name, count in self.languages.items() if name]
        return ", ".join(parts) + (f" ({', '.join(named)})" if named else "")


class Stream(abc.ABC, Generic[Row, Batch]):
    """Rows in an order, cut into micro-batches of `size`.

    Attributes:
        rows: every encoded row, in file order.
        size: B, rows (packed: sequences) of a micro-batch over all hosts.
        buckets: the padded lengths T that occur, increasing.
        report: counts.
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
    ) -> None:
        """Takes what `task_stream` and `pair_stream` prepare."""
        self.rows: list[Row] = list(rows)
        self.size = size
        self.buckets = tuple(buckets)
        self.report = report
        self.endless = order.endless
        self.epoch_batches = -(-order.epoch_slots // size)
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
            places: which of the B rows are made, as `sharding.rows_here` tells a process; None:
                all. The length T is that of the whole batch.

        Raises:
            IndexError: a validation stream has no such batch.
        """
        stacked = self.stack([index], places)
        return type(stacked)(*(array[0] for array in stacked))

    def stack(self, indices: Sequence[int], places: np.ndarray | None = None) -> Batch:
        """Several micro-batches with one common length: arrays [M, B (or `places`), ...]."""
        chosen = [self._slots(index) for index in indices]
        needed = max((self._length(slot) for slots in chosen for slot in slots), default=0)
        length = next(bucket for bucket in self.buckets if bucket >= needed)
        mine = range(self.size) if places is None else places
        parts = [self._collate([slots[place] for place in mine], length) for slots in chosen]
        return type(parts[0])(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """The buckets that a micro-batch can need: none beyond the longest row's."""
        longest = max((self._length((i,)) for i in range(len(self.rows))), default=0)
        return self.buckets[: bisect.bisect_left(self.buckets, longest) + 1]

    def blank(self, length: int, number: int, places: np.ndarray | None = None) -> Batch:
        """`number` stacked micro-batches without rows: the shapes in which this length T comes."""
        part = self._collate([()] * (self.size if places is None else len(places)), length)
        return type(part)(*(np.stack([array] * number) for array in part))

    def digest(self) -> str:
        """SHA-256 of everything that a batch is made of but the seed: rows, sizes and lengths."""
        found = hashlib.sha256(repr((self.size, self.buckets, self._pad_id)).encode())
        for row in self.rows:
            for content in self._contents(row):
                found.update(len(content).to_bytes(8, "big") + content)
        return found.hexdigest()

    def real_rows(self, index: int) -> int:
        """Rows in micro-batch `index` over all hosts; fewer than B in a last validation batch."""
        return sum(len(slot) for slot in self._slots(index))

    def _slots(self, index: int) -> list[Slot]:
        if index < 0 or (not self.endless and index >= self.epoch_batches):
            raise IndexError(f"micro-batch {index} of {self.epoch_batches}")
        return self._order.slots(index * self.size, (index + 1) * self.size)

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

    @functools.cached_property
    def capacities(self) -> dict[int, int]:
        """A for each T: room for the longest answer of all rows that may come with this T."""
        if isinstance(self._order, Packed):
            return dict.fromkeys(self.buckets, self._order.capacity)
        longest = {
            bucket: max((r.targets for r in self.rows if len(r.tokens) <= bucket), default=1)
            for bucket in self.buckets
        }
        return {t: min(cover(targets, CAPACITY_STEP), t) for t, targets in longest.items()}

    def _contents(self, row: Encoded) -> tuple[bytes, ...]:
        return row.tokens.tobytes(), str(row.first).encode(), row.language.encode()

    def _length(self, slot: Slot) -> int:
        return sum(len(self.rows[i].tokens) for i in slot)

    def _collate(self, slots: Sequence[Slot], length: int) -> TaskBatch:
        sequences = [[self.rows[i] for i in slot] for slot in slots]
        numbers = np.full((len(slots), self._order.most), -1, np.int32)
        for place, slot in zip(numbers, slots, strict=True):
            place[: len(slot)] = slot
        return collate_tasks(sequences, length, self.capacities[length], self._pad_id, numbers)


class PairStream(Stream[EncodedPair, PairBatch]):
    """Sentence pairs."""

    def _contents(self, row: EncodedPair) -> tuple[bytes, ...]:
        return row.source.tobytes(), row.target.tobytes(), row.language.encode()

    def _length(self, slot: Slot) -> int:
        return max((_longer(self.rows[i]) for i in slot), default=0)

    def _collate(self, slots: Sequence[Slot], length: int) -> PairBatch:
        pairs = [self.rows[slot[0]] if slot else None for slot in slots]
        numbers = np.array([slot[0] if slot else -1 for slot in slots], np.int32)
        return collate_pairs(pairs, length, self._pad_id, numbers)


def prefetch(item: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    """`item(start)`, `item(start + 1)`, ... up to `stop`, made ahead of time by Grain's threads.

    Args:
        item: a pure function of its number, such as a stream's `batch`.
        start: the first number; a resumed run passes the updates it has done.
        stop: the number after the last.
    """
    import grain

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    iterator = iter(grain.MapDataset.range(start, stop).map(item).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def task_stream(
    config: Config, tokenizer: PreTrainedTokenizerBase, split: str = "train"
) -> TaskStream:
    """The task rows of a run.

    Args:
        config: uses seed, task, prompt and batch.
        tokenizer: from `load_tokenizer`.
        split: 'train' (shuffled, endless, packed if asked) or 'valid' (file order, once).

    Raises:
        UserError: data missing or broken; names file:line or the key.
    """
    examples = [
        tasks.render(config.task.kind, record) for record in _records(config.task, "task", split)
    ]
    directed = config.task.kind == "translation"
    examples = _keep(
        examples,
        config.task,
        "task",
        split,
        lambda e: _direction(e.language) if directed else [{e.language}],
    )
    limit = min(config.batch.max_length, tokenizer.model_max_length)
    encoded = encode_examples(
        examples, tokenizer, config.prompt.template, config.prompt.system, limit
    )
    for row in encoded:
        if not row.targets and row.whole <= limit:
            raise UserError(
                f"{row.origin}: the answer adds no token to the prompt, so no token of this row "
                "would be trained; fill it or remove the row"
            )
    rows = [row for row in encoded if row.targets]
    if not rows:
        raise UserError(
            f"task.{split}: in all {len(encoded)} rows the prompt alone fills the {limit} tokens "
            f"allowed, nothing is left to train; raise batch.max_length"
        )
    report = _report(rows, len(encoded), [r.whole > len(r.tokens) for r in rows])
    lengths = [len(row.tokens) for row in rows]
    buckets = _buckets(config, lengths, config.batch.size, "batch.max_length")
    order: Order = _order(rows, config.task, config.seed, split)
    if config.batch.pack == "segments" and isinstance(order, Shuffled):
        slot = max(config.batch.buckets, default=_slot_length(lengths, limit, config.batch.size))
        order = Packed(order, lengths, [r.targets for r in rows], slot, config.seed, CAPACITY_STEP)
        buckets = (slot,)
    return TaskStream(rows, order, config.batch.size, buckets, tokenizer.pad_token_id, report)


def pair_stream(
    config: Config, tokenizer: PreTrainedTokenizerBase, split: str = "train"
) -> PairStream:
    """The sentence pairs of a run; arguments and errors as `task_stream`.

    `align.control: shuffled` moves the targets of training and validation pairs alike.
    """
    pairs = [to_pair(record) for record in _records(config.align, "align", split)]
    pairs = _keep(
        pairs, config.align, "align", split, lambda p: [{p.source_language, p.target_language}]
    )
    if config.align.control == "shuffled":
        pairs = shuffle_targets(pairs, config.seed)
    size = config.batch.pairs
    if split == "train" and len(pairs) < size:
        raise UserError(
            f"align.train holds {len(pairs)} pairs, fewer than batch.pairs={size}: a pair would be "
            "its own negative; lower batch.pairs or add pairs"
        )
    limit = min(config.batch.pair_max_length, tokenizer.model_max_length)
    rows = encode_pairs(pairs, tokenizer, limit)
    report = _report(rows, len(rows), [r.whole > _longer(r) for r in rows])
    buckets = _buckets(config, [_longer(r) for r in rows], size, "batch.pair_max_length")
    # Another order than the task's, though both start from the run's seed.
    order = _order(rows, config.align, config.seed + 1, split)
    return PairStream(rows, order, size, buckets, tokenizer.pad_token_id, report)


def _records(part: TaskConfig | AlignConfig, name: str, split: str) -> list[sources.Record]:
    named = getattr(part, split)
    if not named:
        raise UserError(f"{name}.{split} names no data; give files, globs, hf:NAME or tfds:NAME")
    return sources.read_all(named, part.columns)


def _keep(
    items: list[Any],
    part: TaskConfig | AlignConfig,
    name: str,
    split: str,
    sides: Callable[[Any], list[set[str]]],
) -> list[Any]:
    """Items in the languages wanted: one of the alternatives of `sides` lies within them."""
    wanted = set(part.languages)
    if not wanted:
        return items
    kept = [item for item in items if any(s <= wanted for s in sides(item))]
    # In training a name without rows is a slip of the pen; validation sets may hold fewer.
    matched = set().union(*(s for item in kept for s in sides(item))) if kept else set()
    missing = sorted(wanted - matched) if split == "train" else []
    if missing or not kept:
        present = sorted(set().union(*(s for item in items for s in sides(item))) - {""})
        raise UserError(
            f"{name}.languages: no row of {name}.{split} is in "
            f"{', '.join(missing or sorted(wanted))}; present: "
            f"{', '.join(present) or 'none, the rows name no language'}"
        )
    return kept


def _direction(language: str) -> list[set[str]]:
    """The direction 'de-en' is wanted by its own name or by both its sides."""
    return [{language}, set(split_direction(language))]


def _longer(pair: EncodedPair) -> int:
    return max(len(pair.source), len(pair.target))


def _report(rows: Sequence[Row], read: int, cut: Sequence[bool]) -> Report:
    languages = Counter(row.language for row in rows)
    return Report(read, len(rows), sum(cut), read - len(rows), dict(sorted(languages.items())))


def _order(
    rows: Sequence[Row], part: TaskConfig | AlignConfig, seed: int, split: str
) -> Sequential | Shuffled:
    if split != "train":
        return Sequential(len(rows))
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        # Proportional sampling is plain shuffling: each row once an epoch.
        groups.setdefault("" if part.sampling == "proportional" else row.language, []).append(i)
    counts = {name: len(group) for name, group in groups.items()}
    weights = mixture(counts, part.sampling, part.sampling_temperature)
    return Shuffled([np.array(g) for g in groups.values()], list(weights.values()), seed)


def _slot_length(lengths: Sequence[int], limit: int, size: int) -> int:
    """The maximum length, or less where all rows together do not fill one batch of it."""
    return cover(min(limit, max(max(lengths), -(-sum(lengths) // size))), 8)


def _buckets(config: Config, lengths: Sequence[int], size: int, key: str) -> tuple[int, ...]:
    buckets = tuple(sorted(config.batch.buckets))
    if not buckets:
        return choose_buckets(lengths, size)
    if buckets[-1] < max(lengths):
        raise UserError(
            f"batch.buckets end at {buckets[-1]}, but the longest row has {max(lengths)} tokens; "
            f"add a bucket or set {key}={buckets[-1]}"
        )
    return buckets
