"""A kind of task is a row of `TASKS`, a name in the settings and a scorer, with all their parts."""

import dataclasses
import json

import pytest

from jaxalign.data.example import Example
from jaxalign.data.fields import language_of, string_of, text_of
from jaxalign.data.sources import Record, read
from jaxalign.data.tasks import TASKS, Task, render
from jaxalign.errors import UserError
from jaxalign.evaluate.entrants import Entrant
from jaxalign.evaluate.exact import score_rows
from jaxalign.evaluate.run import evaluate
from jaxalign.evaluate.scorers import SCORERS
from jaxalign.evaluate.write import write
from jaxalign.export.facts import _summary as card_summary
from jaxalign.settings import abouts
from jaxalign.settings.data import KINDS, UNASKED, UNJUDGED
from tests.evaluate.conftest import rows_of


def _summary(record):
    return Example(
        prompt=text_of(record, "document"),
        answer=string_of(record, "summary"),
        language=language_of(record),
        system="Summarise the user's text in one sentence.",
        origin=record.origin,
    )


SUMMARY = Task(
    "summaries", _summary, str.strip, blank={"summary": "-"}, asked="document", copied=False
)


def lacking(kind, names=KINDS):
    """What is missing of a kind of task, in one sentence; '' where nothing is."""
    if kind not in TASKS:
        return f"{kind} has no row in TASKS of jaxalign/data/tasks.py"
    if kind not in names:
        return f"{kind} has no name in KINDS of jaxalign/settings/data.py"
    if (kind in SCORERS) == (kind in UNJUDGED):
        return (
            f"{kind} needs either a row in SCORERS of jaxalign/evaluate/scorers.py or its name in "
            "UNJUDGED of jaxalign/settings/data.py"
        )
    task = TASKS[kind]
    if not task.words:
        return f"{kind} has no words for a model card in TASKS"
    if kind in SCORERS and not task.blank:
        return f"{kind} has no blank answer in TASKS, with which a row without one is asked"
    if task.asked is None:
        return ""
    try:
        asked = task.render(Record({**task.blank, task.asked: "a text"}, "x:1"))
    except UserError as error:
        return f"{kind}: a row of its blank and {task.asked!r} in TASKS cannot be asked ({error})"
    if asked.prompt != "a text":
        return f"{kind}: its renderer does not ask what is in {task.asked!r}, the field of TASKS"
    if asked.finished != (kind in UNASKED):
        return f"{kind}: UNASKED of jaxalign/settings/data.py names kinds without an instruction"
    return ""


@pytest.mark.parametrize("kind", sorted({*KINDS, *TASKS, *SCORERS, *UNASKED, *UNJUDGED}))
def test_a_kind_has_all_its_parts(kind):
    assert not lacking(kind)


def test_settings_offer_the_kinds_of_the_tables():
    choices = {key: about.bounds.choices for key, about in abouts()}
    assert set(choices["task.kind"]) == set(TASKS)
    assert set(choices["evaluate.kind"]) == {"task", *SCORERS}


@pytest.fixture
def summary(monkeypatch):
    """A kind of one's own, added as CONTRIBUTING.md says."""
    monkeypatch.setitem(TASKS, "summary", SUMMARY)
    monkeypatch.setitem(SCORERS, "summary", score_rows)


def test_what_a_new_kind_lacks_is_told(summary, monkeypatch):
    names = (*KINDS, "summary")
    assert not lacking("summary", names)
    assert lacking("summary").endswith("has no name in KINDS of jaxalign/settings/data.py")
    without = {
        "no words": {"words": ""},
        "no blank answer": {"blank": {}},
        "cannot be asked": {"blank": {"abstract": "-"}},
        "does not ask what is in 'title'": {
            "asked": "title", "blank": {"document": "x", "summary": "-"},
        },
    }  # fmt: skip
    for told, change in without.items():
        monkeypatch.setitem(TASKS, "summary", dataclasses.replace(SUMMARY, **change))
        assert told in lacking("summary", names)
    monkeypatch.setitem(TASKS, "summary", SUMMARY)
    monkeypatch.delitem(SCORERS, "summary")
    assert "either a row in SCORERS" in lacking("summary", names)
    monkeypatch.delitem(TASKS, "summary")
    assert "no row in TASKS" in lacking("summary", names)


@pytest.mark.usefixtures("one_device", "summary")
def test_a_kind_of_ones_own_is_asked_and_judged(judged, tmp_path, capsys):
    rows = [{"document": f"It is {n} o'clock.", "summary": f"{n}", "lang": "en"} for n in range(4)]
    file, bare = tmp_path / "rows.jsonl", tmp_path / "bare.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare.write_text(json.dumps({"document": "It is late."}) + "\n")
    config = judged(f"evaluate.data=[{file}]", f"task.train=[{file}]")
    config.task.kind = "summary"  # its name in KINDS
    assert card_summary(config).startswith("fine-tuned for summaries")

    right = tmp_path / "right.jsonl"
    answers = [render("summary", record).answer for record in read(str(file))]
    assert [SUMMARY.parse(answer) for answer in answers] == [row["summary"] for row in rows]
    right.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
    entrants = [
        Entrant("base", kind="base"),
        Entrant("shown", kind="few_shot"),
        Entrant("right", str(right), "predictions"),
    ]
    config.evaluate.shots = 1
    found = evaluate(config, entrants, str(tmp_path / "out"))
    assert found.measures["exact_match"].languages["right"]["en"].mean == 100

    write(config, "", [], [str(bare)], str(tmp_path / "answers.jsonl"))
    assert rows_of(tmp_path / "answers.jsonl")[0]["question"] == "It is late."
    capsys.readouterr()
    write(config, "", ["It is early."], [], str(tmp_path / "prompted.jsonl"))
    assert rows_of(tmp_path / "prompted.jsonl")[0]["question"] == "It is early."
