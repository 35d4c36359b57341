"""Kind of task -> its scorer, all called alike.

found = SCORERS["slots"](golds, answers, **options)
found.measures[0].value      # the kind's main score
rehearse("slots", golds, options)    # {'de': ['slot_f1', ...]}, before anything is answered
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxalign.data.sources import nearest
from jaxalign.errors import UserError
from jaxalign.evaluate.choice import score_choice
from jaxalign.evaluate.comet import find_comet
from jaxalign.evaluate.exact import score_rows
from jaxalign.evaluate.measure import Gold, Scored
from jaxalign.evaluate.ner import score_ner
from jaxalign.evaluate.slots import score_intent, score_intent_slots, score_slots
from jaxalign.evaluate.translation import COMET, score_translation

SCORERS: dict[str, Callable[..., Scored]] = {
    "rows": score_rows,
    "slots": score_slots,
    "intent": score_intent,
    "intent_slots": score_intent_slots,
    "translation": score_translation,
    "ner": score_ner,
    "choice": score_choice,
}
KINDS = {str: "text", int: "a whole number", bool: "true or false"}


def rehearse(
    kind: str, golds: Mapping[str, Sequence[Gold]], options: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Language -> names of its measures, the main one first, after scoring empty answers.

    Not every language has all of them: fidelity is missing in one that nobody recognises.

    Whatever a scorer misses (a package, an option, a field of a row) shows before the answers are
    paid for. COMET is looked for and not run.

    Raises:
      UserError: what the scorer raises.
    """
    check_options(kind, options)
    if options.get(COMET):
        find_comet(options[COMET])
    cheap = {name: value for name, value in options.items() if name != COMET}
    last = [COMET] if options.get(COMET) else []
    scored = {
        language: SCORERS[kind](rows, [""] * len(rows), **cheap) for language, rows in golds.items()
    }
    return {
        language: [*(measure.name for measure in one.measures), *last]
        for language, one in scored.items()
    }


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Refuses options that the kind's scorer does not take.

    Raises:
      UserError: an unknown name, or a value of another type than the default's.
    """
    known = dict(list(inspect.signature(SCORERS[kind]).parameters.items())[2:])
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"evaluate.options.{name}: the scorer of {kind} takes "
                f"{', '.join(known) or 'no options'}{nearest(name, known)}"
            )
        wanted = type(known[name].default)
        if type(value) is not wanted or (wanted is int and value < 0):
            raise UserError(
                f"evaluate.options.{name}: {value!r} should be {KINDS[wanted]}"
                f"{', 0 or more' if wanted is int else ''}"
            )
