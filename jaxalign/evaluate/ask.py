"""How a model is asked: it writes answers, or weighs given ones.

    asked, cut = ask(base, examples)
    for rows, texts, tokens in asked.chunks(base, system):
        ...

`ASKS` has the kinds of task that are not asked for a written answer. Texts are what the kind's
scorer reads, whether a model wrote them or not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxalign.base import Base, decoding_of
from jaxalign.checksums import text_digest
from jaxalign.data.beginnings import beginnings, encode_choices
from jaxalign.data.chat import encode_texts
from jaxalign.data.example import Example
from jaxalign.data.template import Prompts
from jaxalign.evaluate.choice import check_words
from jaxalign.evaluate.gold import kind_of
from jaxalign.frozen.projection import Attached
from jaxalign.generate import System

Chunk = tuple[list[int], list[str], int]  # row numbers, their texts, tokens that were written


class Ask(Protocol):
    """Questions, encoded."""

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each."""
        ...

    @property
    def named(self) -> list[list[int]]:
        """All that distinguishes each from the others, as numbers."""
        ...

    def settings(self, base: Base) -> dict[str, Any]:
        """What answers depend on besides prompts and weights."""
        ...

    def chunks(
        self, base: Base, system: System, rows: Collection[int] | None = None
    ) -> Iterator[Chunk]:
        """Answers, batch by batch; those batches that hold one of `rows`."""
        ...


@dataclass(frozen=True)
class Written:
    """A model writes its answers."""

    prompts: list[list[int]]

    @classmethod
    def of(
        cls,
        base: Base,
        examples: Sequence[Example],
        prompts: Prompts | None,
        adapter: Attached | None,
    ) -> tuple[Written, int]:
        """The questions, and how many prompts were cut."""
        ids, cut = base.encode(examples, prompts, adapter)
        return cls(ids), cut

    @property
    def named(self) -> list[list[int]]:
        """The prompts."""
        return self.prompts

    def settings(self, base: Base) -> dict[str, Any]:
        """Those of `generate.*`."""
        settings = dataclasses.asdict(base.config.generate)
        # About prompts, which are compared themselves, or about speed.
        for name in ("long", "batch", "share_prefix"):
            settings.pop(name)
        if settings["method"] == "sample":  # older answers were drawn by a row's place
            settings["drawn_by"] = "prompt"
        return settings

    def chunks(
        self, base: Base, system: System, rows: Collection[int] | None = None
    ) -> Iterator[Chunk]:
        """See `System.chunks`."""
        config = base.config
        # What a row draws follows from its key: known answers are those of a run without them.
        numbers = [int(text_digest(key)[:8], 16) for key in keys_of(self.prompts)]
        for some, ids in system.chunks(
            self.prompts, decoding_of(config), config.generate.batch, rows, numbers
        ):
            yield some, base.decode(ids), sum(map(len, ids))


@dataclass(frozen=True)
class Weighed:
    """A model weighs the choices that each example has.

    Attributes:
      prompts: of the examples.
      choices: tokens of each choice.
      lengths: how many tokens it has as a text.
      score: `label`: the log-probability of the choice's text; `prefix_sum`: of its being begun
        (Zhang et al. 2024): the next token is one of the choice's beginnings, with or without a
        blank; `first_token`: of its last token's being next, of 'A', 'B', ... (Chua et al. 2024).
    """

    prompts: list[list[int]]
    choices: list[list[list[int]]]
    lengths: list[list[int]]
    score: str

    @classmethod
    def of(
        cls,
        base: Base,
        examples: Sequence[Example],
        prompts: Prompts | None,
        adapter: Attached | None,
    ) -> tuple[Weighed, int]:
        """The questions, and how many prompts were cut."""
        options, how = base.config.evaluate.options, prompts or base.prompts
        score = options.get("score", "label")
        check_words(score, options.get("norm", "characters"))
        texts = encode_choices(examples, how.tokenizer, how.template, how.system)
        lengths = [[len(tokens) for tokens in row] for row in texts]
        longest = max((length for row in lengths for length in row), default=1)
        ids, cut = base.encode(examples, how, adapter, longest)
        if score == "label":
            return cls(ids, texts, lengths, score), cut
        labels = list(dict.fromkeys(text for one in examples for text in one.choices))
        if score == "prefix_sum":
            known = beginnings(labels, how.tokenizer)
        else:
            encoded, _ = encode_texts(labels, how.tokenizer, special=False)
            known = {label: row[-1:].tolist() for label, row in zip(labels, encoded, strict=True)}
        return cls(ids, [[known[t] for t in one.choices] for one in examples], lengths, score), cut

    @property
    def named(self) -> list[list[int]]:
        """Prompt and choices."""
        return [
            [*prompt, *(number for tokens in row for number in (-1, *tokens))]
            for prompt, row in zip(self.prompts, self.choices, strict=True)
        ]

    def settings(self, base: Base) -> dict[str, Any]:
        """The score, and whether the adapter is merged."""
        return {"score": self.score, "adapter": base.config.generate.adapter}

    def chunks(
        self, base: Base, system: System, rows: Collection[int] | None = None
    ) -> Iterator[Chunk]:
        """See `System.weigh`."""
        how = "whole" if self.score == "label" else "one_of"
        for some, weights in system.weigh(
            self.prompts, self.choices, how, base.config.generate.batch, rows
        ):
            yield some, [self._text(*one) for one in zip(some, weights, strict=True)], 0

    def _text(self, row: int, weights: Sequence[float]) -> str:
        scores = [float(f"{weight:.9g}") for weight in weights]  # a float32, to the last bit
        return json.dumps({"scores": scores, "tokens": self.lengths[row]})


ASKS: dict[str, type[Written] | type[Weighed]] = {"choice": Weighed}


def keys_of(prompts: Sequence[Sequence[int]]) -> list[str]:
    """A name for each prompt: a digest of its tokens, and its number among equal ones."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).hexdigest()[:20]
        keys.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return keys


def ask(
    base: Base,
    examples: Sequence[Example],
    prompts: Prompts | None = None,
    adapter: Attached | None = None,
) -> tuple[Ask, int]:
    """The questions as the configured kind asks them, and how many prompts were cut from the left.

    Args:
      base: without its weights.
      examples: what is asked.
      prompts: how the system that answers is asked; None: as the bare base.
      adapter: that system's, which may take positions itself.

    Raises:
      UserError: a prompt leaves no room for an answer and `generate.long` refuses to cut.
    """
    return ASKS.get(kind_of(base.config), Written).of(base, examples, prompts, adapter)


def answers(asked: Ask, base: Base, system: System, look: Any = None) -> list[str]:
    """All texts in the order of the questions.

    Args:
      asked: the questions.
      base: decodes what is written.
      system: answers.
      look: called after each batch with the rows and tokens that it had.
    """
    found = [""] * len(asked.prompts)
    for rows, texts, tokens in asked.chunks(base, system):
        for row, text in zip(rows, texts, strict=True):
            found[row] = text
        if look:
            look(len(rows), tokens)
    return found
