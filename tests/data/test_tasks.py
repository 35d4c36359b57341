"""Records become prompts and answers, and answers become structures again."""

import json

import pytest

from jaxalign.data.sources import Record, read
from jaxalign.data.tasks import (
    TASKS,
    Command,
    parse_entities,
    parse_intent_slots,
    parse_slots,
    render,
    slot_spans,
)
from jaxalign.errors import UserError

SPANS = [("datetime", "at nine: sharp"), ("reminder/todo", "buy milk")]


def record(**fields):
    return Record(fields, "data.jsonl:7")


@pytest.mark.parametrize(
    "fields",
    [
        {"utterance": "x", "slots": [list(s) for s in SPANS]},
        {"utterance": "x", "slots": [{"type": k, "text": w} for k, w in SPANS]},
        {"utterance": "x", "slots": {"type": [k for k, _ in SPANS], "text": [w for _, w in SPANS]}},
        {"utterance": "x", "target": "datetime: at nine: sharp; reminder/todo: buy milk"},
        {
            "utt": "x",
            "annot_utt": "wake [datetime : at nine: sharp] and [reminder/todo : buy milk]",
            "slots": None,
        },
    ],
)
def test_slots_of_every_layout(fields):
    example = render("slots", record(**fields, lang="en"))
    assert example.prompt == "x"
    assert example.answer == "datetime: at nine: sharp; reminder/todo: buy milk"
    assert example.language == "en"
    assert example.system and not example.finished
    assert TASKS["slots"].parse(example.answer) == SPANS


def test_slots_without_any():
    assert render("slots", record(utterance="x", slots=[])).answer == "None"
    assert parse_slots("none") == []
    assert parse_slots("a: b; nonsense; c: d") == [("a", "b"), ("c", "d")]


def test_intent_comes_first_and_only_there():
    spans = [("intent", "not the intent"), ("datetime", "tomorrow")]
    example = render("intent_slots", record(utterance="x", intent="weather/find", slots=spans))
    assert example.answer == "intent: weather/find; intent: not the intent; datetime: tomorrow"
    assert parse_intent_slots(example.answer) == Command("weather/find", spans)
    bare = render("intent_slots", record(utterance="x", intent="alarm", slots=[])).answer
    assert bare == "intent: alarm"
    assert parse_intent_slots(bare) == Command("alarm", [])
    alone = render("intent", record(utterance="x", intent="alarm", slots=spans)).answer
    assert alone == "intent: alarm"
    assert parse_intent_slots("datetime: now") == Command("", [("datetime", "now")])
    assert parse_intent_slots("") == Command("", [])


@pytest.mark.parametrize("kind", ["intent", "intent_slots"])
def test_an_intent_that_no_answer_could_name_is_refused(kind):
    row = record(utterance="x", intent="play; music", slots=[])
    with pytest.raises(UserError, match="intent 'play; music' contains '; '"):
        render(kind, row)


@pytest.mark.parametrize("kind", ["slots", "intent_slots"])
@pytest.mark.parametrize(
    "given, spans",
    [
        (["time ", "nine"], ("time", "nine")),
        (["time", " nine\u00a0"], ("time", "nine")),
        (["todo", "me: call mom"], ("todo", "me: call mom")),
        (["todo", "milk;"], ("todo", "milk;")),
        (["song", "None"], ("song", "None")),
    ],
)
def test_the_slots_of_a_row_are_read_from_its_answer(kind, given, spans):
    """Blanks around a type and its words are no part of either, as in what a model writes."""
    row = record(utterance="x", intent="alarm", slots=[given, ["last", "one"]])
    wanted = [spans, ("last", "one")]
    found = TASKS[kind].parse(render(kind, row).answer)
    assert found == (wanted if kind == "slots" else Command("alarm", wanted))
    assert slot_spans(row) == wanted


@pytest.mark.parametrize("kind", ["slots", "intent_slots"])
@pytest.mark.parametrize(
    "slot", [("todo", "papa; sara"), ("time: at", "nine"), ("time; place", "nine")]
)
def test_slots_that_no_answer_could_say_are_refused(kind, slot):
    row = record(utterance="x", intent="alarm", slots=[["last", "one"], list(slot)])
    with pytest.raises(UserError, match=r"data\.jsonl:7: the slot \['t.* cannot be read back"):
        render(kind, row)


def test_entities():
    entities = [["LOC", "Tampa Bay", 6, 8], ["PER", 'Anna "A" Č.', 0, 1]]
    answer = render("ner", record(text="x", entities=entities)).answer
    assert answer == (
        '{"Results": [{"TypeName": "LOC", "Text": "Tampa Bay"}, '
        '{"TypeName": "PER", "Text": "Anna \\"A\\" Č."}]}'
    )
    assert parse_entities("Here: " + answer + " done") == [
        ("LOC", "Tampa Bay"),
        ("PER", 'Anna "A" Č.'),
    ]
    assert render("ner", record(text="x", entities=[])).answer == '{"Results": []}'
    for broken in ("", "None", "{", '{"Results": 3}', '{"Results": [3, {"Text": "x"}]}', "[1]"):
        assert parse_entities(broken) == []


def test_translation():
    fields = {"src": "Hallo", "tgt": "Hello", "src_lang": "de", "tgt_lang": "en"}
    example = render("translation", record(**fields))
    assert (example.prompt, example.answer, example.language) == ("Hallo", "Hello", "de-en")
    assert example.names == {"source_language": "German", "target_language": "English"}


@pytest.mark.parametrize("czech, english", [("Ahoj", "Hello"), ("Praha 2026", "Praha 2026")])
def test_translation_dict_and_its_reverse(tmp_path, czech, english):
    """The columns say which side is which language; texts that are equal do not."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"translation": {"cs": czech, "en": english}}) + "\n", "utf-8")
    (plain,) = read(str(file))
    forward = render("translation", plain)
    assert (forward.prompt, forward.answer, forward.language) == (czech, english, "cs-en")
    (turned,) = read(str(file), {"src": "translation.en", "tgt": "translation.cs"})
    back = render("translation", turned)
    assert (back.prompt, back.answer, back.language) == (english, czech, "en-cs")


def test_rows_are_left_alone():
    example = render("rows", record(prefix="p ", text=" a<|eot_id|>", text_parallel_0="z"))
    assert (example.prompt, example.answer) == ("p ", " a<|eot_id|>")
    assert example.finished
    assert render("rows", record(text="a")).prompt == ""


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("rows", {"prefix": "p", "texts": "x"}, r"data\.jsonl:7: .* no 'text'.*mean 'texts'"),
        ("rows", {"text": "  "}, r"data\.jsonl:7: the answer is empty"),
        ("rows", {"text": 3}, r"data\.jsonl:7: 'text' must be text, not int"),
        ("slots", {"utterance": "x"}, "no 'target'"),
        (
            "intent_slots",
            {"utterance": "x", "intent": "alarm", "target": "time:nine; place: Rome"},
            "'time:nine' of 'target' is not 'type: words' and would be lost",
        ),
        ("slots", {"slots": []}, "no 'utterance'"),
        ("slots", {"utterance": "x", "slots": ["a"]}, r"data\.jsonl:7: 'a' is not a \[type, words"),
        ("intent_slots", {"utterance": "x", "slots": []}, "no 'intent'"),
        ("translation", {"src": "a", "tgt": "b", "src_lang": "de"}, "no 'tgt_lang'"),
        ("translation", {"translation": {"de": "Ja", "en": ""}}, "the answer is empty"),
        ("ner", {"text": "x"}, "no 'entities'"),
    ],
)
def test_mistakes(kind, fields, message):
    with pytest.raises(UserError, match=message):
        render(kind, record(**fields))
