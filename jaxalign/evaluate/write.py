"""`jaxalign generate`: answers to prompts (printed) or to rows of data (JSONL), nothing judged.

write(config, 'runs/demo/adapter', prompts=['wake me up at nine'], data=[], out='')
write(config, 'runs/demo/adapter', prompts=[], data=['test.de.jsonl'], out='answers.jsonl')
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from jaxalign.base import decoding_of, load_base
from jaxalign.data.sources import Record
from jaxalign.data.tasks import render
from jaxalign.errors import UserError
from jaxalign.evaluate.answers import answer
from jaxalign.evaluate.gold import BLANK, kind_of, questions
from jaxalign.evaluate.run import Entrant, identity, tell_note
from jaxalign.multihost import is_main
from jaxalign.settings import Config

ASKED = {  # the field that a prompt of the command line fills
    "rows": "prefix",
    "slots": "utterance",
    "intent": "utterance",
    "intent_slots": "utterance",
    "ner": "text",
}


def write(
    config: Config, adapter: str, prompts: Sequence[str], data: Sequence[str], out: str
) -> None:
    """Answers with the base, or with the base and an adapter.

    Prompts are asked as the task's rows are (instruction, template). Rows that were answered
    before are not generated again: what is finished is kept in `OUT.cache` while the run lives
    and after it.

    Raises:
      UserError: neither prompts nor data, or anything in them that cannot work.
    """
    if prompts and data:
        raise UserError("give --prompt or --data, not both")
    data = data or config.evaluate.data
    if not prompts and not data:
        raise UserError("nothing to answer; give --prompt TEXT, or --data FILE")
    base = load_base(config)
    system = base.wear(adapter) if adapter else base.bare()
    console = Console(quiet=not is_main(), highlight=False)
    tell_note(config, system, console)
    if prompts:
        asked = [render(kind_of(config), _asked(config, text)) for text in prompts]
        ids, _ = base.encode(asked, system.prompts)
        answers = system.write(ids, decoding_of(config), config.generate.batch)
        for text in base.decode(answers):
            console.print(text, markup=False)
        return
    path = Path(out or f"{config.output}/answers.jsonl")
    golds = questions(config, data)
    entrant = Entrant("", adapter, "adapter" if adapter else "base")
    cache = path.with_name(path.name + ".cache")
    texts, cut = answer(base, system, golds, cache, identity(config, entrant, system))
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(path.name + ".new")
        with whole.open("w", encoding="utf-8") as file:
            for gold, text in zip(golds, texts, strict=True):
                row = {"id": gold.id, "language": gold.language,
                       "question": gold.example.prompt, "answer": text}  # fmt: skip
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        whole.replace(path)
        more = f", {cut} prompts cut from the left" if cut else ""
        console.print(f"{len(texts)} answers{more}; written: {path}")


def _asked(config: Config, text: str) -> Record:
    kind = kind_of(config)
    if kind not in ASKED:
        raise UserError(
            f"--prompt does not say enough for {kind} (which languages?); give rows with --data"
        )
    return Record(BLANK[kind] | {ASKED[kind]: text}, "--prompt")
