"""Alignment of two prompts: a student and a teacher, of one answer, through the whole model.

It is the phase `align` where `align.rows=prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxalign.data.batch import PromptBatch
from jaxalign.data.loader import Stream
from jaxalign.data.streams import prompt_stream
from jaxalign.objectives import Needs
from jaxalign.settings import Config
from jaxalign.train.phases.align import unread
from jaxalign.train.phases.facts import Facts


class Prompts(Facts):
    """See the module."""

    name, number = "align", 1
    sides = answered = ("student", "teacher")
    rows_key, length_key = "batch.pairs", "batch.max_length"
    unit = " rows of two prompts"

    def stream(self, config: Config, tokenizer: Any, split: str = "train", ways: int = 1) -> Stream:
        """Rows of two prompts."""
        return prompt_stream(config, tokenizer, split, ways)

    def batch(self, ids: Any) -> PromptBatch:
        """Unread: row numbers; languages where an objective asks for them."""
        return PromptBatch(*[ids] * 7)

    def needs(self, config: Config) -> dict[str, Needs]:
        """The states that predict the student's answer."""
        return {"student": Needs(answers="trained")}

    def offers(self, config: Config) -> dict[str, Any]:
        """The aligned layer, for terms that look at it behind both prompts."""
        return {"layer": config.align.layer}

    def unread(self, config: Config) -> Iterator[str]:
        """Settings of sentence pairs; the temperature of `distil` is one of its options."""
        return unread(config, self.terms(config))


PROMPTS = Prompts()
