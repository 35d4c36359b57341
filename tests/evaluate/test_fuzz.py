"""Rows, answers and files of predictions that nobody meant to write: a score or one sentence.

`FUZZ=5000 pytest tests/evaluate/test_fuzz.py` tries as many of each.
"""

import json
import math
import os

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from jaxalign.config import load
from jaxalign.errors import UserError
from jaxalign.evaluate.comparable import System
from jaxalign.evaluate.compare import compare
from jaxalign.evaluate.gold import read_golds
from jaxalign.evaluate.predictions import read_predictions, write_predictions
from jaxalign.evaluate.run import score
from jaxalign.evaluate.scorers import SCORERS
from jaxalign.terminal import visible

MANY = settings(
    max_examples=int(os.environ.get("FUZZ", "40")), deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    derandomize="FUZZ" not in os.environ, phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
# Pieces of which answers and rows of these tasks are made, and what breaks readers of them.
PIECES = ["intent", ": ", "; ", "None", "[", "]", "{", "}", '"Results"', '"TypeName"', '"Text"',
          ": [", "datetime", " ", "\n", "ねえ", "明天", "\u2028", "\x00", "\x1b[2J", "\ud800", "\\",
          '"', "at nine", "LOC", "zh", "en-zh", "-", "1e999", "9" * 400]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=12)


def whole(text):
    """As a tokenizer decodes: a half of a surrogate pair is no text."""
    return text.encode("utf-8", "replace").decode()


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = ["utterance", "utt", "annot_utt", "slots", "intent", "lang", "id", "char_spans", "src",
         "tgt", "src_lang", "tgt_lang", "translation", "text", "entities", "prefix",
         "language", "question", "choices", "answer"]  # fmt: skip
GOOD = {
    "slots": {"utterance": "wake me at nine", "slots": [["datetime", "at nine"]], "lang": "zh"},
    "intent": {"utterance": "wake me", "intent": "alarm", "lang": "en"},
    "intent_slots": {"utterance": "明天 at", "intent": "alarm", "slots": [["datetime", "明天"]]},
    "translation": {"src": "a", "tgt": "b", "src_lang": "en", "tgt_lang": "zho_Hans"},
    "ner": {"text": "Oslo", "entities": [["LOC", "Oslo"]]},
    "rows": {"prefix": "a", "text": "a b"},
    "choice": {"question": "a", "choices": ["at nine", "LOC"], "answer": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def config_of(kind, file):
    words = [f"task.kind={kind}", f"evaluate.data=[{file}]", "evaluate.draws=3"]
    return load(None, words).config


def sentence(error):
    """What a user reads must be one line, and no more than a screen."""
    told = visible(error)
    assert "\n" not in told and 10 < len(told) < 2000, told


@pytest.mark.parametrize("kind", SCORERS)
@MANY
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=4), max_size=3),
    answers=st.lists(TEXT.map(whole), min_size=4, max_size=4),
)
@example(rows=[{"id": None}, {"id": {}}], answers=["", "", "", ""])
@example(rows=[{"lang": "\x1b[2J"}], answers=["\x00\u2028"] * 4)
def test_rows_and_answers(folder, kind, rows, answers):
    file = folder / f"{kind}.jsonl"
    lines = [GOOD[kind], *(GOOD[kind] | row for row in rows)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(kind, file)
    try:
        golds = read_golds(config)
        given_ = iter(answers)
        texts = {name: [next(given_) for _ in part] for name, part in golds.items()}
        scored = score(config, golds, texts)
        right = score(config, golds, {
            name: [gold.example.answer for gold in part] for name, part in golds.items()
        })  # fmt: skip
        found = compare([System("a", [scored]), System("b", [right])], {}, draws=3)
        write_predictions(folder / "a", golds, texts, scored)
    except UserError as error:
        sentence(error)
        return
    for measure in found.measures.values():
        for system in measure.languages.values():
            assert all(0 <= one.mean <= 100 + 1e-9 for one in system.values())
        assert all(math.isfinite(gain.p) for gain in measure.group_gains["b"].values())
    assert read_predictions(str(folder / "a" / "predictions.jsonl"), golds) == texts


@MANY
@given(
    content=st.binary(max_size=60)
    | st.lists(
        st.dictionaries(st.sampled_from(["answer", "language", "id"]), VALUE).map(json.dumps)
        | TEXT,
        max_size=4,
    ).map(lambda lines: "\n".join(lines).encode("utf-8", "replace"))
)
@example(content=b"[" * 100_000)
@example(content=b'{"answer": ' + b"9" * 5000 + b"}")
def test_files_of_predictions(folder, content):
    (folder / "rows.jsonl").write_text((json.dumps(GOOD["intent"]) + "\n") * 3)
    golds = read_golds(config_of("intent", folder / "rows.jsonl"))
    for name in ("p.jsonl", "p.txt"):
        (folder / name).write_bytes(content)
        try:
            found = read_predictions(str(folder / name), golds)
        except UserError as error:
            sentence(error)
            continue
        assert [len(texts) for texts in found.values()] == [3]
        assert all(isinstance(text, str) for texts in found.values() for text in texts)
