"""Scores of what the model writes while it trains, on a sample, by the same code as afterwards.

    train(config, judge=sample_judge(config))      # logs eval/slot_f1, eval/slot_f1/de, ...

With `train.metric=eval/slot_f1` they choose the best checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.base import Base
from jaxalign.checksums import text_digest
from jaxalign.evaluate.ask import answers, ask
from jaxalign.evaluate.gold import Golds, kind_of, read_golds
from jaxalign.evaluate.measure import Scored
from jaxalign.evaluate.run import score
from jaxalign.evaluate.scorers import rehearse
from jaxalign.settings import Config
from jaxalign.train.state import without_heads


def sample_judge(config: Config) -> Callable[[Any, Any], dict[str, float]] | None:
    """What `train` calls at every validation, or None where `evaluate.sample` is 0.

    The first `evaluate.sample` rows of each language are read at once, so that a mistake in them
    shows before the training starts.

    Returns:
      A function of the run and its state: each measure's mean over the languages as
      `eval/MEASURE`, each language's as `eval/MEASURE/LANGUAGE`. Its `scores` are these names, its
      `rows` the digest of what is asked and of the references.

    Raises:
      UserError: as `read_golds` and `rehearse`.
    """
    if not config.evaluate.sample:
        return None
    golds = read_golds(config, config.evaluate.sample)
    flat = [gold.example for rows in golds.values() for gold in rows]

    def judge(run: Any, state: Any) -> dict[str, float]:
        params, lora = run.frozen.base, without_heads(state.trained)
        if not run.adapter:
            dtype = jnp.dtype(config.model.dtype)
            params, lora = jax.tree.map(lambda leaf: leaf.astype(dtype), lora), None
        base: Base = run.base
        asked, _ = ask(base, flat, adapter=run.adapter)
        system = base.system(base.decoder(run.adapter), params, lora)
        # A machine that goes away does not wait for the other answers.
        texts = iter(answers(asked, base, system, lambda rows, tokens: run.look_up()))
        scored = score(config, golds, {lang: [next(texts) for _ in golds[lang]] for lang in golds})
        return _values(scored)

    # What it will be asked for is known before a training starts, but for its numbers.
    names = set()
    for language, measures in rehearse(kind_of(config), golds, config.evaluate.options).items():
        names |= {f"eval/{name}{end}" for name in measures for end in ("", f"/{language}")}
    judge.scores = names  # type: ignore[attr-defined]
    judge.rows = _digest(golds)  # type: ignore[attr-defined]
    return judge


def _digest(golds: Golds) -> str:
    """SHA-256 of the rows of each language in their order; their files' names do not matter."""
    rows = [
        (language, dataclasses.replace(gold.example, origin=""), sorted(gold.fields.items()))
        for language in sorted(golds) for gold in golds[language]
    ]  # fmt: skip
    return text_digest(repr(rows))


def _values(scored: dict[str, Scored]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    found = {}
    for language, result in scored.items():
        for measure in result.measures:
            found[f"eval/{measure.name}/{language}"] = measure.value
            values.setdefault(f"eval/{measure.name}", []).append(measure.value)
    return {name: float(np.mean(part)) for name, part in values.items()} | found
