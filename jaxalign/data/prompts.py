"""One answer behind two prompts: what a distillation compares.

Task rows of one item, which have the same `id`, ask for the same in several languages. Those in the
pivot language are the teacher's prompts; every other row becomes a student's with its teacher.
Without a pivot student and teacher read the same prompt. The answer must not depend on the
language: an intent does not, slots that copy words do.

    rows = two_prompts(records, 'intent', pivot='en')     # [Prompts(student, teacher), ...]
    rows[0].language                                      # 'de-en'
    encode_both(rows, tokenizer, 'chat', None, 2048)      # [EncodedPrompts(...), ...]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.data import tasks
from jaxalign.data.batch import EncodedPrompts, PromptBatch, collate_prompts
from jaxalign.data.chat import encode_examples
from jaxalign.data.example import Example
from jaxalign.data.languages import direction, split_direction
from jaxalign.data.loader import Stream, capacities_of, longer, numbers_of
from jaxalign.data.sampling import Slot
from jaxalign.data.sources import Record
from jaxalign.data.transforms.parallel import check_known, item_of, second
from jaxalign.errors import UserError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """Two examples with one answer."""

    student: Example
    teacher: Example
    languages: tuple[str, str]  # of the student's prompt, of the teacher's

    @property
    def language(self) -> str:
        """'de-en'; '' where the rows name no languages."""
        return direction(self.languages)


def examples_of(row: Any) -> tuple[Example, ...]:
    """The examples of which a row consists: an example itself, two prompts; of a pair none."""
    if isinstance(row, Prompts):
        return row.student, row.teacher
    return (row,) if isinstance(row, Example) else ()


def two_prompts(records: Sequence[Record], kind: str, pivot: str) -> list[Prompts]:
    """A row for each record whose language is not the pivot; for each one where there is no pivot.

    Args:
        records: task rows of this kind (`task.kind`), with an `id` and a language.
        kind: a name of `tasks.TASKS`.
        pivot: the language of the teacher's prompts; '': each row's own prompt.

    Raises:
        UserError: a row without an id or a language, two rows of one item whose answers differ or
            whose language is the same, an item without the pivot, no other language.
    """
    examples = [tasks.render(kind, record) for record in records]
    directed = tasks.TASKS[kind].directed
    spoken = [split_direction(e.language)[0] if directed else e.language for e in examples]
    if not pivot:
        return [Prompts(e, e, (name, name)) for e, name in zip(examples, spoken, strict=True)]
    known: dict[str, dict[str, Example]] = {}
    for record, example, name in zip(records, examples, spoken, strict=True):
        item = item_of(record)
        rows = known.setdefault(item, {})
        _check(example, name, item, rows)
        rows[name] = example
    try:
        check_known([pivot], sorted(set(spoken)))
    except UserError as error:
        raise UserError(f"align.pivot: {error}") from error
    found = []
    for record, example, name in zip(records, examples, spoken, strict=True):
        item = item_of(record)
        if name == pivot:
            continue
        if pivot not in known[item]:
            raise UserError(
                f"{record.origin}: no row in {pivot!r} has the id {brief(item)}, so there is no "
                "prompt for the teacher; add it, or remove this row"
            )
        found.append(Prompts(example, known[item][pivot], (name, pivot)))
    if not found:
        raise UserError(
            f"align.pivot: all rows are in {pivot!r}, so there is no prompt for the student; add "
            "rows of other languages, or set align.pivot='' for one prompt of both"
        )
    return found


def _check(example: Example, language: str, item: str, rows: dict[str, Example]) -> None:
    """Whether a row goes with those of its item before it."""
    if not language:
        raise UserError(f"{example.origin}: this row names no language in 'lang'")
    if language in rows:
        raise second(example.origin, item, language, rows[language].origin)
    other = next(iter(rows.values()), example)
    if example.answer != other.answer:
        raise UserError(
            f"{example.origin}: the answer {brief(example.answer)} is not that of {other.origin}, "
            f"{brief(other.answer)}, which has the same id {brief(item)}, but both prompts must "
            "have the same answer; correct or remove one of them, or use a task.kind whose answers "
            "do not depend on the language"
        )


def encode_both(
    rows: Sequence[Prompts],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    system: str | None,
    max_length: int,
) -> list[EncodedPrompts]:
    """Both prompts with their answer as tokens, cut on the right to `max_length`.

    Where a cut takes tokens of the answer from one side, it takes them from the other as well.

    Returns:
        One row for each. A row whose answer was cut away whole has no target.

    Raises:
        UserError: the answer has other tokens after one prompt than after the other.
    """
    examples = [example for row in rows for example in (row.student, row.teacher)]
    encoded = encode_examples(examples, tokenizer, template, system, max_length)
    found = []
    for number, row in enumerate(rows):
        sides = encoded[2 * number : 2 * number + 2]
        # A prompt without any token leaves the answer's first one unpredicted, behind both.
        skipped = max(side.first - side.prompt for side in sides)
        answers = [side.tokens[side.prompt + skipped :] for side in sides]
        targets = min(map(len, answers))
        cut = any(side.whole > len(side.tokens) for side in sides)
        seen = [answer[:targets] if cut else answer for answer in answers]
        if not np.array_equal(seen[0], seen[1]):
            raise UserError(
                f"{row.student.origin}: the answer has other tokens after this prompt than after "
                f"the teacher's ({row.teacher.origin}), as its first letters merge with the "
                "prompt's last; end both prompts with a blank or a newline, or use another "
                "task.kind"
            )
        student, teacher = (
            side.tokens[: min(side.prompt + skipped, len(side.tokens)) + targets] for side in sides
        )
        found.append(
            EncodedPrompts(
                student,
                teacher,
                targets,
                row.language,
                row.student.origin,
                max(side.whole for side in sides),
                (sides[0].text, sides[1].text),
                row.languages,
            )
        )
    return found


class PromptStream(Stream[EncodedPrompts, PromptBatch]):
    """Rows of one answer behind two prompts; always padded."""

    sides = ("student", "teacher")

    @functools.cached_property
    def capacities(self) -> dict[int, int]:
        """As of `TaskStream`."""
        return capacities_of(self.buckets, [(longer(row), row.targets) for row in self.rows])

    def _spoken(self, row: EncodedPrompts) -> tuple[str, ...]:
        return row.languages

    def _contents(self, row: EncodedPrompts) -> tuple[bytes, ...]:
        sides = (tokens.tobytes() for tokens in row.sides)
        return *sides, str(row.targets).encode(), row.language.encode()

    def _length(self, slot: Slot) -> int:
        return max((longer(self.rows[i]) for i in slot), default=0)

    def _texts(self, row: EncodedPrompts) -> tuple[int, ...]:
        return len(row.student), len(row.teacher)

    def _collate(self, slots: Sequence[Slot], length: int) -> PromptBatch:
        rows = [self.rows[slot[0]] if slot else None for slot in slots]
        numbers, languages = numbers_of(slots, rows)
        capacity = self.capacities[length]
        return collate_prompts(rows, length, capacity, self._pad_id, numbers, languages)
