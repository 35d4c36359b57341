"""Entity scores: strict, kind and the paper's reading of well and badly written JSON."""

import json
from pathlib import Path

import pytest

from jaxalign.data.sources import Record
from jaxalign.data.tasks import parse_entities, render
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.ner import parse_paper, parse_strict, score_ner

UNER = Path(__file__).resolve().parents[3] / "shared" / "data" / "uner"
OSLO = '{"TypeName": "LOC", "Text": "Oslo"}'
ANN = '{"TypeName": "PER", "Text": "Ann"}'
BOTH = [("LOC", "Oslo"), ("PER", "Ann")]


def gold(entities, **fields):
    fields = {"text": "Ann in Oslo", "entities": entities, **fields}
    return Gold(render("ner", Record(fields, "data.jsonl:1")), fields, "0", "en")


@pytest.mark.parametrize(
    "answer, kind, strict, paper",
    [
        (f'{{"Results": [{OSLO}, {ANN}]}}', BOTH, BOTH, BOTH),
        (f' \n{{"Results":[{ANN},{OSLO}]}} ', BOTH[::-1], BOTH[::-1], None),
        (f'```json\n{{"Results": [{OSLO}, {ANN}]}}\n```', BOTH, None, BOTH),
        (f'{{"Results": [{OSLO}, {ANN}, {{"TypeName": "LO', BOTH, None, BOTH),
        (f"[{OSLO}, {ANN}]", BOTH, None, None),
        (f'{{"Results": [{OSLO}]}} {{"Results": [{ANN}]}}', BOTH[:1], None, BOTH[:1]),
        ('{"Results": [{"Text": "Oslo", "TypeName": "LOC"}]}', BOTH[:1], BOTH[:1], []),
        (
            '{"Results": [{"TypeName": "LOC", "Text": "a{b"}]}',
            [("LOC", "a{b")],
            [("LOC", "a{b")],
            0,
        ),
        ('{"Results": [3, {"TypeName": "LOC"}], "x": 1}', [], None, []),
        ('{"Results": [{"TypeName": "LOC", "Text": 3}]}', [], None, []),
        ('{"Results": {"TypeName": "LOC", "Text": "Oslo"}}', [], None, None),
        ('{"Results": []}', [], [], []),
        ("{" * 5000, [], None, None),
        ('{"Results": ' + "[" * 5000, [], None, []),
        ('{"a":' * 3000, [], None, None),
        ('{"Results": ' + "9" * 6000 + "}", [], None, None),
        ("None", [], None, None),
        ("", [], None, None),
        ("null", [], None, None),
    ],
)
def test_readings(answer, kind, strict, paper):
    assert parse_entities(answer) == kind
    assert parse_strict(answer) == strict
    assert parse_paper(answer) == ([("LOC", "a{b")] if paper == 0 else paper)


def test_the_paper_reads_in_its_own_order():
    assert parse_paper(f'{{"Results": [{ANN}, {OSLO}]}}') == BOTH


def test_scores_by_hand():
    entities = [["LOC", "Oslo", 2, 3], ["PER", "Ann", 0, 1], ["PER", "Ann", 0, 1]]
    answers = [
        f'{{"Results": [{OSLO}, {ANN}, {ANN}]}}',  # all, twice the same name too
        f"Sure! [{ANN}, {ANN}, {ANN}]",  # two of three right, read kindly only
        f'{{"Results": [{OSLO}, {{"TypeName": "MISC", "Text": "x"}}]}}',
        "",
    ]
    found = score_ner([gold(entities)] * 4, answers)
    assert [measure.name for measure in found.measures] == [
        "entity_f1",
        "entity_f1_strict",
        "entity_f1_paper",
        "valid_json",
    ]
    assert found["entity_f1"].parts.tolist() == [[3, 3, 3], [2, 3, 3], [1, 2, 3], [0, 0, 3]]
    assert found["entity_f1"].value == pytest.approx(100 * 2 * 6 / (8 + 12))
    assert found["entity_f1_strict"].parts[:, 0].tolist() == [3, 0, 1, 0]
    assert found["entity_f1_paper"].parts[2].tolist() == [1, 1, 3]  # MISC is passed over
    assert found["valid_json"].value == 50
    assert found.counts == {"invalid_json": 2, "paper_unreadable": 2, "empty": 1}
    assert found.details["types"]["PER"]["gold"] == 8
    assert found.details["types"]["MISC"] == {"precision": 0, "recall": 0, "f1": 0, "gold": 0}
    assert found.read[2] == [["LOC", "Oslo"], ["MISC", "x"]]


@pytest.mark.parametrize("language", ["en", "zh", "pt"])
def test_gold_answers_on_real_rows(language):
    file = UNER / f"test.{language}.jsonl"
    if not file.exists():
        pytest.skip("no Universal NER here")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    golds = [gold(**row) for row in rows]
    found = score_ner(golds, [row.example.answer for row in golds])
    assert found["entity_f1"].value == found["entity_f1_strict"].value == 100
    assert found["valid_json"].value == 100
    assert found["entity_f1_paper"].value > 99  # a quotation mark in a name ends it there
    # Kind reading never loses what strict reading finds, however the answer is wrapped.
    for wrap in ("{}", "Here: {}", "```json\n{}\n```", "{} Done."):
        said = [wrap.format(row.example.answer) for row in golds]
        assert score_ner(golds, said)["entity_f1"].value == 100
