"""Two rows that say the same in two languages become one prompt and one answer.

    form      prompt                                answer
    prompt    German: wie warm ist es               the row's own
              English: how warm is it
    answers   the same                              English: intent: weather/find
                                                    German: intent: weather/find
    answer    wie warm ist es Answer in English:    the other row's

`order: pivot` puts the other text first in the prompt. Of `answers` only the last part is judged.
The words are ours: FILTER (Fang et al. 2021) joins two texts inside an encoder, TransFusion (Chen
et al. 2023) writes Python-like annotations; `answer` is how AFP (Li et al. 2023) asks.

    fuse(german, english, Companion(record, "answers")).answer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxalign.data.example import Example
from jaxalign.data.languages import language_name
from jaxalign.data.sources import Companion


def fuse(own: Example, other: Example, how: Companion) -> Example:
    """The example of both rows."""
    return FORMS[how.form](own, other, how.order)


def _prompt(own: Example, other: Example, order: str) -> Example:
    both = (own, other) if order == "own" else (other, own)
    prompt = "\n".join(f"{language_name(one.language)}: {one.prompt}" for one in both)
    return dataclasses.replace(own, prompt=prompt)


def _answers(own: Example, other: Example, order: str) -> Example:
    mark = f"\n{language_name(own.language)}: "
    answer = f"{language_name(other.language)}: {other.answer}{mark}{own.answer}"
    return dataclasses.replace(_prompt(own, other, order), answer=answer, judged=mark)


def _answer(own: Example, other: Example, order: str) -> Example:
    ask = f"{own.prompt.rstrip()} Answer in {language_name(other.language)}:"
    # Of a finished row no template separates the two.
    return dataclasses.replace(
        own,
        prompt=f"{ask} " if own.finished else ask,
        answer=other.answer,
        choices=other.choices,
        answered_in=other.language,
    )


FORMS: dict[str, Callable[[Example, Example, str], Example]] = {
    "prompt": _prompt,
    "answers": _answers,
    "answer": _answer,
}
