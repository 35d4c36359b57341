"""What an evaluation needs, read and checked before any weights are loaded.

Files of predictions, adapters, chat templates, prompts and old answers: whatever is wrong with one
of them is reported within seconds, not after an hour of answers.

    base = open_base(config)
    asked = prepare(base, Entrant('sft', 'runs/sft/adapter'), golds, Path('runs/eval/sft'))
    texts = answer(asked.ask, asked.known, lambda: asked.system(base), base)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxalign.base import Base
from jaxalign.data.tasks import Example
from jaxalign.data.template import Prompts
from jaxalign.evaluate.answers import Answers
from jaxalign.evaluate.ask import Ask, ask
from jaxalign.evaluate.entrants import Entrant
from jaxalign.evaluate.gold import kind_of
from jaxalign.generate import System
from jaxalign.hf.find import locate
from jaxalign.hf.peft import weights_digest
from jaxalign.multihost import is_main
from jaxalign.settings.data import UNASKED
from jaxalign.terminal import visible

ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class Asked:
    """One entrant that has a model, ready to answer."""

    entrant: Entrant
    ask: Ask
    known: Answers | None  # on the first process, where they are kept
    notes: tuple[str, ...]  # sentences that a reader of the scores needs

    def system(self, base: Base) -> System:
        """What answers: the base, with its weights, as this entrant wears it."""
        if self.entrant.kind == "adapter":
            return base.wear(self.entrant.source)
        return base.bare()


def prepare(
    base: Base, entrant: Entrant, examples: Sequence[Example], answers: Path | None = None
) -> Asked:
    """The questions to an entrant and its old answers.

    Args:
      base: without its weights.
      entrant: not one of predictions.
      examples: what is asked.
      answers: the file that keeps its answers; None: they are not kept.

    Raises:
      UserError: an adapter of another base, a template or prompt that cannot be used, answers of
        other settings.
    """
    how, notes, adapter = base.prompts, [], None
    if entrant.kind == "adapter":
        _, adapter = base.opened.adapter(entrant.source)
        how = base.prompts_of(entrant.source)
        folder = locate(entrant.source)
        notes += [
            doubt(folder, entrant.source) for doubt in (base.opened.doubt, base.opened.rounding)
        ]
        # Finished rows know no template.
        notes += [how.note, how.system_note] if kind_of(base.config) not in UNASKED else []
    questions, cut = ask(base, examples, how, adapter)
    if cut:
        notes.append(f"{entrant.name}: {cut} prompts were cut from the left to leave room")
    known = None
    if answers is not None and is_main():
        known = Answers(answers, identity(base, entrant, how, questions))
    if known and known.damaged:
        notes.append(
            f"{answers}: {known.damaged} lines are not what was written; their answers are "
            "written again"
        )
    return Asked(entrant, questions, known, tuple(filter(None, notes)))


def tell(notes: Sequence[str], console: Console) -> None:
    """Prints sentences that are not errors; empty ones say nothing."""
    for note in filter(None, notes):
        console.print(f"note: {visible(note)}", style="yellow", soft_wrap=True)


def identity(base: Base, entrant: Entrant, how: Prompts, questions: Ask) -> dict[str, Any]:
    """What answers depend on besides their questions."""
    config = base.config
    adapter = weights_digest(entrant.source) if entrant.kind == "adapter" else ""
    return {
        "base": base.fingerprint,
        "adapter_weights": adapter,
        "dtype": config.model.stored,
        "stop_tokens": sorted(base.stops(how)),
        **questions.settings(base),
    }
