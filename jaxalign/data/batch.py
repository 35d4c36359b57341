"""What a step receives: NumPy batches of task rows and of sentence pairs, and how rows fill them.

Only the positions that predict an answer token are listed (`answer_at`, `answers`), so that the
vocabulary projection runs on them alone; everything else of a batch has the padded length T.

    rows = [Encoded(tokens=np.array([5, 6, 7, 8]), prompt=2)]      # 7 and 8 are the answer
    batch = collate_tasks([rows], length=8, capacity=4, pad_id=0)  # one sequence holding one row
    batch.answers                                                  # [[7, 8, -100, -100]]
    batch.answer_at                                                # [[1, 2, 0, 0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NO_TARGET = -100  # the label PyTorch ignores; kept so that both worlds read the same


class TaskBatch(NamedTuple):
    """Task rows, padded on the right; a NamedTuple, so JAX sees a pytree without our importing it.

    One leading axis M stands before B where several micro-batches are stacked.
    """

    tokens: np.ndarray  # int32 [B, T]; the pad id at padding
    segments: np.ndarray  # int32 [B, T]; 0 at padding, else which row of the sequence, from 1
    positions: np.ndarray  # int32 [B, T]; from 0 in each segment; padding counts on
    answer_at: np.ndarray  # int32 [B, A]; the position that predicts answers[b, a]
    answers: np.ndarray  # int32 [B, A]; token to predict, -100 for none
    rows: Any = None  # int32 [B, S]; the stream's row in each segment, -1 for none


class PairBatch(NamedTuple):
    """Sentence pairs, padded on the right; row b of both sides says the same."""

    source: np.ndarray  # int32 [B, T]
    source_mask: np.ndarray  # int32 [B, T]; 1 at real tokens
    target: np.ndarray  # int32 [B, T]
    target_mask: np.ndarray  # int32 [B, T]
    rows: Any = None  # int32 [B]; the stream's row, -1 where a place is empty


@dataclass(frozen=True)
class Encoded:
    """One task row as tokens; what follows the first `prompt` tokens is the answer."""

    tokens: np.ndarray  # int32 [t]
    prompt: int  # tokens without a loss
    language: str = ""
    origin: str = ""  # file:line
    whole: int = 0  # tokens before the cut to the maximum length

    @property
    def first(self) -> int:
        """The first position with a target; position 0 has nothing before it to predict it."""
        return max(self.prompt, 1)

    @property
    def targets(self) -> int:
        """How many tokens are predicted."""
        return max(len(self.tokens) - self.first, 0)


@dataclass(frozen=True)
class EncodedPair:
    """One sentence pair as tokens."""

    source: np.ndarray  # int32 [t]
    target: np.ndarray  # int32 [s]
    language: str = ""  # "de-en"
    origin: str = ""
    whole: int = 0  # the longer side before the cut


def collate_tasks(
    sequences: Sequence[Sequence[Encoded]],
    length: int,
    capacity: int,
    pad_id: int,
    numbers: np.ndarray | None = None,
) -> TaskBatch:
    """Fills one batch; each sequence holds one row, several (packed) or none (an empty row).

    Args:
        sequences: B sequences of rows; the tokens of each must fit into `length`, their targets
            into `capacity`.
        length: T, the padded length.
        capacity: A, the number of target places.
        pad_id: token at padding.
        numbers: `rows` of the batch.

    Returns:
        A TaskBatch of B rows.
    """
    size = len(sequences)
    tokens = np.full((size, length), pad_id, np.int32)
    segments = np.zeros((size, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (size, 1))
    answer_at = np.zeros((size, capacity), np.int32)
    answers = np.full((size, capacity), NO_TARGET, np.int32)
    for b, rows in enumerate(sequences):
        start = filled = 0
        for number, row in enumerate(rows, start=1):
            end, targets = start + len(row.tokens), row.targets
            tokens[b, start:end] = row.tokens
            segments[b, start:end] = number
            positions[b, start:] = np.arange(length - start)
            if targets:
                places = slice(filled, filled + targets)
                answers[b, places] = row.tokens[row.first :]
                # The token at position i is predicted by the state at i - 1.
                answer_at[b, places] = np.arange(start + row.first - 1, end - 1)
            start, filled = end, filled + targets
    return TaskBatch(tokens, segments, positions, answer_at, answers, numbers)


def collate_pairs(
    pairs: Sequence[EncodedPair | None],
    length: int,
    pad_id: int,
    numbers: np.ndarray | None = None,
) -> PairBatch:
    """Fills one batch of B pairs, both sides padded to the same T; None leaves an empty row."""
    size = len(pairs)
    ids = np.full((2, size, length), pad_id, np.int32)
    mask = np.zeros((2, size, length), np.int32)
    for b, pair in enumerate(pairs):
        if pair is None:
            continue
        for side, row in enumerate((pair.source, pair.target)):
            ids[side, b, : len(row)] = row
            mask[side, b, : len(row)] = 1
    return PairBatch(ids[0], mask[0], ids[1], mask[1], numbers)


def cover(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple
