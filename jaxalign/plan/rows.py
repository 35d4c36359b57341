"""What a run's own rows make of its programs: batches of the usual and of the longest length.

rows, updates = read(config, ways=16)            # {'task': Rows, 'prompt': Prompts, ...}, 4498
rows['task'].shapes(4)                           # a TaskBatch of shapes, [4, ...]
rows['task'].longest.shapes(4)                   # the same of the longest length
rows['task'].counted                             # 0.97 of computed tokens count
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxalign.data.loader import Stream
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import UserError
from jaxalign.frozen.projection import Attached
from jaxalign.generate.shapes import Layout, lay_out, rung
from jaxalign.settings import Config
from jaxalign.train.phases import active_phases, facts_of
from jaxalign.train.phases.task import TASK
from jaxalign.train.setup import steps_of_epochs

Known = Mapping[str, Any]  # the name of a phase -> Rows; `prompt`, `token` -> Prompts
LOOKED = 256  # micro-batches whose tokens are counted


@dataclass(frozen=True)
class Rows:
    """The batches of one phase, in one of their lengths."""

    stream: Stream
    unit: str  # of its rows, for people
    length: int  # T, one of the stream's

    @classmethod
    def usual(cls, stream: Stream, unit: str) -> Rows:
        """Those of the length that is nearest to the mean."""
        any_ = cls(stream, unit, max(stream.lengths))
        mean = any_.mean() * any_.length
        return replace(any_, length=min(stream.lengths, key=lambda length: abs(length - mean)))

    @property
    def longest(self) -> Rows:
        """Those of the longest length, which must fit."""
        return replace(self, length=max(self.stream.lengths))

    def shapes(self, number: int) -> Any:
        """So many micro-batches, stacked."""
        blank = self.stream.blank(self.length, number)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), blank)

    @property
    def what(self) -> str:
        """`128 rows in 16 x 384`, end to end, or `128 x 160`, padded."""
        layout, size = self.stream.layout, self.stream.size
        if layout is None:
            return f"{size}{self.unit} x {self.length}"
        return f"{size}{self.unit or ' rows'} in {layout.ways} x {self.length}"

    def mean(self, together: int = 1) -> float:
        """Tokens of a mean micro-batch over those of one of this length; so many have one length.

        Args:
          together: micro-batches of an update that are padded to the longest of them.
        """
        computed = self._tokens[:, 1]
        groups = computed[: len(computed) // together * together].reshape(-1, together)
        layout, size = self.stream.layout, self.stream.size
        sequences = size * len(self.stream.sides) if layout is None else layout.ways
        return float(groups.max(axis=1).mean() / (sequences * self.length))

    @property
    def counted(self) -> float:
        """The share of computed tokens that count."""
        counted, computed = self._tokens.sum(axis=0)
        return float(counted / computed)

    @cached_property
    def _tokens(self) -> np.ndarray:
        """[n, 2]: of the first micro-batches, tokens that count and all that are computed."""
        return np.array([self.stream.tokens(index) for index in range(LOOKED)])


@dataclass(frozen=True)
class Prompts:
    """The prompts that answers are written to, and one batch of them."""

    layout: Layout
    number: int = 0  # of the batch; the longest is the first

    @classmethod
    def usual(cls, prompts: list[list[int]], config: Config, share: bool) -> Prompts:
        """The batch whose tokens are nearest to the mean; `share`: whether prompts can."""
        share &= config.generate.share_prefix == "auto"
        any_ = cls(lay_out(prompts, config.generate.batch, share))
        batches = [cls(any_.layout, number) for number in range(len(any_.layout.groups))]
        mean = any_.mean() * any_.tokens
        return min(batches, key=lambda batch: abs(batch.tokens - mean))

    @property
    def longest(self) -> Prompts:
        """The batch that must fit."""
        return replace(self, number=0)

    @property
    def size(self) -> int:
        """Places for prompts."""
        return rung(len(self.layout.groups[self.number]), self.layout.batch)

    @property
    def ahead(self) -> int:
        """First tokens that all prompts share and that are computed once."""
        return self._widths[0]

    @property
    def width(self) -> int:
        """Slots for the tokens of each that are not shared."""
        return self._widths[1]

    @property
    def _widths(self) -> tuple[int, int]:
        return self.layout.width(self.layout.groups[self.number])

    @property
    def tokens(self) -> int:
        """That the batch runs."""
        return self.size * self.width

    def mean(self) -> float:
        """Tokens of a mean batch over those of this one."""
        return self.layout.computed / len(self.layout.groups) / self.tokens

    @property
    def counted(self) -> float:
        """The share of computed tokens that count."""
        return self.layout.counted / self.layout.computed


def read(
    config: Config, ways: int, adapter: Attached | None = None
) -> tuple[dict[str, Rows | Prompts], int]:
    """The training rows of each phase that is on, and how many updates the run takes.

    Answers are planned to the prompts of the task's rows.

    Args:
      config: of the run.
      ways: shares of a batch's rows on different devices.
      adapter: the run's; one whose vectors depend on the prompt leaves nothing to share.

    Raises:
      UserError: no data is named, or rows or tokenizer cannot be read.
    """
    phases = {name: facts_of(config, name) for name in active_phases(config)}
    for name, facts in phases.items():
        if not facts.part(config).train:
            raise UserError(f"--data: {name}.train is empty; name its files, or leave --data out")
    try:
        tokenizer = load_tokenizer(config.model.path, config.model.revision)
    except UserError as error:
        raise UserError(
            f"--data needs the tokenizer of model.path, a folder or a hub model: {error}"
        ) from error
    streams = {name: facts.stream(config, tokenizer, ways=ways) for name, facts in phases.items()}
    updates = config.train.steps or steps_of_epochs(config, streams)
    found: dict[str, Rows | Prompts] = {
        name: Rows.usual(stream, phases[name].unit) for name, stream in streams.items()
    }
    if TASK.name in streams:
        asked = [row.tokens[: row.prompt].tolist() for row in streams[TASK.name].rows]
        share = not (adapter and adapter.by_input)
        prompts = Prompts.usual([prompt for prompt in asked if prompt], config, share)
        found |= {"prompt": prompts, "token": prompts}
    return found, updates
