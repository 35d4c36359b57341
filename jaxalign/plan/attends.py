"""What the tokens of a program attend to, and the scores that this keeps in memory.

A kernel never forms the scores of a layer. Where none takes a program's rows on a chip, the
reference forms one for each head, token and key that the token may see, in float32.

    looks = of_batch(plan, 'task', batch)
    looks.scores(plan, CHIPS['h100'])                # bytes of one array of them, on one chip
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh

from jaxalign.chips import Chip
from jaxalign.model import splash
from jaxalign.model.attention import cut_of, kernel_of
from jaxalign.train.design import Design
from jaxalign.train.phases import facts_of
from jaxalign.train.rules import RULES


@dataclass(frozen=True)
class Attends:
    """The largest pass of a program, in one layer.

    Attributes:
      rows: B, sequences.
      length: T of each.
      keys: with which the reference forms scores of each token, of its own sequence.
      ahead: more of them, in front of all.
      told: whether a kernel can be told who sees whom.
      backend: as of `attention.attend`.
    """

    rows: float
    length: int
    keys: int
    ahead: int = 0
    told: bool = True
    backend: str = "auto"

    def scores(self, plan: Design, chip: Chip) -> float:
        """Bytes of one chip in one array of scores; 0 where a kernel takes them.

        Raises:
          UserError: a kernel was asked for by name that cannot.
        """
        if self._by_kernel(plan, chip):
            return 0.0
        shape = plan.mesh.shape
        heads = plan.spec.heads / shape["tensor"]
        ways = shape["data"] * shape["fsdp"] * shape["seq"]
        return 4 * self.rows * self.length / ways * heads * (self.keys + self.ahead)

    def _by_kernel(self, plan: Design, chip: Chip) -> bool:
        if self.ahead or not self.told:
            return False
        spec, dtype = plan.spec, jnp.dtype(plan.config.model.dtype)
        q = jax.ShapeDtypeStruct((int(self.rows), self.length, spec.heads, spec.head_dim), dtype)
        with use_abstract_mesh(plan.mesh.abstract_mesh):
            kernel = kernel_of(q, self.backend, spec.attn_soft_cap, chip.platform, chip.capability)
        return kernel is not None


def of_batch(plan: Design, phase: str, batch: Any, forward: bool = False) -> Attends:
    """Of a micro-batch (stacked or not, arrays or their shapes); `forward`: of an evaluation."""
    built, flat = plan.phases[phase], batch.flat
    rule, prefix, vectors = RULES[built.rule], _prefix(plan), plan.vectors
    laid = flat or next(iter(batch.sides().values()))
    *_, rows, length = laid.tokens.shape
    length += vectors
    way, ahead = None, prefix
    if flat is not None:
        way = cut_of(length, flat.reach.shape[-1])
        ahead += vectors + flat.nodes.shape[-1]
    elif facts_of(plan.config, phase).packed(plan.config):
        ahead += vectors  # which the texts of a sequence have in common
    chunk, back = way or (length, 0)
    return Attends(
        rows=rows
        * max(one.ways(flat is not None) for one in built.passes)
        * (1.0 if forward else rule.share),
        length=length,
        keys=chunk * (back + 1),
        ahead=ahead,
        told=way is None or flat.reach.shape[-1] >= splash.LEAST,
        backend="reference" if rule.twice else plan.config.model.attention,
    )


def of_prompts(plan: Design, rows: int, width: int, ahead: int) -> Attends:
    """Of prompts that go on from `ahead` slots that all of them share."""
    width += 0 if ahead else plan.vectors
    asked = plan.config.model.attention
    return Attends(
        rows=rows,
        length=width,
        keys=width,
        ahead=ahead + _prefix(plan),
        backend="reference" if asked == "reference" else "auto",  # as `Decoder.extend` has it
    )


def _prefix(plan: Design) -> int:
    return plan.adapter.prefix_length if plan.adapter else 0
