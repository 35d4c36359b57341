"""Files of predictions: one row a question, written next to the scores and scored without a model.

texts = read_predictions('runs/eval/sft/predictions.jsonl', golds)     # {'de': ['...', ...]}
write_predictions(Path('runs/eval/sft'), golds, texts, scored)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.checksums import check_sums, summed
from jaxalign.data import sources
from jaxalign.errors import UserError, brief, reading
from jaxalign.evaluate.gold import Golds
from jaxalign.evaluate.measure import Gold, Scored
from jaxalign.paths import whole_file

PREDICTIONS_FILE = "predictions.jsonl"
JSON_LINES = (".jsonl", ".ndjson")
# What a prediction may say of the row that it answers, and what the data says; None: nothing.
SAID: dict[str, Callable[[Gold], Any]] = {
    "language": lambda gold: gold.example.language or None,
    "id": lambda gold: gold.fields.get("id"),
    "question": lambda gold: gold.example.prompt,
    "reference": lambda gold: gold.example.answer,
}


def read_predictions(file: str, golds: Golds) -> dict[str, list[str]]:
    """Answers from a file: JSONL rows with `answer`, or plain text with one answer a line.

    JSONL rows that all name `language` and `id` (as `predictions.jsonl` does) are matched by them,
    others by their order, which is that of the data. Whatever a row says of what it answers is
    compared with the data (`SAID`): ids may be those of other rows, such as numbers.

    Raises:
      UserError: an empty file, one of JSON lines that is called otherwise, another number of
        answers than rows, an unknown language or id, an answer to another row.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such predictions file")
    check_sums(path.parent, [path.name])
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text in UTF-8; convert it") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    if not text.strip():
        raise UserError(f"{file} is empty; it should hold one answer for each row")
    if path.suffix.lower() in JSON_LINES:
        with reading(file, "rows of JSON"):
            records = sources.read(file)
        if all({"language", "id"} <= record.fields.keys() for record in records):
            return _by_name(file, records, golds)
    else:
        lines = text.removesuffix("\n").split("\n")
        if all(_answers(line) for line in lines if line.strip()):
            raise UserError(
                f"{file} holds rows of JSON with 'answer', but its name says plain text, of which "
                f"each line is an answer; call it {path.with_suffix('.jsonl').name}"
            )
        records = [
            sources.Record({"answer": line}, f"{file}:{number}")
            for number, line in enumerate(lines, 1)
        ]
    return _by_order(file, records, golds)


def in_order(golds: Golds) -> list[Gold]:
    """The rows of all languages in the order of the data."""
    return sorted((gold for rows in golds.values() for gold in rows), key=lambda gold: gold.number)


def _answers(line: str) -> bool:
    """Whether a line is a JSON object with an answer in it."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "answer" in found


def _answer(record: sources.Record) -> str:
    if not isinstance(record.fields.get("answer"), str):
        raise UserError(f"{record.origin}: this row has no text under 'answer'")
    return record.fields["answer"]


def _check(record: sources.Record, gold: Gold) -> None:
    """Refuses an answer to another row than this one."""
    for name, of in SAID.items():
        said, known = record.fields.get(name), of(gold)
        if said is not None and known is not None and str(said) != str(known):
            raise UserError(
                f"{record.origin}: {name} is {brief(said)}, but {brief(known)} in the row that "
                f"this would be the answer to ({gold.example.origin}); name the data that was "
                f"answered in evaluate.data, or remove {name!r} from the file if it means "
                "something else"
            )


def _by_order(file: str, records: Sequence[sources.Record], golds: Golds) -> dict[str, list[str]]:
    answers, rows = [_answer(record) for record in records], in_order(golds)
    if len(answers) != len(rows):
        have = ", ".join(f"{language} {len(part)}" for language, part in golds.items())
        raise UserError(
            f"{file} holds {len(answers)} answers, evaluate.data {len(rows)} rows ({have}); they "
            "must be the same rows in the same order"
        )
    texts: dict[str, list[str]] = {language: [] for language in golds}
    for record, answer, gold in zip(records, answers, rows, strict=True):
        _check(record, gold)
        texts[gold.language].append(answer)
    return texts


def _by_name(file: str, records: Sequence[sources.Record], golds: Golds) -> dict[str, list[str]]:
    found: dict[tuple[str, str], list[sources.Record]] = {}
    for record in records:
        language = str(record.fields["language"])
        if language not in golds:
            raise UserError(
                f"{record.origin}: unknown language {language!r}; evaluate.data has "
                f"{', '.join(golds)}{sources.nearest(language, golds)}"
            )
        found.setdefault((language, str(record.fields["id"])), []).append(record)
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
            record = waiting.pop(0)
            texts.setdefault(language, []).append(_answer(record))
            _check(record, row)
    left = next((key for key, waiting in found.items() if waiting), None)
    if left:
        raise UserError(
            f"{file} answers row {left[1]!r} of {left[0]} twice, or evaluate.data does not have it"
        )
    return texts


def write_predictions(
    folder: Path, golds: Golds, texts: dict[str, list[str]], scored: dict[str, Scored]
) -> None:
    """`predictions.jsonl`: one row for each question, in the order of the data.

    Written whole or not at all, with its checksum, by which `read_predictions` knows it again.
    """
    said = {
        language: iter(zip(texts[language], scored[language].read, strict=True))
        for language in golds
    }
    rows = (_row(gold, *next(said[gold.language])) for gold in in_order(golds))
    with summed(folder, [PREDICTIONS_FILE]):
        write_rows(folder / PREDICTIONS_FILE, rows)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file, written whole or not at all."""
    with whole_file(path) as new, new.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _row(gold: Gold, text: str, read: Any) -> dict[str, Any]:
    return {
        "id": gold.id,
        "language": gold.language,
        "question": gold.example.prompt,
        "reference": gold.example.answer,
        "answer": text,
        "read": read,
    }
