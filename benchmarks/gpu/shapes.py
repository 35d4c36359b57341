"""What is measured: Llama 3 8B's shape, the updates, and how much work each of them is at least."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from part import REPO

if TYPE_CHECKING:
    from jaxalign.model.spec import ModelSpec

LLAMA = "meta-llama/Meta-Llama-3-8B"
LARGE = "meta-llama/Meta-Llama-3-70B"


class Work(NamedTuple):
    """One update: micro-batches of rows (or pairs) of so many tokens, and the rank of the LoRA."""

    name: str
    phase: str
    micro_batches: int
    rows: int
    length: int
    rank: int = 8

    @property
    def tokens(self) -> int:
        """Of one update, both sides of a pair."""
        sides = 2 if self.phase == "align" else 1
        return self.micro_batches * self.rows * self.length * sides


# Most valuable first. A task micro-batch has 8,192 tokens; all but the first of each row are
# trained. More tokens fill the memory, not the GPU. The first is the shape of published figures.
ANCHOR = Work("task 4 x 4,096, r 16", "task", 2, 2, 4096, 16)
TASK = Work("task 16 x 2,048", "task", 4, 4, 2048)
ALIGN = Work("align 128 pairs x 128", "align", 1, 128, 128)
SHORT = Work("task 32 x 512", "task", 2, 16, 512)
WORK = (ANCHOR, TASK, SHORT, ALIGN, Work("task 4 x 4,096", "task", 2, 2, 4096))


def shrunk(work: Work) -> Work:
    """The same for a rehearsal."""
    return work._replace(rows=min(work.rows, 4), length=max(4, work.length // 128))


def hf_config(name: str, rehearse: bool = False) -> dict[str, Any]:
    """A model's config.json, or a tiny model of the same family."""
    import yaml

    known = yaml.safe_load((REPO / "jaxalign" / "plan" / "models.yaml").read_text("utf-8"))
    tiny = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2,
    }  # fmt: skip
    return known[name] | (tiny if rehearse else {})


def spec_of(config: dict[str, Any], layers: int | None = None) -> ModelSpec:
    """The facts in a config.json, perhaps with fewer layers."""
    from jaxalign.model.spec import ModelSpec

    spec = ModelSpec.from_hf(config)
    return dataclasses.replace(spec, layers=layers) if layers else spec


def least_flops(spec: ModelSpec, work: Work) -> float:
    """FLOPs of one update, nothing computed twice: what MFU is a share of."""
    from jaxalign.train.flops import training_flops

    blocks = spec.layers // 2 if work.phase == "align" else None
    per_block = work.rank * _fans(spec)
    count = partial(training_flops, spec, work.tokens, work.length, blocks)
    return count(per_block * (blocks or spec.layers))


def _fans(spec: ModelSpec) -> int:
    """Inputs plus outputs of the seven projections of a block."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return 2 * (spec.dim + queries) + 2 * (spec.dim + keys) + 3 * (spec.dim + spec.ffn)
