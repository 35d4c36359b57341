"""Files of predictions: one row a question, written next to the scores and scored without a model.

texts = read_predictions('runs/eval/sft/predictions.jsonl', golds)     # {'de': ['...', ...]}
write_predictions(Path('runs/eval/sft'), golds, texts, scored)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.checksums import check_sums, summed
from jaxalign.data import sources
from jaxalign.errors import UserError, reading
from jaxalign.evaluate.gold import Golds
from jaxalign.evaluate.measure import Gold, Scored
from jaxalign.paths import whole_file

PREDICTIONS_FILE = "predictions.jsonl"


def read_predictions(file: str, golds: Golds) -> dict[str, list[str]]:
    """Answers from a file: JSONL rows with `answer`, or plain text with one answer a line.

    JSONL rows that name `language` and `id` (as `predictions.jsonl` does) are matched by them; all
    others by their order, language by language in the order of the data.

    Raises:
      UserError: an empty file, another number of answers than rows, an unknown language or id.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file of predictions")
    check_sums(path.parent, [path.name])
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text in UTF-8; convert it") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    if not text.strip():
        raise UserError(f"{file} is empty; it should hold one answer for each row")
    rows = sum(map(len, golds.values()))
    if path.suffix == ".jsonl":
        with reading(file, "rows of JSON"):
            records = sources.read(file)
        named = all({"language", "id"} <= record.fields.keys() for record in records)
        if named:
            return _by_name(file, records, golds)
        answers = [_answer(record) for record in records]
    else:
        answers = text.removesuffix("\n").split("\n")
    if len(answers) != rows:
        have = ", ".join(f"{language} {len(part)}" for language, part in golds.items())
        raise UserError(
            f"{file} holds {len(answers)} answers, evaluate.data {rows} rows ({have}); they must "
            "be the same rows in the same order, language by language"
        )
    parts = iter(answers)
    return {language: [next(parts) for _ in part] for language, part in golds.items()}


def _answer(record: sources.Record) -> str:
    if not isinstance(record.fields.get("answer"), str):
        raise UserError(f"{record.origin}: this row has no text under 'answer'")
    return record.fields["answer"]


def _by_name(file: str, records: Sequence[sources.Record], golds: Golds) -> dict[str, list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        language = str(record.fields["language"])
        if language not in golds:
            raise UserError(
                f"{record.origin}: unknown language {language!r}; evaluate.data has "
                f"{', '.join(golds)}{sources.nearest(language, golds)}"
            )
        found.setdefault((language, str(record.fields["id"])), []).append(_answer(record))
    texts: dict[str, list[str]] = {}
    for language, rows in golds.items():
        for row in rows:
            waiting = found.get((language, row.id))
            if not waiting:
                raise UserError(
                    f"{file} has no answer to row {row.id!r} of {language} "
                    f"({row.example.origin}); {len(records)} answers, "
                    f"{sum(map(len, golds.values()))} rows"
                )
            texts.setdefault(language, []).append(waiting.pop(0))
    left = next((key for key, waiting in found.items() if waiting), None)
    if left:
        raise UserError(
            f"{file} answers row {left[1]!r} of {left[0]}, which evaluate.data has not (or twice)"
        )
    return texts


def write_predictions(
    folder: Path, golds: Golds, texts: dict[str, list[str]], scored: dict[str, Scored]
) -> None:
    """`predictions.jsonl`: one row for each question, in the order of the data.

    Written whole or not at all, with its checksum, by which `read_predictions` knows it again.
    """
    rows = (
        _row(gold, text) | {"read": read}
        for language, golds_of in golds.items()
        for gold, text, read in zip(golds_of, texts[language], scored[language].read, strict=True)
    )
    with summed(folder, [PREDICTIONS_FILE]):
        write_rows(folder / PREDICTIONS_FILE, rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file, written whole or not at all."""
    with whole_file(path) as new, new.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _row(gold: Gold, text: str) -> dict[str, Any]:
    return {
        "id": gold.id,
        "language": gold.language,
        "question": gold.example.prompt,
        "reference": gold.example.answer,
        "answer": text,
    }
