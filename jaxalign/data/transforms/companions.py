"""Two languages in one row: both texts in a prompt, or the answer of another language.

    - {name: bilingual_prompt, options: {order: own, rate: 1.0, form: prompt}}
    - {name: bilingual_prompt, options: {form: answers}}          # TransFusion's form
    - {name: cross_lingual_answer, options: {rate: 0.5}}          # AFP

`bilingual_prompt` is the fusion of FILTER (Fang et al. 2021, arXiv 2009.05166) at the input: a text
and its translation into the pivot language are read together, in training and at evaluation
(`evaluate.transforms`). FILTER fuses inside an encoder; its layers that read the texts apart are
not here. With `form: answers` the model first writes the answer to the pivot's text, then its own
(TransFusion, Chen et al. 2023, arXiv 2305.13582). `cross_lingual_answer` is the second half of AFP
(Li et al. 2023, arXiv 2311.08089): with probability `rate` a row asks for the answer of another
language, and gets it. Their data hold three draws of each row, ours one.

Rows of one item have the same `id`. What a row becomes is written in `data/fusion.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxalign.bounds import setting
from jaxalign.data.sources import Companion, Record
from jaxalign.data.transforms.options import read
from jaxalign.data.transforms.parallel import by_item, check_joined, check_known, item_of, spoken


@dataclass
class Bilingual:
    """Options of `bilingual_prompt`."""

    order: str = setting("own", "whose text is first in the prompt", choices=("own", "pivot"))
    rate: float = setting(1.0, "share of the rows with a translation", lowest=0, highest=1)
    form: str = setting("prompt", "`answers`: the pivot's, then one's own",
                        choices=("prompt", "answers"))  # fmt: skip
    pivot: str = setting("en", "the language of the other text")


@dataclass
class CrossLingual:
    """Options of `cross_lingual_answer`."""

    rate: float = setting(0.5, "share of the rows with a translation", lowest=0, highest=1)
    languages: list[str] = setting([], "of the answers; empty: all that the rows have")


def bilingual_prompt(
    records: Sequence[Record], options: Mapping[str, Any], seed: int
) -> list[Record]:
    """Rows with the pivot's row of the same `id` as a companion; others stay as they are.

    Raises:
        UserError: a row without an id or a language, none in the pivot language, or rows of several
            languages of which none has the id of one in it.
    """
    chosen = read(Bilingual, options)
    known = by_item(records)
    check_known([chosen.pivot], [name for rows in known.values() for name in rows])
    check_joined(records, any(len(rows) > 1 and chosen.pivot in rows for rows in known.values()))
    random, found = np.random.default_rng(seed), []
    for record in records:
        other = known[item_of(record)].get(chosen.pivot)
        drawn = random.random() < chosen.rate
        if drawn and other is not None and spoken(record) != chosen.pivot:
            record = replace(record, companion=Companion(other, chosen.form, chosen.order))
        found.append(record)
    return found


def cross_lingual_answer(
    records: Sequence[Record], options: Mapping[str, Any], seed: int
) -> list[Record]:
    """Rows of which a share answers in another language, drawn among those of the same `id`.

    Raises:
        UserError: a row without an id or a language, languages that none is in, or rows of several
            languages of which none has the id of another.
    """
    chosen = read(CrossLingual, options)
    known = by_item(records)
    check_known(chosen.languages, [name for rows in known.values() for name in rows])
    check_joined(records, any(len(rows) > 1 for rows in known.values()))
    random, found = np.random.default_rng(seed), []
    for record in records:
        own, rows = spoken(record), known[item_of(record)]
        others = [name for name in chosen.languages or rows if name != own and name in rows]
        drawn, number = random.random() < chosen.rate, random.random()
        if drawn and others:
            other = rows[others[int(number * len(others))]]
            record = replace(record, companion=Companion(other, "answer"))
        found.append(record)
    return found
