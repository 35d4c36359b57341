"""Text to tokens: chat templates, the paper's Llama template, and which tokens carry a loss.

A row trains its answer and the end-of-turn token behind it, nothing else. The prompt of a training
row and the prompt of a generation are the same tokens.

    tokenizer = load_tokenizer("meta-llama/Meta-Llama-3-8B-Instruct")
    rows = encode_examples(examples, tokenizer, template="chat", max_length=2048)
    prompts = encode_prompts(examples, tokenizer, template="chat")    # for generation
    show(rows[:3], tokenizer)                                         # green: trained
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxalign.data.batch import Encoded
from jaxalign.data.render import (
    LLAMA3_END,
    LLAMA3_OPEN,
    LLAMA3_TOKENS,
    LLAMA3_TURN,
    Rendered,
    instruction,
    render_examples,
)
from jaxalign.data.show import show
from jaxalign.data.tasks import Example
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import reading

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

__all__ = [
    "LLAMA3_END", "LLAMA3_OPEN", "LLAMA3_TOKENS", "LLAMA3_TURN", "Rendered", "encode_examples",
    "encode_prompts", "encode_rows", "encode_texts", "instruction", "load_tokenizer",
    "render_examples", "show",
]  # fmt: skip

MARK = "usertext"  # in place of a text, to see what a template writes behind it
ANCHOR = "a"  # a text, to see what a tokenizer adds to it


def encode_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    special: bool = True,
    control: str = "token",
) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens, cut on the right.

    Args:
        texts: any number of texts; they go through the tokenizer in one call.
        tokenizer: the tokenizer.
        max_length: longest result; None: no cut.
        special: whether the tokenizer adds its special tokens.
        control: what `<|end|>` within a text is: the 'token', or the 'text' that somebody wrote.

    Returns:
        int32 arrays, and the length of each before the cut.
    """
    if not texts:
        return [], []
    settings = _settings(special, control)
    with reading("the tokenizer", "one that encodes these texts"):
        ids = tokenizer(list(texts), **settings)["input_ids"]
    whole = [len(row) for row in ids]
    if max_length is not None:
        long = [i for i, length in enumerate(whole) if length > max_length]
        if long:
            # The tokenizer cuts, not we: one that ends every text with a token keeps that token,
            # whose state a pooling may read.
            cut = tokenizer(
                [texts[i] for i in long],
                **settings,
                truncation=True,
                max_length=max_length,
            )["input_ids"]
            for i, row in zip(long, cut, strict=True):
                ids[i] = row
    return [np.array(row, np.int32) for row in ids], whole


def _settings(special: bool, control: str = "token") -> dict[str, bool]:
    """How the tokenizer is called."""
    return {
        "add_special_tokens": special,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
        "split_special_tokens": control == "text",
    }


# Tokens ------------------------------------------------------------------------------------------


class Added(NamedTuple):
    """What a tokenizer adds to every text."""

    front: tuple[int, ...] = ()  # ids
    behind: tuple[int, ...] = ()  # ids

    def kept(self, ids: Sequence[int], ends: bool) -> slice:
        """The tokens that stay: one begin token and one end token, also where the text brings its
        own."""
        begin, end = len(self.front), len(ids) - len(self.behind)
        begun = tuple(ids[begin : 2 * begin]) == self.front
        ended = tuple(ids[end - len(self.behind) : end]) == self.behind
        return slice(begin if begun else 0, len(ids) if ends and not ended else end)


class Text(NamedTuple):
    """One text as tokens, and where they come from."""

    tokens: np.ndarray  # int32 [t]
    found: BatchEncoding  # of a batch of texts
    row: int  # in it
    dropped: int  # tokens of that row, before these

    def token(self, places: range) -> int | None:
        """Of the first of these characters that belongs to a token: a blank may not."""
        found = (self.found.char_to_token(self.row, place) for place in places)
        number = next((number for number in found if number is not None), None)
        # A begin token that the text brings itself is none of its words either.
        return None if number is None else max(number - self.dropped, self.dropped)


def _added(tokenizer: PreTrainedTokenizerBase) -> Added:
    """What it adds to a text; nothing where it knows no token of that text."""
    plain, whole = (tokenizer(ANCHOR, **_settings(kind))["input_ids"] for kind in (False, True))
    for first in range(len(whole) - len(plain) + 1 if plain else 0):
        if whole[first : first + len(plain)] == plain:
            return Added(tuple(whole[:first]), tuple(whole[first + len(plain) :]))
    return Added()


def encode_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool, ends: bool = True
) -> list[np.ndarray]:
    """Token ids of each text as it is trained or asked: int32 [t] each, not cut.

    Args:
        texts: whole rows, or their beginnings.
        tokenizer: the tokenizer.
        special: whether it adds its special tokens; a begin token that is there stays the only one.
        ends: whether what it adds behind a text stays: behind a prompt the answer follows.
    """
    return [one.tokens for one in _encode(texts, tokenizer, special, ends)]


def _encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool, ends: bool
) -> list[Text]:
    if not texts:
        return []
    with reading("the tokenizer", "one that encodes these texts"):
        found = tokenizer(list(texts), **_settings(special))
        added = _added(tokenizer) if special else Added()
    kept = [added.kept(ids, ends) for ids in found["input_ids"]]
    return [
        Text(np.array(found["input_ids"][row][part], np.int32), found, row, part.start)
        for row, part in enumerate(kept)
    ]


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str = "chat",
    system: str | None = None,
) -> list[np.ndarray]:
    """The prompts alone, as a generation starts from them: int32 [t] each, not padded, not cut."""
    rendered = render_examples(examples, tokenizer, template, system)
    return [one.tokens for one in _encode_prompts(examples, rendered, tokenizer, template)]


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str = "chat",
    system: str | None = None,
    max_length: int | None = None,
) -> list[Encoded]:
    """Prompt and completion as tokens, with the length of the prompt, cut on the right.

    Finished rows and the paper's template follow the paper's code: the tokens of the whole text,
    of which the first len(tokens(prompt)) have no loss, whether or not a token reaches across the
    border. With a chat template the prompt's tokens must be the beginning of the row's; where a
    token reaches across, prompt and completion are encoded apart, as the model will meet them.

    Args:
        examples: what to encode.
        tokenizer: the tokenizer.
        template: 'chat' or 'llama3_paper' (see `render_examples`).
        system: replaces the task's instruction.
        max_length: longest row; None: no cut.

    Returns:
        One row for each example. A row whose answer was cut away whole has no target.
    """
    rendered = render_examples(examples, tokenizer, template, system)
    prompts = _encode_prompts(examples, rendered, tokenizer, template)
    header = _header(examples, tokenizer, template, system)
    rows: list[Encoded | None] = [None] * len(examples)
    for special in (True, False):
        these = [i for i, e in enumerate(examples) if _adds_special(e, template) is special]
        texts = [rendered[i].prompt + rendered[i].completion for i in these]
        for i, whole in zip(these, encode_rows(texts, tokenizer, special), strict=True):
            prompt = prompts[i].tokens
            if not special and not np.array_equal(whole[: len(prompt)], prompt):
                (tail,) = encode_rows([rendered[i].completion], tokenizer, False)
                whole = np.concatenate([prompt, tail])
            tokens = whole[:max_length]
            language, answered_in = examples[i].language, examples[i].answered_in
            rows[i] = Encoded(
                tokens=tokens,
                prompt=min(len(prompt), len(tokens)),
                language=language,
                languages=(language, answered_in or language),
                origin=examples[i].origin,
                whole=len(whole),
                text=_user_text(examples[i], rendered[i].prompt, header, prompts[i]),
            )
    return [row for row in rows if row is not None]


def _adds_special(example: Example, template: str) -> bool:
    """A chat template writes its begin token itself; the others leave it to the tokenizer."""
    return example.finished or template != "chat"


def _encode_prompts(
    examples: Sequence[Example],
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
) -> list[Text]:
    """The prompts; an answer follows, so the tokenizer ends none of them."""
    out: list = [None] * len(examples)
    for special in (True, False):
        these = [i for i, e in enumerate(examples) if _adds_special(e, template) is special]
        texts = _encode([rendered[i].prompt for i in these], tokenizer, special, ends=False)
        for i, text in zip(these, texts, strict=True):
            out[i] = text
    return out


def _header(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str,
    system: str | None,
) -> int:  # fmt: skip
    """How many characters the template writes behind a user's text, whatever the text."""
    asked = next((example for example in examples if not example.finished), None)
    if asked is None:
        return 0
    (one,) = render_examples([replace(asked, prompt=MARK)], tokenizer, template, system)
    return len(one.prompt.rpartition(MARK)[2])


def _user_text(example: Example, prompt: str, header: int, encoded: Text) -> tuple[int, int]:
    """The user's text among the tokens of a prompt: the first token, and the one behind the last.

    Of a finished row, and with a tokenizer that does not know where its tokens come from, all.

    Args:
        header: characters of the template behind the text, in which a short text may stand, too.
    """
    text = example.prompt.strip()
    first = 0 if example.finished else prompt.rfind(text, 0, len(prompt) - header)
    whole = (0, len(encoded.tokens))
    if not encoded.found.is_fast or first < 0 or not text:
        return whole
    behind = len(prompt) if example.finished else first + len(text)
    # A character may be several tokens: the text ends where the next one begins.
    start = encoded.token(range(first, behind))
    end = encoded.token(range(behind, len(prompt)))
    last = encoded.token(range(behind - 1, first - 1, -1))
    if start is None or last is None:
        return whole
    return start, whole[1] if end is None else max(end, last + 1)
