"""`jaxalign export` and `jaxalign import`: files in, files out, on the CPU of this host."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jaxalign.arguments import needed, option, word
from jaxalign.errors import UserError


@dataclass(frozen=True)
class Export:
    """What is exported, and as what."""

    source: str = word("output of a training, PEFT folder or hub name", "RUN")
    format: str = option(
        "peft", "adapter, whole model, or tree for JAX", choices=("peft", "merged", "orbax")
    )
    step: str = option(
        "", "a number, best or latest (default: the best, if there is one)", metavar="N"
    )
    out: str = option("", "folder to write (default RUN/export/FORMAT)")
    base: str = option("", "where the base is now", metavar="MODEL")
    dtype: str = option("", "of a model: float32, float16 or bfloat16 (default: the base's)")
    max_shard_size: str = option("5GB", "of one file of weights", metavar="SIZE")
    verify: bool = option(False, "read it back, compare the logits")
    push: str = option("", "upload to this hub repository", metavar="NAME")
    private: bool = option(False, "make that repository private")
    force: bool = option(False, "replace what is in --out")

    @property
    def existing(self) -> str:
        """What to do where `out` is not empty: refuse | replace."""
        return "replace" if self.force else "refuse"

    def run(self) -> None:
        """Writes it, and prints what it was."""
        if self.private and not self.push:
            raise UserError("--private is for --push NAME")
        _on_this_host()
        from jaxalign.export.run import export

        export(self)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Which adapter is taken in."""

    adapter: str = word("a PEFT folder or hub name")
    base: str = needed("what it was trained on", "MODEL")
    out: str = needed("folder to write")
    force: bool = option(False, "replace what is in --out")

    def run(self) -> None:
        """Checks it, writes it, and prints what it is."""
        _on_this_host()
        from jaxalign.export.incoming import import_adapter

        import_adapter(self.adapter, self.base, self.out, "replace" if self.force else "refuse")


def _on_this_host() -> None:
    # No accelerator is needed, and one host of a pod would wait for the rest.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
