"""What a step receives: NumPy batches of task rows, sentence pairs and rows of two prompts.

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
# What a token is, int8: padding; what the template writes; what the user says; the answer.
PADDING, TEMPLATE, TEXT, ANSWER = range(4)
ROLE_OF = {"prompt": TEXT, "answer": ANSWER}  # a pooling -> the tokens that it averages
# A pooling -> the tokens whose predictors it averages: each is one token before.
PREDICTED = {f"predicts_{name}": role for name, role in ROLE_OF.items()}
NO_LANGUAGE = -1  # of an empty place; else `languages.language_number`


class Side(NamedTuple):
    """One side of a batch, as the model runs over it."""

    tokens: Any  # int32 [B, T]
    real: Any  # [B, T]; 0 at padding
    segments: Any = None  # int32 [B, T]; None: a row is a sequence
    positions: Any = None  # int32 [B, T]; None: from 0
    answer_at: Any = None  # int32 [B, A]; where answers are predicted, if this side has any
    roles: Any = None  # int8 [B, T]; None: every real token is the user's text
    language: Any = None  # int32 [B] (task rows: [B, S]); `languages.language_number`


class Flat(NamedTuple):
    """A batch as the model runs over it where texts stand end to end (`data/flat.py`).

    A sequence is a device's share: the tokens that its texts have in common, each once, then what
    each has of its own. R texts of each side have a place in it, whether they are there or not.
    """

    tokens: np.ndarray  # int32 [W, T]; the first P are shared
    segments: np.ndarray  # int32 [W, T]; 0 for shared tokens and padding, else which text, from 1
    positions: np.ndarray  # int32 [W, T]; places in the texts
    sees: np.ndarray  # int32 [W, T]; the bits of the nodes of shared tokens that it sees
    nodes: np.ndarray  # int32 [W, P]; the bit of each shared token's node
    texts: np.ndarray  # int32 [W, sides·R]; the nodes of each text; 0 where it has or is none
    reach: np.ndarray  # int8 [W, C]; only C matters: no text has more tokens of its own
    # Pairs have none of these.
    roles: np.ndarray | None = None  # int8 [W, T]
    answer_at: np.ndarray | None = None  # int32 [W, A]; as of `TaskBatch`, in these sequences
    answers: np.ndarray | None = None  # int32 [W, A]; row by row, without gaps


class TaskBatch(NamedTuple):
    """Task rows, padded on the right; a NamedTuple, so JAX sees a pytree without our importing it.

    One leading axis M stands before B where several micro-batches are stacked. Where rows are laid
    end to end, `flat` is what the model runs over, and the other arrays have a row for each text.
    """

    tokens: np.ndarray  # int32 [B, T]; the pad id at padding
    segments: np.ndarray  # int32 [B, T]; 0 at padding, else which row of the sequence, from 1
    positions: np.ndarray  # int32 [B, T]; from 0 in each segment; padding counts on
    answer_at: np.ndarray  # int32 [B, A]; the position that predicts answers[b, a]
    answers: np.ndarray  # int32 [B, A]; token to predict, -100 for none
    rows: Any = None  # int32 [B, S]; the stream's row in each segment, -1 for none
    roles: Any = None  # int8 [B, T]
    language: Any = None  # int32 [B, S]; of each row
    flat: Flat | None = None
    prompt_language: Any = None  # int32 [B, S]; of a translation the source's
    answer_language: Any = None  # int32 [B, S]; of a translation the target's

    def sides(self) -> dict[str, Side]:
        """`text`, the only one."""
        seen = self.flat or self
        return {
            "text": Side(
                self.tokens,
                self.segments != 0,
                self.segments,
                self.positions,
                seen.answer_at,
                self.roles,
                self.language,
            )
        }


class PairBatch(NamedTuple):
    """Sentence pairs, padded on the right; row b of both sides says the same."""

    source: np.ndarray  # int32 [B, T]
    source_mask: np.ndarray  # int32 [B, T]; 1 at real tokens
    target: np.ndarray  # int32 [B, T]
    target_mask: np.ndarray  # int32 [B, T]
    rows: Any = None  # int32 [B]; the stream's row, -1 where a place is empty
    source_language: Any = None  # int32 [B]
    target_language: Any = None  # int32 [B]
    flat: Flat | None = None  # sources, then targets

    def sides(self) -> dict[str, Side]:
        """`source` and `target`, of one length."""
        return {
            "source": Side(self.source, self.source_mask, language=self.source_language),
            "target": Side(self.target, self.target_mask, language=self.target_language),
        }


class PromptBatch(NamedTuple):
    """One answer behind two prompts, padded on the right; row b of both sides has the same answer.

    Such rows are always padded, each in a sequence of its own.
    """

    student: np.ndarray  # int32 [B, T]
    student_roles: np.ndarray  # int8 [B, T]; 0 at padding
    student_at: np.ndarray  # int32 [B, A]; the position that predicts answers[b, a]
    teacher: np.ndarray  # int32 [B, T]
    teacher_roles: np.ndarray  # int8 [B, T]
    teacher_at: np.ndarray  # int32 [B, A]
    answers: np.ndarray  # int32 [B, A]; token to predict, -100 for none
    rows: Any = None  # int32 [B]; the stream's row, -1 where a place is empty
    student_language: Any = None  # int32 [B]
    teacher_language: Any = None  # int32 [B]
    flat: Flat | None = None  # never end to end

    def sides(self) -> dict[str, Side]:
        """`student` and `teacher`, of one length."""

        def side(tokens: Any, roles: Any, at: Any, language: Any) -> Side:
            return Side(tokens, roles != PADDING, answer_at=at, roles=roles, language=language)

        return {
            "student": side(
                self.student, self.student_roles, self.student_at, self.student_language
            ),
            "teacher": side(
                self.teacher, self.teacher_roles, self.teacher_at, self.teacher_language
            ),
        }


@dataclass(frozen=True)
class Encoded:
    """One task row as tokens; what follows the first `prompt` tokens is the answer."""

    tokens: np.ndarray  # int32 [t]
    prompt: int  # without a loss, unless `everything` has one
    language: str = ""
    origin: str = ""  # file:line
    whole: int = 0  # tokens before the cut to the maximum length
    text: tuple[int, int] = (0, 0)  # the user's text among the tokens: first, behind the last
    everything: bool = False  # whether the prompt is predicted, too
    languages: tuple[str, str] = ("", "")  # of the prompt, of the answer

    @property
    def first(self) -> int:
        """The first position with a target; position 0 has nothing before it to predict it."""
        return 1 if self.everything else max(self.prompt, 1)

    @property
    def answered(self) -> bool:
        """Whether any token of the answer is there to be predicted."""
        return len(self.tokens) > max(self.prompt, 1)

    @property
    def roles(self) -> np.ndarray:
        """int8 [t]: what each token is."""
        return roles_of(len(self.tokens), self.text, self.prompt)

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
    languages: tuple[str, str] = ("", "")  # of the source, of the target

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of both."""
        return self.source, self.target


@dataclass(frozen=True)
class EncodedPrompts:
    """One answer behind two prompts, as tokens; both sides end with the answer's."""

    student: np.ndarray  # int32 [t]
    teacher: np.ndarray  # int32 [s]
    targets: int  # how many tokens are the answer's, at the end of both
    language: str = ""  # "de-en"
    origin: str = ""
    whole: int = 0  # the longer side before the cut
    text: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))  # as of `Encoded`
    languages: tuple[str, str] = ("", "")  # of the student's prompt, of the teacher's

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of both."""
        return self.student, self.teacher


def roles_of(length: int, text: tuple[int, int], prompt: int) -> np.ndarray:
    """int8 [length]: what each token of a row is."""
    roles = np.full(length, TEMPLATE, np.int8)
    roles[slice(*text)] = TEXT
    roles[prompt:] = ANSWER
    return roles


def collate_tasks(
    sequences: Sequence[Sequence[Encoded]],
    length: int,
    capacity: int,
    pad_id: int,
    numbers: np.ndarray | None = None,
    languages: np.ndarray | None = None,  # int32 [3, B, S]
) -> TaskBatch:
    """Fills one batch; each sequence holds one row, several (packed) or none (an empty row).

    Args:
        sequences: B sequences of rows; the tokens of each must fit into `length`, their targets
            into `capacity`.
        length: T, the padded length.
        capacity: A, the number of target places.
        pad_id: token at padding.
        numbers: `rows` of the batch.
        languages: `language`, `prompt_language` and `answer_language` of the batch.

    Returns:
        A TaskBatch of B rows.
    """
    size = len(sequences)
    tokens = np.full((size, length), pad_id, np.int32)
    roles = np.zeros((size, length), np.int8)
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
            roles[b, start:end] = row.roles
            positions[b, start:] = np.arange(length - start)
            if targets:
                places = slice(filled, filled + targets)
                answers[b, places] = row.tokens[row.first :]
                # The token at position i is predicted by the state at i - 1.
                answer_at[b, places] = np.arange(start + row.first - 1, end - 1)
            start, filled = end, filled + targets
    language, *spoken = (None,) * 3 if languages is None else languages
    arrays = tokens, segments, positions, answer_at, answers, numbers, roles, language
    return TaskBatch(*arrays, None, *spoken)


def collate_pairs(
    pairs: Sequence[EncodedPair | None],
    length: int,
    pad_id: int,
    numbers: np.ndarray | None = None,
    languages: np.ndarray | None = None,  # int32 [2, B]
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
    source, target = (None, None) if languages is None else languages
    return PairBatch(ids[0], mask[0], ids[1], mask[1], numbers, source, target)


def collate_prompts(
    rows: Sequence[EncodedPrompts | None],
    length: int,
    capacity: int,
    pad_id: int,
    numbers: np.ndarray | None = None,
    languages: np.ndarray | None = None,  # int32 [2, B]
) -> PromptBatch:
    """Fills one batch of B rows, both sides padded to the same T; None leaves an empty row.

    Args:
        capacity: A, the number of target places; the rest as of `collate_tasks`.
    """
    size = len(rows)
    tokens = np.full((2, size, length), pad_id, np.int32)
    roles = np.zeros((2, size, length), np.int8)
    at = np.zeros((2, size, capacity), np.int32)
    answers = np.full((size, capacity), NO_TARGET, np.int32)
    for b, row in enumerate(rows):
        if row is None:
            continue
        answers[b, : row.targets] = row.student[len(row.student) - row.targets :]
        for side, (own, text) in enumerate(zip(row.sides, row.text, strict=True)):
            end, first = len(own), len(own) - row.targets
            tokens[side, b, :end] = own
            roles[side, b, :end] = roles_of(end, text, first)
            at[side, b, : row.targets] = np.arange(first, end) - 1
    student, teacher = (None, None) if languages is None else languages
    arrays = tokens[0], roles[0], at[0], tokens[1], roles[1], at[1], answers
    return PromptBatch(*arrays, numbers, student, teacher)


def mixed(batch: Any) -> bool:
    """Whether a row of the arrays holds several of the stream."""
    rows = batch.rows
    return batch.flat is None and rows is not None and rows.ndim > 1 and rows.shape[-1] > 1


def by_token(batch: Any) -> Any:
    """The batch with its answers as the sequences of the model hold them, whosever they are."""
    if batch.flat is None or batch.flat.answers is None:
        return batch
    return batch._replace(answers=batch.flat.answers, answer_at=None)


def cover(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple
