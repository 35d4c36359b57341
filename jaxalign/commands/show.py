"""`jaxalign data show`: rows as the model gets them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxalign.arguments import Configured, option
from jaxalign.terminal import say


@dataclass(frozen=True, kw_only=True)
class Show(Configured):
    """Which rows to print."""

    rows: int = option(3, "rows to print of each stream", lowest=0)

    def run(self) -> None:
        """Prints how many rows there are, and the first ones."""
        config = self.load()
        from jaxalign.data.chat import load_tokenizer, show
        from jaxalign.data.streams import ALIGNED, task_stream

        tokenizer = load_tokenizer(config.model.path, config.model.revision)
        aligned = ALIGNED[config.align.rows]
        for part, stream in ((config.task, task_stream), (config.align, aligned)):
            if part.weight > 0 and part.train:
                found = stream(config, tokenizer)
                say(f"{found.report}; {found.shape}")
                show(found.rows[: self.rows], tokenizer)
