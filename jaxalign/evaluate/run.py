"""`jaxalign evaluate`: several systems answer the same questions, are scored and compared.

    entrants = [Entrant('base'), Entrant('sft', 'runs/sft/adapter'),
                Entrant('aligned', 'runs/aligned/adapter')]
    comparison = evaluate(config, entrants, 'runs/evaluation')

Entrants of one name are seeds of one system. The first name is what the others are compared with.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxalign.base import Base, System, load_base, weights_digest
from jaxalign.data.sources import nearest
from jaxalign.errors import UserError
from jaxalign.evaluate.answers import answer
from jaxalign.evaluate.compare import Comparison, compare
from jaxalign.evaluate.compare import System as Compared
from jaxalign.evaluate.draw import draw
from jaxalign.evaluate.gold import Golds, kind_of, read_golds, solved_examples, with_shots
from jaxalign.evaluate.measure import Scored
from jaxalign.evaluate.predictions import read_predictions, write_predictions
from jaxalign.evaluate.report import show, write
from jaxalign.evaluate.scorers import SCORERS
from jaxalign.hf.load import fingerprint
from jaxalign.multihost import barrier, is_main
from jaxalign.settings import Config


@dataclass(frozen=True)
class Entrant:
    """One set of answers: a base's, an adapter's, or a file's."""

    name: str
    source: str = ""  # adapter folder or hub name, or a file of predictions; empty: the bare base
    kind: str = "adapter"  # base | few_shot | adapter | predictions


def evaluate(config: Config, entrants: Sequence[Entrant], out: str) -> Comparison | None:
    """Answers what is not answered yet, scores, compares, writes the reports.

    Args:
      config: `evaluate.*` names the data, `generate.*` the decoding, `model.*` the base, which is
        loaded only if an entrant needs it.
      entrants: who takes part; the first is the baseline.
      out: folder of answers, predictions and reports.

    Returns:
      The comparison on the first process, None on the others.

    Raises:
      UserError: anything in the settings, the data, an adapter or a file that cannot work.
    """
    if not entrants:
        raise UserError("nobody to evaluate; name --base, --adapter or --predictions")
    _check_options(config)
    golds = read_golds(config)
    base = load_base(config) if any(e.kind != "predictions" for e in entrants) else None
    found: dict[str, list[dict[str, Scored]]] = {}
    console = Console(quiet=not is_main())
    for entrant, label in zip(entrants, _labels(entrants), strict=True):
        folder = Path(out, label)
        if entrant.kind == "predictions":
            texts, cut = read_predictions(entrant.source, golds), 0
        else:
            assert base is not None  # loaded above
            texts, cut = _answers(config, base, entrant, golds, folder, console)
        if not is_main():
            continue
        if cut:
            console.print(f"{label}: {cut} prompts were cut from the left to leave room")
        scored = score(config, golds, texts)
        write_predictions(folder / "predictions.jsonl", golds, texts, scored)
        found.setdefault(entrant.name, []).append(scored)
    barrier("evaluated")
    if not is_main():
        return None
    comparison = compare(
        [Compared(name, runs) for name, runs in found.items()],
        config.evaluate.groups,
        draws=config.evaluate.draws,
        seed=config.seed,
    )
    show(comparison, console)
    paths = write(comparison, Path(out), f"{kind_of(config)}: {', '.join(found)}")
    if len(found) > 1:
        draw(comparison, Path(out, "gains.png"))
        paths.append(Path(out, "gains.png"))
    console.print(f"written: {', '.join(str(path) for path in paths)}", highlight=False)
    return comparison


def score(config: Config, golds: Golds, texts: dict[str, list[str]]) -> dict[str, Scored]:
    """Each language's answers judged by the scorer of the task's kind."""
    scorer = SCORERS[kind_of(config)]
    return {
        language: dataclasses.replace(
            scorer(rows, texts[language], **config.evaluate.options),
            ids=tuple(gold.id for gold in rows),
        )
        for language, rows in golds.items()
    }


def _check_options(config: Config) -> None:
    scorer = SCORERS[kind_of(config)]
    known = list(inspect.signature(scorer).parameters)[2:]
    for name in config.evaluate.options:
        if name not in known:
            raise UserError(
                f"evaluate.options.{name}: the scorer of {kind_of(config)} takes "
                f"{', '.join(known) or 'no options'}{nearest(name, known)}"
            )


def _labels(entrants: Sequence[Entrant]) -> list[str]:
    """A folder name for each: its name, numbered where it comes more than once."""
    names = [entrant.name for entrant in entrants]
    return [
        name if names.count(name) == 1 else f"{name}_{names[: at + 1].count(name)}"
        for at, name in enumerate(names)
    ]


def _answers(
    config: Config,
    base: Base,
    entrant: Entrant,
    golds: Golds,
    folder: Path,
    console: Console,
) -> tuple[dict[str, list[str]], int]:
    if entrant.kind == "few_shot":
        golds = with_shots(golds, solved_examples(config))
    system = base.bare() if entrant.kind != "adapter" else base.wear(entrant.source)
    tell_note(config, system, console)
    flat = [gold for rows in golds.values() for gold in rows]
    texts, cut = answer(
        base,
        system,
        flat,
        folder / "answers.jsonl",
        identity(config, entrant, system),
        entrant.name,
    )
    parts = iter(texts)
    return {language: [next(parts) for _ in rows] for language, rows in golds.items()}, cut


def tell_note(config: Config, system: System, console: Console) -> None:
    """Says where a system is not asked by `prompt.template`; finished rows know no template."""
    if system.prompts.note and kind_of(config) != "rows":
        note = f"note: {system.prompts.note}"
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)


def identity(config: Config, entrant: Entrant, system: System) -> dict[str, Any]:
    """What answers depend on besides their prompts."""
    adapter = weights_digest(entrant.source) if entrant.kind == "adapter" else ""
    settings = dataclasses.asdict(config.generate)
    for name in ("long", "batch"):  # about prompts, which are compared themselves; about speed
        settings.pop(name)
    return {
        "base": fingerprint(config.model.path, config.model.revision),
        "adapter_weights": adapter,
        "dtype": config.model.stored,
        "stop_tokens": sorted(system.stops),
        **settings,
    }
