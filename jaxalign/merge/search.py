"""Weights chosen by a validation score: every candidate is merged in memory and judged.

The base is loaded once. Scores are those of the evaluation, or the task's loss on the same rows;
each candidate is asked by the chat template that would be written with it.

    found = search(config, paths, Recipe('delta'), [[0, 0.25, 0.5, 0.75, 1]], 'runs/merged')
    found.candidates[found.best].weights       # runs/merged/adapter, search.json, search.png
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import jax
from rich.table import Table

from jaxalign.adapters.lora import Lora
from jaxalign.base import Base, open_base
from jaxalign.data.loader import TaskStream
from jaxalign.data.sources import nearest
from jaxalign.data.streams import stream_of
from jaxalign.data.template import Prompts, other_instruction, prompts_by
from jaxalign.errors import UserError
from jaxalign.evaluate.ask import answers, ask
from jaxalign.evaluate.comparable import ALL
from jaxalign.evaluate.entrants import name_of
from jaxalign.evaluate.gold import Golds, kind_of, read_golds
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.prepare import tell
from jaxalign.evaluate.progress import Bar
from jaxalign.evaluate.report import label
from jaxalign.evaluate.run import score
from jaxalign.evaluate.scorers import rehearse
from jaxalign.hf.files import write_json
from jaxalign.hf.find import locate
from jaxalign.merge.algebra import Merged, combine
from jaxalign.merge.check import check
from jaxalign.merge.draw import draw
from jaxalign.merge.grid import Mix, combinations
from jaxalign.merge.methods import Recipe
from jaxalign.merge.run import SEARCH_FILE, check_out, replaced, write_adapter
from jaxalign.merge.scored import LOSS, Candidate, Scores, Search
from jaxalign.merge.source import (
    AdapterFolder,
    check_weights,
    read_adapters,
    template_of,
    warn,
    warn_templates,
    with_templates,
)
from jaxalign.merge.tell import show
from jaxalign.multihost import barrier, is_main
from jaxalign.settings import Config
from jaxalign.settings.data import UNASKED
from jaxalign.sharding import put_batch, row_ways, rows_here, shard_tree
from jaxalign.terminal import console
from jaxalign.train.phases.build import lora_weights
from jaxalign.train.phases.task import TASK
from jaxalign.train.state import Frozen
from jaxalign.train.step import make_eval_step


def search(
    config: Config,
    paths: Sequence[str],
    recipe: Recipe,
    grids: Sequence[Sequence[float]],
    out: str,
    *,
    metric: str = "",
    data: Sequence[str] = (),
    existing: str = "refuse",
) -> Search | None:
    """Judges every candidate and writes the best as an adapter, with a table and a picture.

    Args:
      config: the base (`model.*`), the task, and how it is decoded and scored.
      paths: PEFT folders or hub names over that base.
      recipe: how each candidate is merged.
      grids: see `combinations`.
      out: folder of `adapter`, search.json and search.png.
      metric: a measure of the task's kind, or `loss`; empty: the kind's main score.
      data: rows to judge by; empty: `task.valid`. Not `evaluate.data`: weights that were chosen on
        test rows say nothing about other rows.
      existing: what to do where `out` is not empty, `refuse` or `replace`.

    Returns:
      What was found on the first process, None on the others.

    Raises:
      UserError: anything in the settings, the data, the adapters or the grids that cannot work.
    """
    candidates = combinations(grids, len(paths))
    check_out(out, [*paths, config.model.path], existing)
    judged = _validation(config, data)
    golds = read_golds(judged)
    metric = _check_metric(judged, golds, metric)
    base = open_base(config)
    sources = read_adapters(paths, base.opened)
    screen = console()
    warn(sources, screen, used=True)
    for weights in candidates:
        if any(weights):
            check(_weighed(sources, weights), base.spec, recipe)
    check_weights(sources, base.opened)
    tell([*_instructions(judged, sources)], screen)
    how = _Loss if metric == LOSS else _Answers
    judges: dict[tuple[str, str], _Loss | _Answers] = {}  # one for all that are asked alike
    judge_of: dict[Mix, _Loss | _Answers] = {}
    for weights in candidates:
        prompts = _prompts(judged, base, sources, weights)
        asked = prompts.template, str(prompts.tokenizer.chat_template)
        if asked not in judges:
            judges[asked] = how(base, judged, golds, prompts)
            if prompts.note:
                screen.print(f"note: {prompts.note}", style="yellow")
        judge_of[weights] = judges[asked]
    found: list[Candidate] = []
    rows = sum(judge.rows for judge in judge_of.values())
    with Bar("candidates", rows, config.log.progress) as bar:
        for weights in candidates:
            merged = _merged(sources, weights, base, recipe)
            found.append(Candidate(weights, judge_of[weights](merged, bar)))
    result = Search(_names(paths), recipe.method, metric, _groups(config, golds), found)
    barrier("searched")
    best = found[result.best].weights
    merged = _merged(sources, best, base, recipe)
    name = f"{out}/adapter"
    with replaced(out, existing, sealed=["adapter"] if merged else []) as folder:
        if merged:
            warn_templates(sources, best, screen)
            write_adapter(merged, sources, best, base.opened, recipe, name, folder / "adapter")
        if is_main():
            write_json(folder / SEARCH_FILE, result.as_json())
            draw(result, folder / "search.png")
    if not is_main():
        return None
    screen.print(_table(result))
    if merged:
        show(merged, sources, best, recipe, name, screen)
    else:
        screen.print("the bare base (every weight 0) is the best, so no adapter is written")
    screen.print(f"written: {out}/search.json, {out}/search.png")
    return result


# Candidates ---------------------------------------------------------------------------------------


def _weighed(sources: Sequence[AdapterFolder], weights: Mix) -> list:
    return [source.weighted(weight) for source, weight in zip(sources, weights, strict=True)]


def _merged(
    sources: Sequence[AdapterFolder], weights: Mix, base: Base, recipe: Recipe
) -> Merged | None:
    """None where every weight is 0: the bare base."""
    return combine(_weighed(sources, weights), base.spec, recipe) if any(weights) else None


def _names(paths: Sequence[str]) -> list[str]:
    """Short names, numbered where two would be the same."""
    names = [name_of(path) for path in paths]
    return [
        name if names.count(name) == 1 else f"{name} {names[: at + 1].count(name)}"
        for at, name in enumerate(names)
    ]


def _prompts(config: Config, base: Base, sources: Sequence[AdapterFolder], weights: Mix) -> Prompts:
    """A candidate is asked as its merged adapter will be: by the template written with that."""
    if not any(weights) or kind_of(config) in UNASKED:
        return base.prompts
    text = template_of(sources, weights, base.opened.files).text
    taught = with_templates(sources, weights)
    owner = taught[0].path if taught else "the merged adapter"
    found = prompts_by(base.tokenizer, config.prompt.template, text, owner)
    return dataclasses.replace(found, system=config.prompt.system)


def _instructions(config: Config, sources: Sequence[AdapterFolder]) -> Iterator[str]:
    """Sentences where a run has set another: with a merged adapter no instruction is recorded."""
    for source in sources if kind_of(config) not in UNASKED else ():
        if trained := other_instruction(config, locate(source.path), source.path):
            yield f"{trained}; set prompt.system as it will be when the merged adapter is used"


# Judging ------------------------------------------------------------------------------------------


class _Answers:
    """Scores what a candidate writes."""

    def __init__(self, base: Base, config: Config, golds: Golds, prompts: Prompts) -> None:
        self.base, self.config, self.golds, self.asked = base, config, golds, prompts
        examples = [gold.example for rows in golds.values() for gold in rows]
        self.questions, _ = ask(base, examples, prompts)
        self.rows = len(self.questions.prompts)

    def __call__(self, merged: Merged | None, bar: Bar) -> Scores:
        base = self.base
        if merged:
            system = base.attach(merged.lora, merged.adapter, self.asked)
        else:
            system = base.system(base.decoder(), base.params, None, self.asked)
        texts = iter(answers(self.questions, base, system, bar.advance))
        scored = score(
            self.config,
            self.golds,
            {language: [next(texts) for _ in rows] for language, rows in self.golds.items()},
        )
        scores: Scores = {}
        for language, found in scored.items():
            for measure in found.measures:
                scores.setdefault(measure.name, {})[language] = measure.value
        return scores


class _Loss:
    """The task's loss on the rows that `_Answers` asks, by language: no text is generated."""

    def __init__(self, base: Base, config: Config, golds: Golds, prompts: Prompts) -> None:
        self.base, self.config = base, config
        self.streams = {
            language: _stream(config, rows, prompts, base) for language, rows in golds.items()
        }
        self.rows = sum(len(stream.rows) for stream in self.streams.values())
        self.steps: dict[Lora | None, Any] = {}  # one program for all candidates of a shape

    def _step(self, adapter: Lora | None) -> Any:
        if adapter not in self.steps:
            alone = dataclasses.replace(self.config, objectives=[])
            phase = TASK.build(alone, self.base.decoder(adapter), lora_weights)
            self.steps[adapter] = make_eval_step(phase)
        return self.steps[adapter]

    def __call__(self, merged: Merged | None, bar: Bar) -> Scores:
        base = self.base
        step, lora = self._step(merged.adapter if merged else None), None
        if merged:
            lora = jax.device_put(merged.lora, shard_tree(base.mesh, merged.lora))
        means = {}
        with jax.set_mesh(base.mesh):
            for language, stream in self.streams.items():
                total, count = 0.0, 0.0
                places = rows_here(base.mesh, stream.size)
                for number in range(stream.epoch_batches):
                    batch = stream.batch(number, places)
                    losses, _ = step(lora, Frozen(base.params), put_batch(base.mesh, batch))
                    (loss,) = losses.values()
                    total, count = total + float(loss.sum), count + float(loss.count)
                    bar.advance(stream.real_rows(number), 0)
                means[language] = total / max(count, 1.0)
        return {LOSS: means}


def _stream(config: Config, golds: Sequence[Gold], prompts: Prompts, base: Base) -> TaskStream:
    """The rows of a language with their answers, as a training has them, but whole.

    Raises:
      UserError: a row that is longer than the model or its tokenizer takes.
    """
    how = dataclasses.replace(config.prompt, template=prompts.template)
    task = dataclasses.replace(config.task, kind=kind_of(config))
    # `batch.max_length` and the buckets are of a training: who judges leaves no row out.
    limit = min(base.spec.max_position, prompts.tokenizer.model_max_length)
    batch = dataclasses.replace(config.batch, max_length=limit, buckets=[])
    asked = dataclasses.replace(config, prompt=how, task=task, batch=batch)
    examples = [gold.example for gold in golds]
    stream = stream_of(examples, asked, prompts.tokenizer, ways=row_ways(base.mesh))
    whole = {row.origin for row in stream.rows if row.whole <= limit}
    if long := next((one.origin for one in examples if one.origin not in whole), ""):
        raise UserError(
            f"{long}: the row is longer than the {limit} tokens that the model takes, so its loss "
            "would be that of a part; leave it out of the rows to judge by"
        )
    return stream


def _validation(config: Config, data: Sequence[str]) -> Config:
    """The configuration whose evaluation's rows are those to judge by."""
    rows = list(data) or config.task.valid
    if not rows:
        raise UserError("task.valid is empty; name the rows to choose weights by: --data FILE")
    own = [one for one in config.task.transforms if "valid" in _splits(one)]
    if own and not data and not config.evaluate.transforms:
        raise UserError(
            "task.transforms: a search reads the rows of task.valid through evaluate.transforms; "
            "repeat there what they need, without splits"
        )
    judged = dataclasses.replace(
        config.evaluate,
        data=rows,
        columns=config.evaluate.columns if data else config.task.columns,
        groups={},  # they may name languages that only the test has
    )
    return dataclasses.replace(config, evaluate=judged)


def _splits(transform: Any) -> Sequence[str]:
    """The splits that an entry of `task.transforms` names."""
    return (transform.get("splits") or ()) if isinstance(transform, dict) else ()


def _check_metric(config: Config, golds: Golds, metric: str) -> str:
    """The measure's name, before anything is computed."""
    found = rehearse(kind_of(config), golds, config.evaluate.options)
    known = list(dict.fromkeys(chain.from_iterable(found.values())))
    if metric and metric not in (*known, LOSS):
        raise UserError(
            f"--metric: {metric!r} is not measured for {kind_of(config)}; choose among "
            f"{', '.join([*known, LOSS])}{nearest(metric, [*known, LOSS])}"
        )
    return metric or known[0]


def _groups(config: Config, golds: Golds) -> dict[str, list[str]]:
    """The groups of `evaluate.groups` as far as there are rows, and all languages."""
    groups = {
        name: [language for language in named if language in golds]
        for name, named in config.evaluate.groups.items()
    }
    return {name: inside for name, inside in groups.items() if inside} | {ALL: list(golds)}


# Telling ------------------------------------------------------------------------------------------


def _table(found: Search) -> Table:
    what = "loss" if found.metric == LOSS else label(found.metric)
    table = Table(title=f"{what} by weights ({found.method})", title_justify="left", box=None,
                  header_style="bold")  # fmt: skip
    for name in found.adapters:
        table.add_column(name, justify="right")
    for group, languages in found.groups.items():
        table.add_column(f"{group} ({len(languages)})", justify="right")
    digits = 3 if found.metric == LOSS else 1
    for number, candidate in enumerate(found.candidates):
        values = [found.of_group(candidate, group) for group in found.groups]
        table.add_row(
            *(f"{weight:g}" for weight in candidate.weights),
            *("-" if math.isnan(value) else f"{value:.{digits}f}" for value in values),
            style="bold" if number == found.best else "",
        )
    return table
