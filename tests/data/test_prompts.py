"""One answer behind two prompts: which rows go together, their tokens, their batches."""

import json

import numpy as np
import pytest

from jaxalign.config import load
from jaxalign.data import streams
from jaxalign.data.batch import ANSWER, PADDING, TEMPLATE, TEXT
from jaxalign.data.prompts import encode_both, two_prompts
from jaxalign.data.show import show
from jaxalign.data.sources import Record
from jaxalign.errors import UserError


def record(id_, lang, text, intent="weather/find", line=1):
    fields = {"id": id_, "lang": lang, "utterance": text, "intent": intent}
    return Record(fields, f"{lang}.jsonl:{line}")


ROWS = [
    record("1", "de", "Regnet es heute"),
    record("1", "en", "will it rain today"),
    record("1", "it", "oggi piove"),
    record("2", "en", "play music", "music/play", 2),
    record("2", "de", "spiel Musik", "music/play", 2),
    record("3", "en", "wake me up at nine", "alarm/set", 3),
]


def said(rows):
    return [(row.student.prompt, row.teacher.prompt, row.language) for row in rows]


def test_rows_of_one_id_go_together():
    assert said(two_prompts(ROWS, "intent", "en")) == [
        ("Regnet es heute", "will it rain today", "de-en"),
        ("oggi piove", "will it rain today", "it-en"),
        ("spiel Musik", "play music", "de-en"),
    ]
    assert said(two_prompts(ROWS[:3], "intent", "it")) == [
        ("Regnet es heute", "oggi piove", "de-it"),
        ("will it rain today", "oggi piove", "en-it"),
    ]


def test_without_a_pivot_both_read_their_own():
    rows = two_prompts([Record({"utterance": "a", "intent": "b"}, "x:1"), *ROWS], "intent", "")
    assert len(rows) == 7 and all(row.student is row.teacher for row in rows)
    assert [row.language for row in rows[:2]] == ["", "de-de"]


def test_a_translation_is_asked_in_its_first_language():
    fields = {"id": 1, "tgt": "Yes", "tgt_lang": "en"}
    rows = [
        Record(fields | {"src": text, "src_lang": lang}, f"{lang}:1")
        for lang, text in (("de", "Ja"), ("fr", "Oui"))
    ]
    (row,) = two_prompts(rows, "translation", "fr")
    assert row.language == "de-fr"


@pytest.mark.parametrize(
    ("rows", "pivot", "says"),
    [
        (
            [ROWS[1], record("1", "de", "Regnet es", "weather/rain", 7)],
            "en",
            r"de\.jsonl:7: the answer 'intent: weather/rain' is not that of en\.jsonl:1, 'intent: "
            r"weather/find', which has the same id '1', but both prompts must have the same answer",
        ),
        (
            [*ROWS, record("1", "de", "Regnet es", line=7)],
            "en",
            r"de\.jsonl:7: the id '1' has a row in 'de' already \(de\.jsonl:1\)",
        ),
        ([ROWS[0], *ROWS[3:]], "en", r"de\.jsonl:1: no row in 'en' has the id '1'"),
        (ROWS, "fr", r"align\.pivot: no row is in 'fr' \(there are: de, en, it\)"),
        ([ROWS[1]], "en", r"align\.pivot: all rows are in 'en'"),
        (
            [Record({"id": 1, "utterance": "a", "intent": "b"}, "x.jsonl:4")],
            "en",
            r"x\.jsonl:4: this row names no language in 'lang'",
        ),
        (
            [Record({"lang": "en", "utterance": "a", "intent": "b"}, "x.jsonl:4")],
            "en",
            r"x\.jsonl:4: this row has no 'id'",
        ),
    ],
    ids=["answers", "twice", "alone", "pivot", "one language", "language", "id"],
)
def test_what_does_not_go_together_is_one_sentence(rows, pivot, says):
    with pytest.raises(UserError, match=says) as error:
        two_prompts(rows, "intent", pivot)
    assert "\n" not in str(error.value)


def test_both_sides_end_with_the_answer(llama):
    rows = two_prompts(ROWS, "intent", "en")
    for row, both in zip(encode_both(rows, llama, "chat", "", 99), rows, strict=True):
        assert row.origin == both.student.origin and row.languages == both.languages
        for tokens, (first, end), example in zip(
            row.sides, row.text, (both.student, both.teacher), strict=True
        ):
            assert llama.decode(tokens[-row.targets :]) == f"{example.answer}<|eot_id|>"
            assert llama.decode(tokens[first:end]).strip() == example.prompt


def test_a_cut_takes_the_answer_from_both(llama):
    rows = two_prompts(ROWS, "intent", "en")
    whole = encode_both(rows, llama, "chat", "", 99)
    limit = max(len(tokens) for row in whole for tokens in row.sides) - 2
    for row, before in zip(encode_both(rows, llama, "chat", "", limit), whole, strict=True):
        assert row.targets == before.targets - max(
            0, *(len(tokens) - limit for tokens in before.sides)
        )
        ends = [tokens[len(tokens) - row.targets :].tolist() for tokens in row.sides]
        assert ends[0] == ends[1] and row.whole == before.whole
        lost = before.targets - row.targets
        assert [len(t) for t in row.sides] == [len(t) - lost for t in before.sides]
    prompt = min(len(tokens) - row.targets for row in whole for tokens in row.sides)
    assert all(not row.targets for row in encode_both(rows, llama, "chat", "", prompt))


def test_an_answer_that_joins_its_prompt_is_refused(llama):
    rows = [
        Record({"id": 1, "lang": lang, "prefix": prefix, "text": "tomorrow"}, f"{lang}:1")
        for lang, prefix in (("de", "to"), ("en", "x "))
    ]
    ids = [llama(f["prefix"] + f["text"])["input_ids"][len(llama(f["prefix"])["input_ids"]) :]
           for f in (r.fields for r in rows)]  # fmt: skip
    assert ids[0] != ids[1]  # or the case shows nothing
    with pytest.raises(UserError, match=r"de:1: the answer has other tokens after this prompt"):
        encode_both(two_prompts(rows, "rows", "en"), llama, "chat", "", 99)


@pytest.fixture
def configure(tmp_path):
    def build(*words):
        for lang in ("en", "de", "it"):
            here = [row.fields for row in ROWS if row.fields["lang"] == lang]
            text = "".join(json.dumps(fields) + "\n" for fields in here)
            (tmp_path / f"{lang}.jsonl").write_text(text)
        settings = (
            "task.kind=intent", "align.rows=prompts", f"align.train=[{tmp_path}/*.jsonl]",
            f"align.valid=[{tmp_path}/*.jsonl]", "batch.pairs=4", "prompt.system=''",
        )  # fmt: skip
        return load(None, [*settings, *words]).config

    return build


@pytest.mark.parametrize("pack", ["auto", "flatten", "segments", "none"])
def test_rows_of_two_prompts_are_padded(configure, llama, pack):
    """Task rows and pairs of this length would be laid end to end."""
    config = configure(f"batch.pack={pack}")
    stream = streams.prompt_stream(config, llama)
    assert stream.layout is None and stream.batch(0).flat is None
    assert streams._lays(config, 32) == (pack != "none")


def test_a_batch(configure, llama):
    stream = streams.prompt_stream(configure(), llama, "valid")
    batch = stream.batch(0)
    assert batch.rows.tolist() == [0, 1, 2, -1]
    length = stream.lengths[-1]
    for row, one in enumerate(stream.rows):
        for name, tokens, text in zip(stream.sides, one.sides, one.text, strict=True):
            side = batch.sides()[name]
            assert side.tokens[row, : len(tokens)].tolist() == tokens.tolist()
            assert side.real[row].sum() == len(tokens)
            at, wanted = side.answer_at[row], batch.answers[row]
            there = wanted >= 0
            assert there.sum() == one.targets
            assert side.tokens[row, at[there] + 1].tolist() == wanted[there].tolist()
            roles = side.roles[row]
            assert (roles == ANSWER).sum() == one.targets
            assert np.flatnonzero(roles == TEXT).tolist() == list(range(*text))
            assert (roles == PADDING).sum() == length - len(tokens) and TEMPLATE in roles
    assert not batch.student_roles[3].any() and (batch.answers[3] == -100).all()
    counted, computed = stream.tokens(0)
    assert counted == sum(len(t) for row in stream.rows for t in row.sides)
    assert computed == 2 * 4 * length


def test_languages_keep_both_sides(configure, llama):
    stream = streams.prompt_stream(configure("align.languages=[de,en]"), llama)
    assert stream.report.languages == {"de-en": 2}
    with pytest.raises(UserError, match=r"align\.languages: no row of align\.train is in de, fr"):
        streams.prompt_stream(configure("align.languages=[de,fr]"), llama)


def test_prompts_that_fill_the_length(configure, llama):
    with pytest.raises(UserError, match=r"align\.train: in all 3 rows the prompt alone fills"):
        streams.prompt_stream(configure("batch.max_length=8"), llama)


@pytest.mark.parametrize("word", ["align.layer=auto", "align.control=shuffled"])
def test_what_is_of_pairs_alone_is_refused(configure, word):
    with pytest.raises(UserError, match=r"needs sentence pairs, and align\.rows=prompts has"):
        configure(word)
    configure(word, "align.weight=0")


def test_shown(configure, llama, capsys):
    show(streams.prompt_stream(configure(), llama).rows[:1], llama)
    told = capsys.readouterr().out
    assert "row 1 · de-en" in told and "student, " in told and "teacher, " in told
    assert told.count("⟦intent: weather/find<|eot_id|>⟧") == 2
