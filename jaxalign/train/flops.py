"""The least work that training an adapter on a frozen base can be: what MFU is a share of.

least = training_flops(spec, tokens=16384, length=512, adapter=20_971_520)
least / seconds / (chips * peak)                 # model FLOPs utilisation
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import parameter_count


@dataclass(frozen=True)
class Work:
    """What one phase of an update has to do."""

    tokens: int  # that are computed, padding too
    flops: float  # least, see `training_flops`
    counted: int = 0  # tokens that count: of sides that a pass reads; see `data.loader.Counted`


def training_flops(
    spec: ModelSpec,
    tokens: int,
    length: int,
    blocks: int | None = None,
    adapter: int = 0,
    answers: int | None = None,
    passes: str = "both",
    whole: bool = False,
) -> float:
    """FLOPs of forward and backward pass, nothing computed twice.

    A frozen weight costs 4 a token: one product on the way up, one on the way down, none for a
    gradient of its own. A trained one costs 6. Causal attention multiplies every query with half
    of the keys, twice on the way up and four times on the way down.

    Args:
      tokens: in all rows, padding included.
      length: of a row.
      blocks: only so many lower blocks, without the head; None: the whole model.
      adapter: trained parameters in the blocks that run.
      answers: tokens that reach the head; None: all.
      passes: `both`, or `forward` alone.
      whole: every weight is trained.
    """
    frozen, trained = {"both": (4, 6), "forward": (2, 2)}[passes]
    frozen = trained if whole else frozen
    head = spec.vocab * spec.dim
    inner = (parameter_count(spec) - head * (1 if spec.tied else 2)) / spec.layers
    depth = spec.layers if blocks is None else blocks
    attention = depth * spec.heads * spec.head_dim * length
    heads = 0 if blocks is not None else (tokens if answers is None else answers)
    block = frozen * inner * depth + trained * (attention + adapter)
    return tokens * block + frozen * head * heads
