"""`switch_values`: slots in words of other languages, which still stand in the text."""

import pytest

from jaxalign.data.sources import Record
from jaxalign.data.streams import task_stream
from jaxalign.data.tasks import render
from jaxalign.data.transforms import transformed
from jaxalign.errors import UserError
from jaxalign.settings import Config

PAIRS = [
    Record(
        {"text0": f"bir iki üç dört {n}", "text1": "one", "lang0": "tr", "lang1": "en"}, f"p:{n}"
    )
    for n in range(9)
]
WORDS = {"bir", "iki", "üç", "dört", *map(str, range(9))}
HINDI = Record({"texts": {"en": "how", "hi": "कैसे हो?"}}, "p:hi")
CHINESE = Record({"texts": {"en": "how", "zh": "今天天气怎么样。"}}, "p:zh")
ALARM = Record(
    {"id": "7", "lang": "en", "utterance": "wake me at nine am on monday",
     "slots": [["datetime", "nine am"], ["day", "monday"]], "char_spans": [[11, 18], [22, 28]]},
    "rows:1",
)  # fmt: skip


def run(records, seed=1, **options):
    entry = {"name": "switch_values", "options": {"rate": 1.0, "others": 0.0, **options}}
    return transformed(list(records), [entry], "task.transforms", "train", seed)


def test_words_are_of_the_pairs_as_many_and_still_in_the_text():
    for seed in range(20):
        (found,) = run([ALARM, *PAIRS], seed)
        (_, time), (_, day) = found.fields["slots"]
        assert found.fields["utterance"] == f"wake me at {time} on {day}"
        assert len(time.split()) == 2 and len(day.split()) == 1
        assert {*time.split(), *day.split()} <= WORDS
        assert render("slots", found).answer == f"datetime: {time}; day: {day}"
        assert found.fields["lang"] == "en" and found.fields["id"] == "7"
        assert "char_spans" not in found.fields and found.origin == "rows:1"


def test_the_rate_is_the_share_of_slots_and_a_seed_repeats_it():
    rows = [*[ALARM] * 500, *PAIRS]
    found = run(rows, rate=0.3)
    switched = sum(row.fields["slots"][n][1] != ALARM.fields["slots"][n][1]
                   for row in found for n in (0, 1))  # fmt: skip
    assert len(found) == 500 and 250 < switched < 350  # of 1,000; three deviations are 43
    assert found == run(rows, rate=0.3) and found != run(rows, seed=2, rate=0.3)
    assert all(row is ALARM for row in run(rows, rate=0))
    # A row of which nothing was drawn keeps all its fields.
    assert any(row is ALARM for row in found)


def test_words_end_at_letters_and_their_marks():
    rows = [Record({"utterance": "say a b", "slots": [["x", "a b"]]}, "r")]
    assert run([*rows, HINDI])[0].fields["slots"] == [["x", "कैसे हो"]]
    (found,) = run(
        [Record({"utterance": "say a b c d", "slots": [["x", "a b c d"]]}, "r"), CHINESE]
    )
    assert found.fields["slots"] == [["x", "今天天气怎么样"]]  # two letters for a word


@pytest.mark.parametrize(
    ("utterance", "slots"),
    [
        ("now now", [["t", "now"]]),  # which one?
        ("wake me", [["t", "nine"]]),  # not in the text
        ("wake me at nine", [["t", "nine"], ["d", "monday"]]),  # one of them
        ("nine am", [["t", "nine am"], ["h", "am"]]),  # one within the other
    ],
)
def test_a_row_of_which_a_slot_has_no_certain_place_stays(utterance, slots):
    row = Record({"utterance": utterance, "slots": slots}, "r")
    assert run([row, *PAIRS], others=1.0) == [row]


def test_a_wrong_place_is_not_believed():
    row = Record({"utterance": "wake me", "slots": [["t", "me"]], "char_spans": [[-2, 7]]}, "r")
    (found,) = run([row, *PAIRS])
    assert found.fields["utterance"] == f"wake {found.fields['slots'][0][1]}"


def test_other_words_are_replaced_one_by_one_and_signs_stay():
    row = Record({"utterance": "wake me , at nine ?", "slots": [["t", "nine"]]}, "r")
    for seed in range(10):
        (found,) = run([row, *PAIRS], seed, rate=0.0, others=1.0)
        assert found.fields["slots"] == [["t", "nine"]]
        first, second, comma, third, *rest = found.fields["utterance"].split(" ")
        assert {first, second, third} <= WORDS and [comma, *rest] == [",", "nine", "?"]
        (found,) = run([row, *PAIRS], seed, others=1.0)
        (_, time), *_ = found.fields["slots"]
        assert time in WORDS and found.fields["utterance"].endswith(f" {time} ?")


def test_what_is_foreign_says_nothing_about_where_slots_are():
    """As many words are replaced outside of slots as within, in rows without slots too."""
    bare = Record({"utterance": "stop that", "slots": []}, "r")
    found = run([*[ALARM, bare] * 500, *PAIRS], rate=0.3, others=0.3)
    outside = [word for row in found for word in row.fields["utterance"].split()]
    inside = [word for row in found for _, words in row.fields["slots"] for word in words.split()]
    for words in (outside, inside):
        assert 0.25 < sum(word in WORDS for word in words) / len(words) < 0.35
    stopped = [row for row in found if not row.fields["slots"]]
    assert len(stopped) == 500
    assert 200 < sum(row.fields["utterance"] != "stop that" for row in stopped) < 310  # 0.51
    assert all(row.fields["utterance"].count(words) for row in found
               for _, words in row.fields["slots"])  # fmt: skip


def test_massive_rows_and_entities():
    row = Record({"utt": "wake me at nine", "annot_utt": "wake me at [time : nine]"}, "r")
    (found,) = run([row, *PAIRS])
    words = found.fields["slots"][0][1]
    example = render("slots", found)
    assert example.prompt == f"wake me at {words}" and example.answer == f"time: {words}"
    row = Record({"text": "in Rome", "entities": [["LOC", "Rome", 1, 2]], "tokens": ["in"]}, "r")
    (found,) = run([row, *PAIRS])
    words = found.fields["entities"][0][1]
    assert render("ner", found).prompt == f"in {words}" and words in render("ner", found).answer
    assert "tokens" not in found.fields


@pytest.mark.parametrize(
    "columns", [{"source": "crowd"}, {"src": "web"}, {"source": "crowd", "target": "day: monday"}]
)
def test_a_column_that_is_called_as_a_side_of_a_pair_takes_no_row_away(columns):
    row = Record({"utterance": "wake me on monday", "slots": [["day", "monday"]]} | columns, "r")
    (found,) = run([row, *PAIRS])
    assert found.fields["slots"][0][1] in WORDS
    # A table of both has all columns in each row, empty ones in the others.
    empty = dict.fromkeys(["utterance", "slots", "text0", "text1", "lang0", "lang1"])
    table = [Record(empty | one.fields, one.origin) for one in (row, *PAIRS)]
    assert [one.fields["slots"] for one in run(table)] == [found.fields["slots"]]


def test_languages_are_those_that_are_asked_for():
    rows = [*[ALARM] * 50, *PAIRS, HINDI]
    words = {slot[1] for row in run(rows, languages=["hi"]) for slot in row.fields["slots"]}
    assert words <= {"कैसे", "हो", "कैसे हो"}


@pytest.mark.parametrize(
    ("records", "options", "says"),
    [
        ([ALARM], {}, "list a file of pairs"),
        ([ALARM, *PAIRS], {"languages": ["de"]}, "no row is in 'de'"),
        ([ALARM, *PAIRS], {"rate": 2}, "from 0 to 1"),
        ([Record({"text": "x"}, "f:3"), *PAIRS], {}, "f:3: this row has no 'utterance'"),
        ([ALARM, Record({"texts": {"en": "x"}}, "p")], {}, "see the option pivot"),
        (PAIRS, {}, "leaves no row"),
    ],
)
def test_one_sentence(records, options, says):
    with pytest.raises(UserError) as error:
        run(records, **options)
    assert says in str(error.value) and str(error.value).startswith("task.transforms[0]")


def test_a_stream_has_the_task_rows_alone(chatml, jsonl):
    config = Config()
    config.task.kind = "slots"
    config.task.train = [
        jsonl("rows.jsonl", [ALARM.fields] * 4),
        jsonl("pairs.jsonl", [pair.fields for pair in PAIRS]),
    ]
    config.task.transforms = [{"name": "switch_values", "options": {"rate": 1.0}}]
    config.batch.size = 4
    stream = task_stream(config, chatml)
    assert len(stream.rows) == 4
    assert len({tuple(row.tokens) for row in stream.rows}) > 1  # each row draws its own words
