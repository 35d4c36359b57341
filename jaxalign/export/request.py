"""What an export is asked for: the options of `jaxalign export`.

Request('runs/own', format='merged', dtype='bfloat16', verify=True)
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxalign.arguments import option, word


@dataclass(frozen=True)
class Request:
    """What is exported, and as what."""

    source: str = word("output of a training, PEFT folder or hub name", "RUN", path=True)
    format: str = option(
        "peft",
        "what to write: an adapter, a whole model, or a tree for JAX",
        choices=("peft", "merged", "orbax"),
    )
    step: str = option(
        "",
        "which checkpoint: a number, best or latest (default: the best, if there is one)",
        metavar="N",
    )
    out: str = option("", "folder to write (default RUN/export/FORMAT)", path=True)
    base: str = option("", "where the base is now, if it has moved", metavar="MODEL", path=True)
    dtype: str = option(
        "", "number format of a model: float32, float16 or bfloat16 (default: the base's)"
    )
    max_shard_size: str = option(
        "", "largest file of weights of a merged model (default 5GB)", metavar="SIZE"
    )
    verify: bool = option(False, "read the result back and compare its logits")
    push: str = option("", "upload to this hub repository", metavar="NAME")
    private: bool = option(False, "make that repository private")
    force: bool = option(False, "replace what is in --out")

    @property
    def existing(self) -> str:
        """What to do where `out` is not empty: refuse | replace."""
        return "replace" if self.force else "refuse"
