"""Slot scores: seqeval's own numbers, rows of every layout, and answers no model should write."""

import json
from pathlib import Path

import pytest
from seqeval.metrics import classification_report, f1_score

from jaxalign.data.sources import Companion, Record
from jaxalign.data.tasks import render
from jaxalign.errors import UserError
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.scorers import SCORERS
from jaxalign.evaluate.slots import (
    predict_labels,
    read_parts,
    score_intent,
    score_intent_slots,
    score_slots,
    tag_command,
    to_bio,
)

XSID = Path(__file__).resolve().parents[3] / "shared" / "data" / "xsid"


def gold(language="en", kind="slots", **fields):
    return Gold(render(kind, Record(fields, "data.jsonl:1")), fields, "0", language)


def wake(**more):
    slots = [["datetime", "at nine"], ["reminder/todo", "gas"]]
    return gold(utterance="Wake me at nine for gas.", slots=slots, **more)


RIGHT = "datetime: at nine; reminder/todo: gas"
STRANGE = [
    "",
    " \n\t ",
    "none",
    ":",
    ": ",
    "; ",
    "; ; ;",
    "datetime:    ; x: y",
    "datetime: ; reminder/todo: gas",
    "datetime: at nine: sharp",
    ": at nine",
    "a: b\nc: d",
    "intent",
    "intent: ",
    "\x00\ud7ff\u2028",
    "datetime: " + "at nine " * 500,
    "Other: at nine",
    "B-datetime: at nine; I-: me; O: Wake",
    "[" * 3000,
    "-: nine; -x: at; _: me; a-b-c: Wake",
]


def seqeval_f1(golds, answers, rules="paper"):
    true, said = [], []
    for row, answer in zip(golds, answers, strict=True):
        command = tag_command(row, rules)
        by_character = row.language[:2] in ("ja", "zh")
        parts, _ = read_parts(answer, rules)
        true.append(to_bio(command.labels))
        said.append(to_bio(predict_labels(command, parts, by_character, rules)[0]))
    return true, said


def test_right_and_wrong_by_hand():
    golds = [wake()] * 3
    found = score_slots(golds, [RIGHT, "datetime: AT NINE; place: gas", "None"])
    # Right 2 + 1 + 0, predicted 2 + 2 + 0, gold 6.
    assert found["slot_f1"].parts.tolist() == [[2, 2, 2], [1, 2, 2], [0, 0, 2]]
    assert found["slot_f1"].value == pytest.approx(60)
    assert found["span_f1"].value == pytest.approx(60)
    assert found["exact_match"].value == pytest.approx(100 / 3)
    assert found.measures[0].name == "slot_f1"
    types = found.details["types"]
    assert types["datetime"] == {
        "precision": 100.0,
        "recall": pytest.approx(200 / 3),
        "f1": pytest.approx(80),
        "gold": 3,
    }
    assert types["place"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "gold": 0}
    assert found.read[1] == [["datetime", "AT NINE"], ["place", "gas"]]


@pytest.mark.parametrize("rules", ["paper", "mended"])
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("answer", STRANGE)
def test_strange_answers_are_judged_too(answer, language, rules):
    golds = [wake(), wake()]
    golds = [Gold(g.example, {**g.fields, "intent": "x"}, g.id, language) for g in golds]
    for score in (score_slots, score_intent_slots):
        found = score(golds, [RIGHT, answer], rules=rules)
        assert all(len(measure.parts) == 2 for measure in found.measures)
        assert all(0 <= measure.value <= 100 for measure in found.measures)
        assert found["slot_f1"].parts[:, 2].tolist() == tag_gold(golds, rules)
        json.dumps([found.read, found.details, found.counts])
    assert score_intent(golds, [RIGHT, answer])["intent_accuracy"].value == 0


def tag_gold(golds, rules):
    return [sum(tag[0] == "B" for tag in to_bio(tag_command(g, rules).labels)) for g in golds]


def test_what_is_counted():
    answers = ["", "nonsense", "datetime: at nine: x; place: Oslo", "a:   ; datetime: at nine"]
    counts = score_slots([wake()] * 4, answers).counts
    # An empty answer is one broken part, as in the paper; blanks for words are never found.
    assert counts == {
        "ill_formed": 3,
        "ill_formed_rows": 3,
        "empty": 1,
        "not_found": 2,
        "gold_not_found": 0,
    }
    mended = score_slots([wake()] * 4, answers, rules="mended").counts
    assert (mended["ill_formed"], mended["not_found"]) == (2, 3)


@pytest.mark.parametrize("rules", ["paper", "mended"])
def test_the_same_as_seqeval(rules):
    golds = [wake(), wake(), gold("zh", utterance="播放TV吧", slots=[["device", "TV"]])] * 3
    answers = [RIGHT, "datetime: at; datetime: nine", "device: TV", *STRANGE[:6]]
    true, said = seqeval_f1(golds, answers, rules)
    found = score_slots(golds, answers, rules=rules)
    assert found["slot_f1"].value == 100 * f1_score(true, said)
    assert found["slot_f1"].value > 0
    report = classification_report(true, said, output_dict=True, zero_division=0)
    for name, scores in found.details["types"].items():
        assert scores["f1"] == pytest.approx(100 * report[name]["f1-score"])
        assert scores["gold"] == report[name]["support"]


def test_a_bootstrap_over_half_the_rows_is_the_score_of_that_half():
    golds, answers = [wake()] * 4, [RIGHT, "None", "datetime: at nine", RIGHT]
    found = score_slots(golds, answers)["slot_f1"]
    half = score_slots(golds[:2], answers[:2])["slot_f1"].value
    assert found.formula(found.parts[:2].sum(axis=0)) == half


@pytest.mark.parametrize("code", ["zho_Hans", "zho", "cmn", "zh_CN", "ja-JP", "jpn_Jpan", "jpn"])
def test_by_character_whatever_the_code(code):
    """Compared by words, a command without blanks is one word that no answer matches."""
    fields = {"utterance": "明天九点叫醒我", "slots": [["datetime", "明天九点"]]}
    said = ["datetime: 明天九点"]
    plain = score_slots([gold("zh", lang="zh", **fields)], said)
    found = score_slots([gold(code, lang=code, **fields)], said)
    assert found["slot_f1"].parts.tolist() == plain["slot_f1"].parts.tolist() == [[1, 1, 1]]
    assert len(tag_command(gold(code, lang=code, **fields)).tokens) == 7


@pytest.mark.parametrize(
    "places",
    [[], [[0, 4]], [[0, 4], [11, 14]], [[8, 15], None], [["8", 15], [20, 23]], [[8, 15], [-4, -1]],
     {"8": 15}, 5, "ab", [[8.0, 15], [20, 23]], [[8, 15], [20, 23], [1, 2]]],
)  # fmt: skip
def test_places_that_are_not_those_of_the_words_are_told(places):
    """They would tag other words than the slots'."""
    assert score_slots([wake(char_spans=[[8, 15], [20, 23]])], [RIGHT])["slot_f1"].value == 100
    with pytest.raises(UserError, match=r"data.jsonl:1: 'char_spans' must give, for each slot"):
        score_slots([wake(char_spans=places)], [RIGHT])


def test_reference_answers_of_slots_with_blanks_around_are_right():
    """Neither the type nor the words have them, whether their places are given or searched."""
    slots = [["datetime ", " at nine "], ["reminder/todo", "gas\u00a0"]]
    places = {}, {"char_spans": [[7, 16], [20, 23]]}
    rows = [gold(utterance="Wake me at nine for gas.", slots=slots, **more) for more in places]
    found = score_slots(rows, [row.example.answer for row in rows])
    assert [measure.value for measure in found.measures] == [100] * 5


def test_chinese_by_character_with_the_leak_and_mended():
    row = gold("zh-CN", utt="播放 hello 歌 吧", annot_utt="播放 [song : hello] 歌 吧")
    assert tag_command(row).labels == ["Other", "Other", "song", "song", "song"]
    assert score_slots([row], ["song: hello"])["slot_f1"].value == 0
    assert tag_command(row, "mended").labels == ["Other", "Other", "song", "Other", "Other"]
    mended = score_slots([row], ["song: hello"], rules="mended")
    assert mended["slot_f1"].value == mended["exact_match"].value == 100
    assert score_slots([row], ["song: hello"])["span_f1"].value == 100


def test_xsid_rows_leak_like_annotated_rows():
    spans = {"slots": [["song", "hello"], ["x", "吧"]], "char_spans": [[2, 7], [8, 9]]}
    ours = gold("zh", utterance="播放hello歌吧", **spans)
    theirs = gold("zh", utt="-", annot_utt="播放 [song : hello] 歌 [x : 吧]")
    assert tag_command(ours) == tag_command(theirs)


def test_words_end_where_slots_end():
    command = tag_command(wake())
    assert command.tokens == ["Wake", "me", "at", "nine", "for", "gas", "."]
    assert score_slots([wake()], [RIGHT])["exact_match"].value == 100


def test_char_spans_say_which_of_two_equal_words():
    fields = {"utterance": "two or two", "slots": [["number", "two"]]}
    second = gold(**fields, char_spans=[[7, 10]])
    assert tag_command(second).labels == ["Other", "Other", "number"]
    assert tag_command(gold(**fields)).labels == ["number", "Other", "Other"]
    # The paper labels every place the words occur: a gold answer need not be right.
    found = score_slots([second], ["number: two"])
    assert found["slot_f1"].value == pytest.approx(200 / 3)
    assert found["span_f1"].value == 100


def test_gold_words_that_are_not_there_are_counted():
    found = score_slots([gold(utterance="a b", slots=[["x", "c"]])], ["x: c"])
    assert found.counts["gold_not_found"] == 1
    assert found["span_f1"].value == 100


def test_neighbours_of_one_label_are_one_entity():
    row = gold(utterance="eggs milk", slots=[["food", "eggs"], ["food", "milk"]])
    assert score_slots([row], ["food: eggs milk"])["slot_f1"].value == 100
    assert score_slots([row], ["food: eggs milk"])["span_f1"].value == 0


def test_rows_with_a_ready_target():
    row = gold(utterance="wake me at nine", target="datetime: at nine")
    assert score_slots([row], ["datetime: at nine"])["slot_f1"].value == 100


def test_slots_that_are_understood_and_written_in_another_language():
    row = gold("de", utterance="Weck mich um neun", slots=[["datetime", "um neun"]])
    answers = ["datetime: at nine", "datetime: UM NEUN; datetime: UM NEUN; place: Weck", "None"]
    found = score_slots([row] * 3, answers)
    assert found["span_f1"].parts.tolist() == [[0, 1, 1], [1, 3, 1], [0, 0, 1]]
    # Which types there are, and which different slots have words of the command.
    assert found["type_f1"].parts.tolist() == [[1, 1, 1], [1, 2, 1], [0, 0, 1]]
    assert found["copied"].parts.tolist() == [[0, 1], [2, 2], [0, 0]]
    assert found["type_f1"].value == pytest.approx(200 / 3)
    assert found["copied"].value == pytest.approx(200 / 3)


def test_intent_and_slots():
    row = wake(kind="intent_slots", intent="alarm/set")
    answers = [f"intent: alarm/set; {RIGHT}", f"intent: no; {RIGHT}", RIGHT, "intent: alarm/set"]
    found = score_intent_slots([row] * 4, answers)
    names = [measure.name for measure in found.measures]
    assert names == [
        "slot_f1", "exact_match", "span_f1", "type_f1", "copied", "intent_accuracy"
    ]  # fmt: skip
    assert found["intent_accuracy"].value == 50
    assert found["exact_match"].value == 25
    assert found["slot_f1"].parts[:, 0].tolist() == [2, 2, 2, 0]
    assert found.counts["no_intent"] == 1 and found.counts["ill_formed"] == 0
    assert found.read[0]["intent"] == "alarm/set" and len(found.read[0]["slots"]) == 2
    alone = score_intent([row] * 4, answers)
    assert alone.measures[0].name == "intent_accuracy" and alone.measures[0].value == 50


def test_a_slot_called_intent_stays_a_slot():
    row = gold(utterance="do it", slots=[["intent", "do"]])
    found = score_slots([row], ["intent: do"])
    assert found["slot_f1"].value == 100 and len(found.measures) == 5


@pytest.mark.parametrize("order", ["own", "pivot"])
@pytest.mark.parametrize("form", ["prompt", "answers"])
@pytest.mark.parametrize(
    "row",
    [
        {"utterance": "spiel jazz um neun", "slots": [["x", "jazz"], ["time", "neun"]]},
        {"utterance": "spiel jazz um neun", "slots": [["time", "neun"]], "char_spans": [[14, 18]]},
        {"utt": "spiel jazz um neun", "annot_utt": "spiel [x : jazz] um [time : neun]"},
    ],
)
def test_words_are_searched_in_the_rows_own_text(row, form, order):
    """A prompt may hold the text of another language, in which the same words stand, too."""
    english = {"lang": "en", "utterance": "play jazz at nine", "slots": []}
    fields = {"lang": "de", **row}
    companion = Companion(Record(english, "data.jsonl:2"), form, order)
    both = render("slots", Record(fields, "data.jsonl:1", companion))
    assert "play jazz at nine" in both.prompt
    alone, fused = gold("de", **fields), Gold(both, fields, "0", "de")
    answers = [alone.example.answer, "x: jazz", "time: nine"]
    want, found = (score_slots([one] * 3, answers) for one in (alone, fused))
    for ours, theirs in zip(found.measures, want.measures, strict=True):
        assert ours.parts.tolist() == theirs.parts.tolist()
    assert found.counts == want.counts
    assert want["slot_f1"].parts[0, 0] == want["slot_f1"].parts[0, 2] > 0
    assert want["copied"].parts.tolist()[1:] == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("utterance", "slots", "labels"),
    [
        ("in 10 minutes set 1", [["num", "1"]], "Other Other Other Other num"),
        ("what is on at noon", [["prep", "at"]], "Other Other Other prep Other"),
        # Behind the slot before it, if it stands there as a word.
        ("1 or 1 in 10", [["a", "1"], ["b", "1"]], "a Other b Other Other"),
        # Words that stand nowhere alone are found as before.
        ("set 10am", [["num", "10"]], "Other num Other"),
        ("कला कल", [["day", "कल"]], "Other day"),
        ("pay $5, not US$5", [["money", "$5"]], "Other money Other Other Other"),
    ],
)
def test_gold_words_are_words_of_the_command(utterance, slots, labels):
    row = gold(utterance=utterance, slots=slots)
    assert " ".join(tag_command(row).labels) == labels


def test_chinese_has_no_ends_of_words():
    row = gold("zh", utterance="播放歌曲 歌", slots=[["song", "歌"]])
    assert tag_command(row).labels == ["Other", "Other", "song", "Other", "Other"]


def test_only_the_first_part_can_be_the_intent():
    row = wake(kind="intent_slots", intent="alarm/set")
    spans = [["datetime", "at nine"], ["reminder/todo", "gas"]]
    named = {"intent": "alarm/set", "slots": spans}
    # Behind another part `intent` is a type like the others.
    late = {"intent": "", "slots": [["intent", "alarm/set"]]}
    answers = {
        f" intent :  alarm/set ; {RIGHT}": named,
        "intent: alarm/set; None": {"intent": "alarm/set", "slots": []},
        f"Sure thing; intent: alarm/set; {RIGHT}": {**late, "slots": late["slots"] + spans},
        "nonsense; intent: alarm/set": late,
        "; intent: alarm/set": late,
    }
    found = score_intent_slots([row] * 5, list(answers))
    assert list(found.read) == list(answers.values())
    assert found.counts["no_intent"] == 3
    alone = score_intent([row] * 5, list(answers))
    for scored in (found, alone):
        assert scored["intent_accuracy"].parts[:, 0].tolist() == [1, 1, 0, 0, 0]


def test_a_row_without_slots_is_right_where_nothing_is_tagged():
    """As in the paper's code; docs/evaluate.md says so."""
    row = gold(utterance="hello there", slots=[])
    answers = ["None", "", "@@@", "place: Berlin", "place: there"]
    found = score_slots([row] * 5, answers)
    assert found["exact_match"].parts[:, 0].tolist() == [1, 1, 1, 1, 0]
    assert found["slot_f1"].parts[:, 1].tolist() == [0, 0, 0, 0, 1]
    assert found["span_f1"].parts[:, 1].tolist() == [0, 0, 0, 1, 1]


def test_mistakes():
    with pytest.raises(UserError, match="rules must be one of paper, mended"):
        score_slots([wake()], [RIGHT], rules="papre")
    with pytest.raises(UserError, match=r"data\.jsonl:1: .*no 'intent'"):
        score_intent([wake()], [RIGHT])


def test_finished_rows():
    row = gold(kind="rows", prefix="p", text=" yes\n")
    found = SCORERS["rows"]([row] * 3, ["yes", "no", ""])
    assert found["exact_match"].value == pytest.approx(100 / 3)
    assert found.counts == {"empty": 1}


@pytest.mark.parametrize("language", ["en", "de", "tr", "ar", "ja", "zh"])
def test_gold_answers_on_real_rows(language):
    file = XSID / f"test.{language}.jsonl"
    if not file.exists():
        pytest.skip("no xSID here")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    golds = [gold(language, **row) for row in rows]
    answers = [row.example.answer for row in golds]
    by_character = language in ("ja", "zh")
    for rules in ("paper", "mended"):
        found = score_slots(golds, answers, rules=rules)
        # ASCII in a slot is what the paper's comparison by character cannot find.
        blind = by_character and rules == "paper"
        assert (found["slot_f1"].value < 80) if blind else (found["slot_f1"].value > 99)
        assert (found.counts["not_found"] > 0) == blind
        assert found.counts["gold_not_found"] == 0
        true, said = seqeval_f1(golds, answers, rules)
        assert found["slot_f1"].value == 100 * f1_score(true, said)
        # Every slot gets its tags: merged neighbours are the only ones that may be missing.
        words = sum(len(row.fields["slots"]) for row in golds)
        assert 0.95 * words <= sum(s["gold"] for s in found.details["types"].values()) <= words
    assert found["span_f1"].value == 100


def test_annotations_shorter_than_the_command():
    """As in the paper's code: words without a label are searched, but their tags are cut off."""
    row = gold(utt="a b c", annot_utt="a [x : b]")
    found = score_slots([row], ["x: b c"])
    assert found["exact_match"].value == found["slot_f1"].value == 100
