"""Answers on disk while they are written: a run that dies goes on where it stopped.

Every finished batch is appended to a file, one line an answer. An answer belongs to its prompt's
tokens (and to how often that prompt came before), so rows may be added to the data or moved, and
old answers are found again.

    texts, cut = answer(base, system, golds, Path('runs/eval/sft/answers.jsonl'), identity)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.base import Base, System, decoding_of
from jaxalign.errors import UserError
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.progress import Progress
from jaxalign.generate import chunks
from jaxalign.multihost import from_main, is_main


def answer(
    base: Base,
    system: System,
    golds: Sequence[Gold],
    path: Path,
    identity: dict[str, Any],
    title: str = "answers",
) -> tuple[list[str], int]:
    """What the system writes to each question, and how many prompts were cut.

    Every process calls this with the same arguments; only the first one reads and writes files and
    gets the texts, the others get empty ones.

    Args:
      base: encodes prompts, decodes answers.
      system: what writes.
      golds: the questions.
      path: the file that keeps what is finished; made where it is not there yet.
      identity: what the answers depend on besides their prompts; JSON-ready.
      title: of the progress bar.

    Raises:
      UserError: `path` holds answers of another system or other settings.
    """
    prompts, cut = base.encode([gold.example for gold in golds], system.prompts)
    keys = _keys(prompts)
    store = _Store(path, identity) if is_main() else None
    known = np.array([store is not None and key in store.texts for key in keys])
    known = from_main(known)
    groups = chunks([len(prompt) for prompt in prompts], base.config.generate.batch)
    missing = [i for group in groups if not all(known[i] for i in group) for i in group]
    if missing:
        parts = system.chunks(
            [prompts[i] for i in missing],
            decoding_of(base.config),
            base.config.generate.batch,
            numbers=missing,
        )
        with Progress(title, len(missing), base.config.log.progress) as bar:
            for rows, answers in parts:
                bar.advance(len(rows), sum(map(len, answers)))
                if store:
                    names = [keys[missing[row]] for row in rows]
                    store.add(list(zip(names, base.decode(answers), strict=True)))
    return [store.texts[key] if store else "" for key in keys], cut


def _keys(prompts: Sequence[Sequence[int]]) -> list[str]:
    """A name for each prompt: a digest of its tokens, and its number among equal ones."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        digest = hashlib.sha256(np.asarray(prompt, "<i4").tobytes()).hexdigest()[:20]
        keys.append(f"{digest}-{seen[digest]}")
        seen[digest] += 1
    return keys


class _Store:
    """Known answers by key, and the file that new ones are appended to."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.texts: dict[str, str] = {}
        if path.is_file() and path.stat().st_size:
            self._read(identity)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append([json.dumps({"made_by": identity}, ensure_ascii=False)])

    def add(self, answers: Sequence[tuple[str, str]]) -> None:
        """Remembers answers, on disk too before it returns."""
        self.texts.update(answers)
        self._append(
            [json.dumps({"key": k, "answer": text}, ensure_ascii=False) for k, text in answers]
        )

    def _append(self, lines: Sequence[str]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); what was written before is "
                "kept, make room and run the same command again"
            ) from error

    def _read(self, identity: dict[str, Any]) -> None:
        text = self.path.read_text("utf-8", errors="replace")
        for number, line in enumerate(text.split("\n"), 1):
            try:
                row = json.loads(line) if line else {}
            except json.JSONDecodeError:
                continue  # a line that a dying run left half written
            if number == 1 and "made_by" not in row:
                raise UserError(f"{self.path} is not a file of answers; choose another name")
            if "made_by" in row:
                _check_same(self.path, row["made_by"], identity)
            elif "key" in row:
                self.texts[row["key"]] = row["answer"]
        if not text.endswith("\n"):
            self._append([""])  # ends the torn line, so that the next one stands alone


def _check_same(file: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise UserError(
                f"{file} holds answers made with {name}={then.get(name)}, now it is "
                f"{now.get(name)}; choose another --out, or remove the file"
            )
