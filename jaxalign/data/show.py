"""Rows as the model gets them, for people: what is trained, what is pooled, which tokens there are.

show(stream.rows[:3], tokenizer)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.data.batch import Encoded, EncodedPair, EncodedPrompts
from jaxalign.terminal import console, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


def show(
    rows: Sequence[Encoded | EncodedPair | EncodedPrompts],
    tokenizer: PreTrainedTokenizerBase,
    screen: Console | None = None,
) -> None:
    """Prints rows as the model gets them.

    Task rows, also behind two prompts: trained tokens green between ⟦ ⟧, the rest dim. Pairs:
    pooled tokens cyan. Special tokens are written out and bold. Piped output has no colours; the
    brackets stay.
    """
    from rich.text import Text

    screen = screen or console()
    for number, row in enumerate(rows, start=1):
        place = " · ".join(filter(None, (row.language, row.origin)))
        head = Text(visible(f"row {number} · {place}" if place else f"row {number}"), style="bold")
        body = Text()
        if isinstance(row, EncodedPair):
            for side, tokens in (("source", row.source), ("target", row.target)):
                body.append(f"{side}, {len(tokens)} tokens pooled: ", style="dim")
                _append(body, tokens, tokenizer, "cyan")
                body.append("\n")
        elif isinstance(row, EncodedPrompts):
            for side, tokens in zip(("student", "teacher"), row.sides, strict=True):
                body.append(f"{side}, {len(tokens)} tokens: ", style="dim")
                _answered(body, tokens, len(tokens) - row.targets, tokenizer)
        else:
            cut = f", cut from {row.whole}" if row.whole > len(row.tokens) else ""
            head.append(f" · {len(row.tokens)} tokens{cut}, {row.targets} trained")
            _answered(body, row.tokens, row.first, tokenizer)
        screen.print(head, soft_wrap=True)
        screen.print(body, soft_wrap=True)


def _answered(
    text: Text, tokens: np.ndarray, first: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Adds a row whose tokens from the first one on are trained."""
    _append(text, tokens[:first], tokenizer, "dim")
    text.append("⟦", style="green")
    _append(text, tokens[first:], tokenizer, "green")
    text.append("⟧\n", style="green")


def _append(text: Text, tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, style: str) -> None:
    """Adds decoded runs of ordinary tokens and, each alone and bold, the special ones."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    run: list[int] = []

    def flush() -> None:
        if run:
            decoded = tokenizer.decode(run, clean_up_tokenization_spaces=False)
            text.append(visible(decoded), style=style)
            run.clear()

    for token in tokens.tolist():
        if token in special:
            flush()
            text.append(visible(tokenizer.convert_ids_to_tokens(token)), style=f"bold {style}")
        else:
            run.append(token)
    flush()
