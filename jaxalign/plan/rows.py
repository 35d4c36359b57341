"""What a run's own rows make of its programs: the layout of each phase, its longest and mean batch.

rows, updates = read(config, ways=16)            # {'task': Rows, 'align': Rows}, 4498
rows['task'].shapes(4)                           # a TaskBatch of shapes, [4, ...]
rows['task'].counted                             # 0.97 of computed tokens count
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxalign.data.loader import Stream
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import UserError
from jaxalign.settings import Config
from jaxalign.train.phases import PHASES, active_phases
from jaxalign.train.setup import steps_of_epochs

LOOKED = 256  # micro-batches whose tokens are counted


@dataclass(frozen=True)
class Rows:
    """The batches of one phase."""

    stream: Stream
    unit: str  # of its rows, for people

    @property
    def longest(self) -> int:
        """Tokens of a sequence in the longest batch: what is compiled, as it must fit."""
        return max(self.stream.lengths)

    def shapes(self, number: int) -> Any:
        """So many of the longest micro-batches, stacked."""
        blank = self.stream.blank(self.longest, number)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), blank)

    @property
    def what(self) -> str:
        """`128 rows in 16 x 384`, end to end, or `128 x 160`, padded."""
        layout, size = self.stream.layout, self.stream.size
        if layout is None:
            return f"{size}{self.unit} x {self.longest}"
        return f"{size}{self.unit or ' rows'} in {layout.ways} x {self.longest}"

    def mean(self, together: int = 1) -> float:
        """Tokens of a mean micro-batch over those of the longest; `together` have one length."""
        computed = self._tokens[:, 1]
        groups = computed[: len(computed) // together * together].reshape(-1, together)
        layout, size = self.stream.layout, self.stream.size
        sequences = size * self.stream.sides if layout is None else layout.ways
        return float(groups.max(axis=1).mean() / (sequences * self.longest))

    @property
    def counted(self) -> float:
        """The share of computed tokens that count."""
        counted, computed = self._tokens.sum(axis=0)
        return float(counted / computed)

    @cached_property
    def _tokens(self) -> np.ndarray:
        """[n, 2]: of the first micro-batches, tokens that count and all that are computed."""
        return np.array([self.stream.tokens(index) for index in range(LOOKED)])


def read(config: Config, ways: int) -> tuple[dict[str, Rows], int]:
    """The training rows of each phase that is on, and how many updates the run takes.

    Args:
      config: of the run.
      ways: shares of a batch's rows on different devices.

    Raises:
      UserError: no data is named, or rows or tokenizer cannot be read.
    """
    active = active_phases(config)
    for name in active:
        if not PHASES[name].part(config).train:
            raise UserError(f"--data: {name}.train is empty; name its files, or leave --data out")
    try:
        tokenizer = load_tokenizer(config.model.path, config.model.revision)
    except UserError as error:
        raise UserError(
            f"--data needs the tokenizer of model.path, a folder or a hub model: {error}"
        ) from error
    streams = {name: PHASES[name].stream(config, tokenizer, ways=ways) for name in active}
    updates = config.train.steps or steps_of_epochs(config, streams)
    return {name: Rows(stream, PHASES[name].unit) for name, stream in streams.items()}, updates
