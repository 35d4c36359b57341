"""Test rows that were also training rows are reported, on the screen and in the report."""

import json
import shutil
import unicodedata

import pytest

from jaxalign.config import to_yaml
from jaxalign.data.wanted import wanted_examples
from jaxalign.evaluate.gold import read_golds
from jaxalign.evaluate.run import Entrant, evaluate
from jaxalign.evaluate.seen import seen
from jaxalign.paths import SETTINGS


@pytest.fixture
def run(adapters, tmp_path):
    """The adapter of a run with these settings."""

    def build(config, name="run"):
        folder = tmp_path / name
        shutil.copytree(adapters / "a1", folder / "adapter")
        (folder / SETTINGS).write_text(to_yaml(config), "utf-8")
        return Entrant(name, str(folder / "adapter"))

    return build


def rows(path, *found):
    lines = (json.dumps(row, ensure_ascii=False) for row in found)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


COMMANDS = [
    {"utterance": f"wecke mich um {hour} für Zoé", "intent": "alarm/set", "slots": [], "lang": "de"}
    for hour in range(6)
]


@pytest.mark.usefixtures("one_device")
def test_rows_of_the_training_are_told_and_stand_in_the_report(judged, run, tmp_path, capsys):
    config = judged("evaluate.languages=[en]")  # its training rows are the English test rows
    a, b = run(config, "a"), run(config, "b")
    comparison = evaluate(config, [Entrant("bare", kind="base"), a, b], str(tmp_path / "out"))
    (sentence,) = comparison.notes
    assert sentence.startswith("a, b: 9 of 9 evaluated rows are training rows, too")
    assert "test.en.jsonl:1)" in sentence
    assert sentence in (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "9 of 9 evaluated rows" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("change", ["none", "blanks", "composition", "answer", "weight", "gone"])
def test_what_is_the_same_row(judged, run, tmp_path, change):
    trained = [dict(row) for row in COMMANDS[:2]]
    for row in trained:
        if change == "blanks":
            row["utterance"] = row["utterance"].replace(" ", "  ")
        if change == "composition":
            row["utterance"] = unicodedata.normalize("NFD", row["utterance"])
        if change == "answer":
            row["intent"] = "alarm/cancel"
    file = rows(tmp_path / "train.jsonl", *trained)
    words = ["task.weight=0"] if change == "weight" else []
    had = judged(f"task.train=[{file}]", *words)
    asked = judged(f"evaluate.data=[{rows(tmp_path / 'asked.jsonl', *COMMANDS)}]")
    entrant = run(had)
    if change == "gone":
        file.unlink()
    told = seen(read_golds(asked), [entrant])
    assert bool(told) == (change in ("none", "blanks", "composition"))
    assert all("2 of 6 evaluated rows" in sentence for sentence in told)


def test_sentences_of_pairs(judged, run, tmp_path):
    pair = {"text0": COMMANDS[1]["utterance"], "text1": "wake me", "lang0": "de", "lang1": "en"}
    had = judged(f"task.train=[{rows(tmp_path / 'train.jsonl', COMMANDS[0])}]",
                 f"align.train=[{rows(tmp_path / 'pairs.jsonl', pair)}]")  # fmt: skip
    asked = judged(f"evaluate.data=[{rows(tmp_path / 'asked.jsonl', *COMMANDS)}]")
    first, second = seen(read_golds(asked), [run(had)])
    assert "1 of 6 evaluated rows are training rows, too" in first
    assert "1 of 6 evaluated rows are sentences of align.train" in second
    assert first.endswith("asked.jsonl:1).") and second.endswith("asked.jsonl:2).")


def test_a_translation_of_a_pair_is_a_row_of_the_training(judged, run, tmp_path):
    pair = {"text0": "guten Tag", "text1": "good day", "lang0": "de", "lang1": "en"}
    had = judged("task.weight=0", f"align.train=[{rows(tmp_path / 'pairs.jsonl', pair)}]")
    row = {"src": "good day", "tgt": "guten Tag", "src_lang": "en", "tgt_lang": "de"}
    asked = judged("task.kind=translation", f"evaluate.data=[{rows(tmp_path / 't.jsonl', row)}]")
    (sentence,) = seen(read_golds(asked), [run(had)])
    assert "1 of 1 evaluated rows are training rows, too" in sentence


def test_rows_that_were_left_out_were_not_trained_on(judged, run, tmp_path):
    file = rows(tmp_path / "all.jsonl", *COMMANDS)
    part = "task.transforms=[{name: part, options: {share: 0.5, of: utterance}}]"
    had = judged(f"task.train=[{file}]", part)
    (sentence,) = seen(read_golds(judged(f"evaluate.data=[{file}]")), [run(had)])
    kept = len(wanted_examples(had)[0])
    assert 0 < kept < 6
    assert f"{kept} of 6 evaluated rows" in sentence


def test_adapters_without_a_record_say_nothing(judged, adapters):
    assert seen(read_golds(judged()), [Entrant("a", str(adapters / "a1"))]) == []
    assert seen({}, [Entrant("bare", kind="base")]) == []
