"""Multiple choice: what a model was found to think of each choice, and whether that is right.

An answer is a choice's text, blanks around both aside, or what `ask.py` weighs: the log-probability
of each choice and how many tokens it has, {"scores": [...], "tokens": [...]}.

    found = score_choice(golds, ['{"scores": [-3.1, -1.2], "tokens": [2, 4]}', "Cardiff"])
    found["accuracy"].value, found["accuracy_norm"].value
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.data.sources import nearest
from jaxalign.errors import UserError
from jaxalign.evaluate.measure import Gold, Measure, Scored, share

SCORES = ("label", "prefix_sum", "first_token")
NORMS: dict[str, Callable[[str, int], int]] = {
    "characters": lambda text, tokens: len(text),
    "bytes": lambda text, tokens: len(text.encode("utf-8")),
    "tokens": lambda text, tokens: tokens,
}


@dataclass(frozen=True)
class Weighed:
    """An answer as it is read: the numbers of the choices that it says, -1 for none."""

    chosen: int
    by_length: int
    tied: bool = False


def check_words(score: str, norm: str) -> None:
    """Refuses options that are not known.

    Raises:
      UserError: naming those that are.
    """
    for name, value, known in (("score", score, SCORES), ("norm", norm, tuple(NORMS))):
        if value not in known:
            raise UserError(
                f"evaluate.options.{name}: {value!r} should be one of {', '.join(known)}"
                f"{nearest(value, known)}"
            )


def score_choice(
    golds: Sequence[Gold],
    answers: Sequence[str],
    *,
    score: str = "label",
    norm: str = "characters",
) -> Scored:
    """accuracy; of score=label also accuracy_norm, by log-probability over length.

    They are acc and acc_norm of lm-evaluation-harness, which divides by characters. Of equal scores
    the first choice counts. counts: ill_formed (neither scores nor a choice), tied.

    Args:
      golds: their examples have choices.
      answers: one of each row.
      score: what a choice was scored by.
      norm: the length by which a log-probability is divided.

    Raises:
      UserError: unknown words.
    """
    check_words(score, norm)
    found = [_read(gold, answer, norm) for gold, answer in zip(golds, answers, strict=True)]
    read = tuple(
        gold.example.choices[one.chosen] if one.chosen >= 0 else ""
        for gold, one in zip(golds, found, strict=True)
    )
    measures = [_accuracy("accuracy", golds, [one.chosen for one in found])]
    if score == "label":
        measures.append(_accuracy("accuracy_norm", golds, [one.by_length for one in found]))
    counts = {"ill_formed": read.count(""), "tied": sum(one.tied for one in found)}
    return Scored(tuple(measures), read, counts, {"score": score})


def _accuracy(name: str, golds: Sequence[Gold], chosen: Sequence[int]) -> Measure:
    hits = [
        (at >= 0 and gold.example.choices[at] == gold.example.answer, 1)
        for gold, at in zip(golds, chosen, strict=True)
    ]
    return Measure(name, np.array(hits, float), share)


def _read(gold: Gold, answer: str, norm: str) -> Weighed:
    choices = gold.example.choices
    bare = [choice.strip() for choice in choices]
    if answer.strip() in bare:
        at = bare.index(answer.strip())
        return Weighed(at, at)
    try:
        said = json.loads(answer)
        scores, tokens = said["scores"], said["tokens"]
        if len(scores) != len(choices) or len(tokens) != len(choices):
            return Weighed(-1, -1)
        weights = [float(score) for score in scores]
        lengths = [NORMS[norm](text, int(n)) for text, n in zip(choices, tokens, strict=True)]
        per_unit = [
            weight / max(length, 1) for weight, length in zip(weights, lengths, strict=True)
        ]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Weighed(-1, -1)
    if any(map(math.isnan, weights)):
        return Weighed(-1, -1)
    best = max(weights)
    return Weighed(weights.index(best), per_unit.index(max(per_unit)), weights.count(best) > 1)
