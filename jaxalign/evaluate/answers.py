"""Answers on disk while they are written: a run that dies goes on where it stopped.

Every finished batch is appended to a file, one line an answer. An answer belongs to its prompt's
tokens (and to how often that prompt came before), so rows may be added to the data or moved, and
old answers are found again. Each line carries a checksum: one that is not what was written, such
as the torn line of a run that died, is not an answer and is written again.

    known = Answers(Path('runs/eval/sft/answers.jsonl'), identity)
    texts = answer(asked, known, lambda: base.wear('runs/sft/adapter'), base)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.base import Base
from jaxalign.checksums import seal, seal_holds
from jaxalign.errors import UserError
from jaxalign.evaluate.ask import Ask, keys_of
from jaxalign.evaluate.progress import Bar
from jaxalign.generate import System, lay_out
from jaxalign.multihost import from_main
from jaxalign.terminal import console, visible

HEAD = '{"made_by": {'  # how a file of answers begins


def answer(
    asked: Ask,
    known: Answers | None,
    system: Callable[[], System],
    base: Base,
    title: str = "answers",
) -> list[str]:
    """What the system answers to each question; what is known already is not asked again.

    Every process calls this with the same arguments; only the first one keeps answers and gets the
    texts, the others get empty ones.

    Args:
      asked: the questions.
      known: the answers on disk; None on the other processes.
      system: gives what answers; called only where an answer is missing.
      base: decodes answers.
      title: of the progress bar.

    Raises:
      UserError: answers cannot be written to disk.
    """
    keys = keys_of(asked.named)
    settings = base.config.generate
    have = np.array([known is not None and key in known.texts for key in keys])
    missing = np.flatnonzero(~from_main(have)).tolist()
    if missing:
        # Whole batches, so that an answer is bit by bit that of a run without a break.
        who = system()
        layout = lay_out(asked.prompts, settings.batch, who.share_prefix).only(missing)
        with Bar(title, layout.rows, base.config.log.progress) as bar:
            for rows, texts, tokens in asked.chunks(base, who, missing):
                bar.advance(len(rows), tokens)
                if known is not None:
                    known.add(list(zip([keys[row] for row in rows], texts, strict=True)))
        if layout.ahead:
            console().print(visible(f"{title}: {layout}"))
    return [known.texts[key] if known is not None else "" for key in keys]


def made_by(path: Path) -> dict[str, Any]:
    """What the answers of this file were made with; empty where it does not say."""
    with path.open(encoding="utf-8", errors="replace") as file:
        found = _object(file.readline()).get("made_by")
    return found if isinstance(found, dict) else {}


class Answers:
    """Known answers by key, and the file that new ones are appended to.

    Attributes:
      path: the file.
      texts: key -> answer.
      damaged: lines that were not what had been written; their answers are not known.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Reads what is there, or begins a file.

        Args:
          path: the file; made with its folder where it is not there yet.
          identity: what the answers depend on besides their prompts; JSON-ready.

        Raises:
          UserError: the file holds answers of another system or other settings, something else,
            or no line that says whose answers it holds; it cannot be read or written.
        """
        self.path = path
        self.texts: dict[str, str] = {}
        self.damaged = 0
        try:
            text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        head, _, rows = text.partition("\n")
        if head and self._check_head(head, rows, identity):
            self._read(rows)
            if not text.endswith("\n"):
                self._write([""])  # ends the torn line, so that the next one stands alone
        else:
            self._write([_line({"made_by": identity})], mode="w")

    def add(self, answers: Sequence[tuple[str, str]]) -> None:
        """Remembers answers, on disk too before it returns."""
        self.texts.update(answers)
        self._write([_line({"key": key, "answer": text}) for key, text in answers])

    def _write(self, lines: Sequence[str], mode: str = "a") -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: cannot be read and written ({error.strerror or error}); what was "
            "written before is kept: make room or choose another --out, and run the command again"
        )

    def _check_head(self, head: str, rows: str, identity: dict[str, Any]) -> bool:
        """Whether answers follow; False where a run died in the first line."""
        row = _object(head)
        if "made_by" in row and "sha256" in row and not seal_holds(row):
            row = {}
        if "made_by" in row:
            _check_same(self.path, row["made_by"], identity)
            return True
        if not rows and HEAD.startswith(head[: len(HEAD)]):
            return False
        if any("key" in _object(line) for line in rows.split("\n")):
            raise UserError(
                f"{self.path}:1: damaged, so that nothing says whose answers these are; remove "
                "the file, and they are written again"
            )
        raise UserError(f"{self.path} is not a file of answers; choose another name")

    def _read(self, rows: str) -> None:
        for line in rows.split("\n"):
            row = _object(line)
            if seal_holds(row) and isinstance(row.get("key"), str):
                self.texts[row["key"]] = row["answer"]
            elif line:
                self.damaged += 1


def _line(row: dict[str, Any]) -> str:
    return json.dumps(seal(row), ensure_ascii=False)


def _object(line: str) -> dict[str, Any]:
    """The JSON object of a line; nothing where there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_same(file: Path, then: Any, now: dict[str, Any]) -> None:
    then = then if isinstance(then, dict) else {}
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise UserError(
                f"{file} holds answers made with {name}={then.get(name)}, now it is "
                f"{now.get(name)}; choose another --out, or remove the file"
            )
