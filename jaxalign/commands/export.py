"""`jaxalign export` and `jaxalign import`: files in, files out, on the CPU of this host."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jaxalign.arguments import needed, option, word
from jaxalign.errors import UserError
from jaxalign.export.request import Request


@dataclass(frozen=True)
class Export(Request):
    """An export on the command line."""

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

    adapter: str = word("a PEFT folder or hub name", path=True)
    base: str = needed("the base that it was trained on", "MODEL", path=True)
    out: str = needed("folder to write", path=True)
    force: bool = option(False, "replace what is in --out")

    def run(self) -> None:
        """Checks it, writes it, and prints what it is."""
        _on_this_host()
        from jaxalign.export.incoming import import_adapter

        import_adapter(self.adapter, self.base, self.out, "replace" if self.force else "refuse")


def _on_this_host() -> None:
    # No accelerator is needed, and one host of a pod would wait for the rest.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
