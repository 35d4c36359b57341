"""Weights on a mesh, and how they are asked: what writes an evaluation's answers.

for rows, answers in system.chunks(prompts, decoding, batch_size=32): ...
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.data.template import Prompts
from jaxalign.generate.choices import weigh_chunks
from jaxalign.generate.decoding import Decoding
from jaxalign.generate.run import answer_chunks
from jaxalign.model.decoder import Decoder


@dataclass(frozen=True)
class System:
    """A base with or without an adapter, ready to write."""

    decoder: Decoder
    params: Any
    lora: Any
    mesh: Mesh
    stops: tuple[int, ...]
    prompts: Prompts  # how it is asked
    share_prefix: bool = True  # whether what all prompts share is computed once

    def write(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
    ) -> list[list[int]]:
        """New token ids of each prompt; see `generate.run.generate`."""
        answers: list[list[int]] = [[] for _ in prompts]
        for rows, found in self.chunks(prompts, decoding, batch_size):
            for row, ids in zip(rows, found, strict=True):
                answers[row] = ids
        return answers

    def chunks(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        batch_size: int,
        rows: Collection[int] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Row numbers and answers, batch by batch; see `answer_chunks`."""
        with jax.set_mesh(self.mesh):
            yield from answer_chunks(
                self.decoder,
                self.params,
                self.lora,
                prompts,
                decoding,
                stop_ids=self.stops,
                batch_size=batch_size,
                numbers=numbers,
                share_prefix=self.share_prefix,
                rows=rows,
            )

    def weigh(
        self,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sequence[Sequence[int]]],
        how: str,
        batch_size: int,
        rows: Collection[int] | None = None,
    ) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Row numbers and log-probabilities of choices; see `weigh_chunks`."""
        with jax.set_mesh(self.mesh):
            yield from weigh_chunks(
                self.decoder,
                self.params,
                self.lora,
                prompts,
                choices,
                how,
                batch_size=batch_size,
                share_prefix=self.share_prefix,
                rows=rows,
            )
