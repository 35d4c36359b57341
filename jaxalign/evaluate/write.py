"""`jaxalign generate`: answers to prompts (printed) or to rows of data (JSONL), nothing judged.

Answers to prompts are written, too, where a file is named.

write(config, 'runs/demo/adapter', prompts=['wake me up at nine'], data=[], out='')
write(config, 'runs/demo/adapter', prompts=[], data=['test.de.jsonl'], out='answers.jsonl')
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxalign.base import open_base
from jaxalign.data.sources import Record
from jaxalign.data.tasks import TASKS, render
from jaxalign.errors import UserError
from jaxalign.evaluate.answers import answer
from jaxalign.evaluate.ask import answers
from jaxalign.evaluate.entrants import Entrant
from jaxalign.evaluate.gold import columns_note, kind_of, questions
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.predictions import write_rows
from jaxalign.evaluate.prepare import prepare, tell
from jaxalign.multihost import is_main
from jaxalign.paths import check_file
from jaxalign.settings import Config
from jaxalign.terminal import console, say, visible


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
    entrant = Entrant("answers", adapter, "adapter" if adapter else "base")
    screen = console()
    if prompts:
        examples = [render(kind_of(config), _asked(config, text)) for text in prompts]
        if out:
            check_file(Path(out), "--out")
        base = open_base(config)
        asked = prepare(base, entrant, examples)
        tell(asked.notes, screen)
        texts = answers(asked.ask, base, asked.system(base))
        for text in texts if is_main() else ():
            say(text)
        if out:
            golds = [Gold(one, {}, str(number), one.language or "und", number)
                     for number, one in enumerate(examples)]  # fmt: skip
            _write(Path(out), golds, texts)
        return
    golds = questions(config, data)
    tell([columns_note(config)], screen)
    path = Path(out or f"{config.output}/answers.jsonl")
    check_file(path, "--out")
    base = open_base(config)
    cache = path.with_name(path.name + ".cache")
    asked = prepare(base, entrant, [gold.example for gold in golds], cache)
    tell(asked.notes, screen)
    texts = answer(asked.ask, asked.known, lambda: asked.system(base), base)
    _write(path, golds, texts)


def _write(path: Path, golds: Sequence[Gold], texts: Sequence[str]) -> None:
    """The answers as JSONL, on the first process."""
    if not is_main():
        return
    rows = (
        {"id": gold.id, "language": gold.language, "question": gold.example.prompt, "answer": text}
        for gold, text in zip(golds, texts, strict=True)
    )
    write_rows(path, rows)
    console().print(visible(f"{len(texts)} answers; written: {path}"))


def _asked(config: Config, text: str) -> Record:
    kind = kind_of(config)
    task = TASKS[kind]
    if task.asked is None:
        raise UserError(
            f"--prompt does not say enough for {kind}, whose rows hold more than a text; give rows "
            "with --data"
        )
    return Record({**task.blank, task.asked: text}, "--prompt")
