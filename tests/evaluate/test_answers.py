"""Cached answers and predictions: what is not what was written is never scored."""

import json

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.evaluate.answers import Answers
from jaxalign.evaluate.gold import questions, read_golds
from jaxalign.evaluate.predictions import in_order, read_predictions, write_predictions
from jaxalign.evaluate.run import score
from tests.evaluate.conftest import rows_of

IDENTITY = {"base": "abc", "seed": 1, "stop_tokens": [2, 7]}
WRITTEN = ["intent: a; b: c", "", "ねえ \u2028 x", 'q"\\', "\x1b[2J", "\ufffd", "line\nline"]
TEXTS = {f"key{n}-0": text for n, text in enumerate(WRITTEN)}


@pytest.fixture
def file(tmp_path):
    known = Answers(tmp_path / "answers.jsonl", IDENTITY)
    known.add(list(TEXTS.items())[:4])
    known.add(list(TEXTS.items())[4:])
    return tmp_path / "answers.jsonl"


def reopened(file):
    """The answers that are found again, or the sentence of the refusal."""
    try:
        return Answers(file, IDENTITY)
    except UserError as error:
        return str(error)


def test_answers_are_found_again(file):
    before = file.read_bytes()
    found = Answers(file, IDENTITY)
    assert found.texts == TEXTS and found.damaged == 0
    assert file.read_bytes() == before


def test_a_flipped_bit_is_never_an_answer(file):
    """Whatever bit: the answer is the one that was written, or it is not known."""
    whole = file.read_bytes()
    numbers = np.random.default_rng(0)
    lost = refused = 0
    for place in numbers.integers(0, 8 * len(whole), 400):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        file.write_bytes(bytes(damaged))
        found = reopened(file)
        if isinstance(found, str):
            refused += 1
            assert "\n" not in found and str(file) in found
            continue
        assert found.texts.items() <= TEXTS.items()
        lost += len(found.texts) < len(TEXTS)
        assert found.damaged or len(found.texts) == len(TEXTS)
    assert lost > 200 and refused > 50


def test_a_file_cut_anywhere_goes_on(file):
    """A run that dies leaves any beginning of the file: what is whole counts."""
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        found = Answers(file, IDENTITY)
        assert found.texts.items() <= TEXTS.items()
        found.add([item for item in TEXTS.items() if item[0] not in found.texts])
        assert Answers(file, IDENTITY).texts == TEXTS
    file.unlink()
    assert Answers(file, IDENTITY).texts == {}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"some notes of mine", "is not a file of answers; choose another name"),
        (b'{"answer": "x"}\n{"answer": "y"}\n', "is not a file of answers"),
        (b"\xff\xfe\x00", "is not a file of answers"),
        (b"[" * 100_000, "is not a file of answers"),
        (b'{"made_by": 5}\n', "holds answers made with base=None, now it is abc"),
    ],
)
def test_a_file_that_is_something_else_stays(tmp_path, content, message):
    file = tmp_path / "answers.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        Answers(file, IDENTITY)
    assert message in str(error.value)
    assert file.read_bytes() == content


def test_a_damaged_first_line_is_told(file):
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0].replace(b'"seed": 1', b'"seed": 3'), *lines[1:]]))
    with pytest.raises(UserError, match=r"answers.jsonl:1: damaged, .* remove the file"):
        Answers(file, IDENTITY)
    file.write_bytes(b"\n".join(lines[1:]))
    with pytest.raises(UserError, match=r"answers.jsonl:1: damaged"):
        Answers(file, IDENTITY)


@pytest.mark.parametrize("name", ["stop_tokens", "base", "seed"])
def test_answers_under_other_settings_are_not_known(file, name):
    with pytest.raises(UserError, match=rf"holds answers made with {name}="):
        Answers(file, IDENTITY | {name: [9]})


@pytest.mark.parametrize(
    "rows", ["x", '{"key": "k", "answer": "forged"}', '{"key": 5, "sha256": ""}']
)
def test_lines_without_a_checksum_do_not_count(file, rows):
    with file.open("a") as out:
        out.write(rows + "\n")
    found = Answers(file, IDENTITY)
    assert found.texts == TEXTS and found.damaged == 1


def test_a_folder_or_a_file_in_the_way(tmp_path):
    (tmp_path / "answers.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read and written"):
        Answers(tmp_path / "answers.jsonl", IDENTITY)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read and written"):
        Answers(tmp_path / "file" / "answers.jsonl", IDENTITY)


# Predictions --------------------------------------------------------------------------------------


@pytest.fixture
def written(judged, tmp_path):
    config = judged()
    golds = read_golds(config)
    texts = {name: [gold.example.answer for gold in rows] for name, rows in golds.items()}
    write_predictions(tmp_path / "a", golds, texts, score(config, golds, texts))
    return golds, texts, tmp_path / "a"


def test_predictions_are_known_again_by_their_content(written):
    golds, texts, folder = written
    assert {path.name for path in folder.iterdir()} == {"predictions.jsonl", "SHA256SUMS"}
    numbers = np.random.default_rng(1)
    for name in ("predictions.jsonl", "SHA256SUMS"):
        whole = (folder / name).read_bytes()
        spoiled = [whole[:size] for size in (0, 1, len(whole) // 2, len(whole) - 1)]
        for place in numbers.integers(0, 8 * len(whole), 100):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << (place % 8)
            spoiled.append(bytes(damaged))
        for content in spoiled:
            (folder / name).write_bytes(content)
            try:
                assert read_predictions(str(folder / "predictions.jsonl"), golds) == texts
                # The list of checksums is damaged, not the predictions.
                assert name == "SHA256SUMS"
            except UserError as error:
                assert "\n" not in str(error)
        (folder / name).write_bytes(whole)
    (folder / "SHA256SUMS").unlink()
    assert read_predictions(str(folder / "predictions.jsonl"), golds) == texts


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b"caf\xe9\n" * 16, "p.txt is not a text in UTF-8; convert it"),
        ("p.jsonl", b'{"answer": "caf\xe9"}\n' * 16, "is not a text in UTF-8"),
        ("p.jsonl", b'{"answer": "a"}\n{"ans', "broken JSON"),
        ("p.jsonl", b"[1, 2]\n" * 16, "must be an object"),
        ("p.jsonl", b'{"answer": 5}\n' * 16, "has no text under 'answer'"),
        ("p.jsonl", b'{"answer": "a", "language": ["de"], "id": {}}\n' * 16, "unknown language"),
        ("p.jsonl", b"[" * 200_000 + b"\n", "p.jsonl"),
        ("p.jsonl", b"\x00" * 100, "p.jsonl"),
        ("p.txt", b"\r\n\r\n", "p.txt is empty"),
    ],
)
def test_odd_predictions_are_told(judged, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_predictions(str(tmp_path / name), read_golds(judged()))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def mixed(judged, golds, tmp_path):
    """Rows without ids, their languages by turns; the file of the data, and its golds."""
    rows = [rows_of(golds / f"test.{language}.jsonl") for language in ("en", "de")]
    flat = [row for pair in zip(*rows, strict=False) for row in pair]
    for row in flat:
        del row["id"]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    return read_golds(judged(f"evaluate.data=[{tmp_path}/mixed.jsonl]"))


def test_answers_without_ids_are_in_the_order_of_the_data(mixed, tmp_path):
    rows = [gold for part in mixed.values() for gold in part]
    rows.sort(key=lambda gold: int(gold.example.origin.rpartition(":")[2]))
    right = {language: [gold.example.answer for gold in part] for language, part in mixed.items()}
    assert [gold.language for gold in rows[:4]] == ["en", "de"] * 2
    for name, line in {
        "p.txt": lambda gold: gold.example.answer,
        "p.jsonl": lambda gold: json.dumps({"answer": gold.example.answer}),
        "q.jsonl": lambda gold: json.dumps(
            {"answer": gold.example.answer, "language": gold.language}
        ),
    }.items():
        (tmp_path / name).write_text("".join(line(gold) + "\n" for gold in rows))
        assert read_predictions(str(tmp_path / name), mixed) == right


def test_predictions_are_written_in_the_order_of_the_data(mixed, judged, tmp_path):
    texts = {language: [g.example.answer for g in part] for language, part in mixed.items()}
    write_predictions(tmp_path / "m", mixed, texts, score(judged(), mixed, texts))
    rows = rows_of(tmp_path / "m" / "predictions.jsonl")
    assert [row["language"] for row in rows[:4]] == ["en", "de"] * 2
    assert all(row["reference"] == row["answer"] for row in rows)
    assert read_predictions(str(tmp_path / "m" / "predictions.jsonl"), mixed) == texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "another"}, "p.jsonl:2: question is 'another', but "),
        ({"reference": "another"}, "p.jsonl:2: reference is 'another', but "),
        ({"question": "another", "id": None}, "p.jsonl:2: question is 'another', but "),
        ({"language": "en", "id": None}, "p.jsonl:2: language is 'en', but 'de' in the row that"),
    ],
)
def test_answers_to_other_rows_are_refused(mixed, tmp_path, change, message):
    """Ids of rows that have none are their numbers, which other data has, too."""
    rows = [
        {"language": gold.language, "id": gold.id, "question": gold.example.prompt,
         "reference": gold.example.answer, "answer": gold.example.answer}
        for gold in in_order(mixed)
    ]  # fmt: skip
    rows[1] |= change
    kept = [{key: value for key, value in row.items() if value is not None} for row in rows]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(UserError) as error:
        read_predictions(str(tmp_path / "p.jsonl"), mixed)
    assert message in str(error.value) and "mixed.jsonl:2" in str(error.value)
    assert "name the data that was answered in evaluate.data" in str(error.value)


def test_a_row_has_one_id_for_generate_and_for_evaluate(judged, tmp_path):
    """Of rows without ids: what `generate` writes is found again by `evaluate`."""
    data = tmp_path / "few.jsonl"
    rows = [("en", None), ("de", None), ("en", "e7"), ("en", None), ("", None), ("", 3), ("", None)]
    data.write_text("".join(
        json.dumps({"prefix": "a", "text": "b", "language": language, "id": name}) + "\n"
        for language, name in rows
    ))  # fmt: skip
    config = judged(f"evaluate.data=[{data}]", "task.kind=rows")
    judged_rows = in_order(read_golds(config))
    assert [(row.language, row.id) for row in judged_rows] == [
        ("en", "0"), ("de", "0"), ("en", "e7"), ("en", "2"),
        ("und", "0"), ("und", "3"), ("und", "2"),
    ]  # fmt: skip
    assert [(row.language, row.id) for row in questions(config, [str(data)])] == [
        (row.language, row.id) for row in judged_rows
    ]


@pytest.mark.parametrize("name", ["p.JSONL", "p.ndjson", "p.NDJSON"])
def test_names_of_json_lines(mixed, tmp_path, name):
    right = {language: [gold.example.answer for gold in part] for language, part in mixed.items()}
    lines = [json.dumps({"answer": gold.example.answer}) + "\n" for gold in in_order(mixed)]
    (tmp_path / name).write_text("".join(lines))
    assert read_predictions(str(tmp_path / name), mixed) == right


@pytest.mark.parametrize("name", ["p.txt", "p.json", "p"])
def test_json_lines_by_another_name_are_told(mixed, tmp_path, name):
    """Each line would count as an answer that is wrong."""
    rows = [json.dumps({"answer": gold.example.answer}) for gold in in_order(mixed)]
    (tmp_path / name).write_text("\n".join(rows) + "\n\n")
    with pytest.raises(UserError, match=rf"{name} holds rows of JSON .*p\.jsonl"):
        read_predictions(str(tmp_path / name), mixed)
    # One line that is none makes them texts, and so do objects that are answers themselves.
    for lines in (["text", *rows[1:]], [json.dumps({"Results": []})] * len(rows)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        found = read_predictions(str(tmp_path / name), mixed)
        assert sorted(text for part in found.values() for text in part) == sorted(lines)


def test_lines_end_as_windows_writes_them(judged, tmp_path):
    golds = read_golds(judged())
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + b"a\r\n" * 16)
    found = read_predictions(str(tmp_path / "p.txt"), golds)
    assert {text for texts in found.values() for text in texts} == {"a"}
