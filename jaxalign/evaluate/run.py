"""`jaxalign evaluate`: several systems answer the same questions, are scored and compared.

    entrants = [Entrant('base'), Entrant('sft', 'runs/sft/adapter'),
                Entrant('aligned', 'runs/aligned/adapter')]
    comparison = evaluate(config, entrants, 'runs/evaluation')

Entrants of one name are seeds of one system. The first name is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxalign.base import Base, open_base
from jaxalign.errors import UserError
from jaxalign.evaluate.answers import answer, made_by
from jaxalign.evaluate.comparable import System, check_groups
from jaxalign.evaluate.compare import Comparison, compare
from jaxalign.evaluate.draw import draw
from jaxalign.evaluate.entrants import Entrant as Entrant
from jaxalign.evaluate.entrants import folder_names
from jaxalign.evaluate.gold import (
    Golds,
    columns_note,
    kind_of,
    read_golds,
    solved_examples,
    with_shots,
)
from jaxalign.evaluate.measure import Gold, Scored
from jaxalign.evaluate.predictions import read_predictions, write_predictions
from jaxalign.evaluate.prepare import ANSWERS_FILE, Asked, prepare, tell
from jaxalign.evaluate.report import PICTURE, withdraw, write
from jaxalign.evaluate.scorers import SCORERS, rehearse
from jaxalign.evaluate.seen import seen
from jaxalign.evaluate.show import show
from jaxalign.multihost import barrier, is_main
from jaxalign.paths import check_writable
from jaxalign.settings import Config
from jaxalign.terminal import console, visible

Texts = dict[str, list[str]]  # language -> answers, in the order of its rows


def evaluate(config: Config, entrants: Sequence[Entrant], out: str) -> Comparison | None:
    """Answers what is not answered yet, scores, compares, writes the reports.

    Args:
      config: `evaluate.*` names the data, `generate.*` the decoding, `model.*` the base, which is
        read only if an entrant needs it.
      entrants: who takes part; the first is the baseline.
      out: folder of answers, predictions and reports.

    Returns:
      The comparison on the first process, None on the others.

    Raises:
      UserError: anything in the settings, the data, an adapter or a file that cannot work.
    """
    golds = read_golds(config)
    known = seen(golds, entrants) if is_main() else []
    tell([columns_note(config), *known], console())
    found = scored(config, entrants, out, golds=golds)
    if not is_main():
        return None
    comparison = compare(
        [System(name, runs) for name, runs in found.items()],
        config.evaluate.groups,
        draws=config.evaluate.draws,
        seed=config.seed,
        notes=known,
    )
    screen = console()
    show(comparison, screen)
    pictures = {PICTURE: partial(draw, comparison)} if len(found) > 1 else {}
    title = f"{kind_of(config)}: {', '.join(found)}"
    paths = write(comparison, Path(out), title, pictures, _identities(entrants, out))
    written = f"written: {', '.join(str(path) for path in paths)}"
    screen.print(visible(written))
    return comparison


def scored(
    config: Config,
    entrants: Sequence[Entrant],
    out: str,
    base: Base | None = None,
    golds: Golds | None = None,
) -> dict[str, list[dict[str, Scored]]]:
    """Answers what is not answered yet and scores; arguments and errors are those of `evaluate`.

    Everything that can be wrong is looked at before the base's weights are loaded; they are not
    loaded at all where every answer is known.

    Args:
      base: the base of this configuration, where it is opened already.
      golds: the evaluated rows, where they are read already.

    Returns:
      Name -> language -> scores, of each entrant of that name; {} on processes but the first.
    """
    if not entrants:
        raise UserError("nothing to evaluate; name --base, --adapter or --predictions")
    labels = folder_names(entrants)
    check_groups(config.evaluate.groups)
    golds = golds or read_golds(config)
    rehearse(kind_of(config), golds, config.evaluate.options)
    for label in ("", *labels):
        check_writable(Path(out, label), "--out")
    texts: dict[str, Texts] = {
        label: read_predictions(entrant.source, golds)
        for label, entrant in zip(labels, entrants, strict=True)
        if entrant.kind == "predictions"
    }
    texts |= _answers(config, entrants, labels, golds, out, console(), base)
    found: dict[str, list[dict[str, Scored]]] = {}
    for entrant, label in zip(entrants, labels, strict=True) if is_main() else ():
        scores = score(config, golds, texts[label])
        write_predictions(Path(out, label), golds, texts[label], scores)
        found.setdefault(entrant.name, []).append(scores)
    barrier("evaluated")
    return found


def _identities(entrants: Sequence[Entrant], out: str) -> dict[str, list[dict[str, Any]]]:
    """System -> what the answers of each of its runs were made with; {} of predictions."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entrant, label in zip(entrants, folder_names(entrants), strict=True):
        known = entrant.kind != "predictions"
        identity = made_by(Path(out, label, ANSWERS_FILE)) if known else {}
        found.setdefault(entrant.name, []).append(identity)
    return found


def score(config: Config, golds: Golds, texts: Texts) -> dict[str, Scored]:
    """Each language's answers judged by the scorer of the task's kind."""
    scorer = SCORERS[kind_of(config)]
    return {
        language: scorer(rows, _judged(rows, texts[language]), **config.evaluate.options).of(rows)
        for language, rows in golds.items()
    }


def _judged(golds: Sequence[Gold], texts: Sequence[str]) -> list[str]:
    """The parts of answers that are judged."""
    return [gold.example.read(text) for gold, text in zip(golds, texts, strict=True)]


def _answers(
    config: Config,
    entrants: Sequence[Entrant],
    labels: Sequence[str],
    golds: Golds,
    out: str,
    screen: Console,
    base: Base | None,
) -> dict[str, Texts]:
    """Folder name -> what the models among the entrants write."""
    models = [
        (label, entrant)
        for label, entrant in zip(labels, entrants, strict=True)
        if entrant.kind != "predictions"
    ]
    if not models:
        return {}
    base = base.under(config) if base else open_base(config)
    waiting: dict[str, Asked] = {}
    for label, entrant in models:
        shown = golds
        if entrant.kind == "few_shot":
            shown = with_shots(golds, solved_examples(config))
        examples = [gold.example for rows in shown.values() for gold in rows]
        waiting[label] = prepare(base, entrant, examples, Path(out, label, ANSWERS_FILE))
        tell(waiting[label].notes, screen)
    if is_main():
        withdraw(Path(out))  # a run that dies must not leave old scores beside new answers
    found: dict[str, Texts] = {}
    for label, asked in waiting.items():
        flat = iter(
            answer(
                asked.ask,
                asked.known,
                lambda asked=asked: asked.system(base),  # type: ignore[misc]
                base,
                label,
            )
        )
        found[label] = {language: [next(flat) for _ in rows] for language, rows in golds.items()}
    return found
