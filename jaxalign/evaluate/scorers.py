"""Kind of task -> its scorer, all called alike.

found = SCORERS["slots"](golds, answers, **options)
found.measures[0].value      # the kind's main score
"""

from __future__ import annotations

from collections.abc import Callable

from jaxalign.evaluate.exact import score_rows
from jaxalign.evaluate.measure import Scored
from jaxalign.evaluate.ner import score_ner
from jaxalign.evaluate.slots import score_intent, score_intent_slots, score_slots
from jaxalign.evaluate.translation import score_translation

SCORERS: dict[str, Callable[..., Scored]] = {
    "rows": score_rows,
    "slots": score_slots,
    "intent": score_intent,
    "intent_slots": score_intent_slots,
    "translation": score_translation,
    "ner": score_ner,
}
