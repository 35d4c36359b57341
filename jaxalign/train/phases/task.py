"""The task: rows with an answer through the whole model, the answer's tokens are the loss."""

from __future__ import annotations

from typing import Any

from jaxalign.data.batch import TaskBatch
from jaxalign.data.loader import Stream
from jaxalign.data.streams import task_stream
from jaxalign.objectives import FINAL, TOKENS, Needs, Tap
from jaxalign.settings import Config
from jaxalign.train.phases.build import Inner
from jaxalign.train.phases.facts import Facts


class Task(Facts):
    """See the module."""

    name, number = "task", 0
    sides = answered = ("text",)
    rows_key, length_key = "batch.size", "batch.max_length"

    def stream(self, config: Config, tokenizer: Any, split: str = "train", ways: int = 1) -> Stream:
        """Task rows."""
        return task_stream(config, tokenizer, split, ways, self.block(config))

    def batch(self, ids: Any) -> TaskBatch:
        """Unread: row numbers; roles and languages where an objective asks for them."""
        read = dict.fromkeys(("roles", "prompt_language", "answer_language"), ids)
        return TaskBatch(*[ids] * 5)._replace(**read)

    def needs(self, config: Config) -> dict[str, Needs]:
        """The whole final states, the answers', and the aligned layer's, pooled."""
        taps = (Tap(FINAL, TOKENS), Tap(config.align.layer))
        return {"text": Needs(taps, answers="trained")}

    def offers(self, config: Config) -> dict[str, Any]:
        """The aligned layer, for terms that look at it in task rows."""
        return {"layer": config.align.layer}

    def shares(self, config: Config) -> int:
        """Two halves, where the rule learns from one and asks the other."""
        return 2 if config.task.halved else 1

    def inner(self, config: Config) -> Inner:
        """See `Facts`."""
        return Inner(config.task.inner_rate, config.task.inner_steps)

    def divided(self, config: Config, ways: int) -> dict[str, Any] | None:
        """A micro-batch is one language, or in halves: smaller ones are another run."""
        whole = config.task.halved or config.task.order == "grouped"
        return None if whole else super().divided(config, ways)

    def packed(self, config: Config) -> bool:
        """Rows in one sequence, none of which sees another."""
        return config.batch.pack == "segments"


TASK = Task()
