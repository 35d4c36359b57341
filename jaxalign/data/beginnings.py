"""Labels as tokens: those with which a label can begin, and those that it is.

beginnings(["positive", "neutral"], tokenizer)["neutral"]     # ids of n, ne, ' neutral', ...
encode_choices(examples, tokenizer)                           # prompts, and each choice's tokens
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.data.chat import encode_prompts, encode_rows, encode_texts, render_examples
from jaxalign.data.example import Example
from jaxalign.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR = "a"  # a token before another one keeps the blank that begins it


def beginnings(labels: Collection[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Each label's tokens whose text is a beginning of the label, with or without a blank before.

    A token that is a part of a character begins nothing; the blank alone begins all.
    """
    known: dict[str, list[int]] = {}
    for number, text in enumerate(token_texts(tokenizer)):
        known.setdefault(text, []).append(number)
    found = {}
    for label in labels:
        starts = {text[:end] for text in (label, " " + label) for end in range(1, len(text) + 1)}
        found[label] = sorted(number for text in starts for number in known.get(text, ()))
    return found


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every token, blanks included; '' for special ones."""
    (anchor,), _ = encode_texts([ANCHOR], tokenizer, special=False)
    first = list(tokenizer.convert_ids_to_tokens(anchor[-1:].tolist()))
    before = len(tokenizer.convert_tokens_to_string(first))
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [
        "" if name is None or number in special
        else tokenizer.convert_tokens_to_string([*first, name])[before:]
        for number, name in enumerate(names)
    ]  # fmt: skip


def encode_choices(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str = "chat",
    system: str | None = None,
) -> list[list[list[int]]]:
    """The tokens of each choice behind its prompt, without an end token.

    They are what prompt and choice have more than the prompt; where a token reaches across the
    border, the choice is encoded alone, as a model that was asked by the prompt meets it.

    Raises:
        UserError: a choice has no token.
    """
    rendered = render_examples(examples, tokenizer, template, system)
    prompts = encode_prompts(examples, tokenizer, template, system)
    flat = [(row, choice) for row, one in enumerate(examples) for choice in one.choices]
    alone, _ = encode_texts([choice for _, choice in flat], tokenizer, special=False)
    found: list[list[list[int]]] = [[] for _ in examples]
    special = [example.finished or template != "chat" for example in examples]
    wholes: dict[int, list[np.ndarray]] = {}
    for kind in (True, False):
        texts = [rendered[row].prompt + choice for row, choice in flat if special[row] is kind]
        wholes[kind] = encode_rows(texts, tokenizer, kind, ends=False)
    joint = {kind: iter(some) for kind, some in wholes.items()}
    for (row, choice), tail in zip(flat, alone, strict=True):
        whole, prompt = next(joint[special[row]]), prompts[row]
        if len(whole) > len(prompt) and np.array_equal(whole[: len(prompt)], prompt):
            tail = whole[len(prompt) :]
        if not len(tail):
            raise UserError(f"{examples[row].origin}: the choice {choice!r} has no token")
        found[row].append(tail.tolist())
    return found
