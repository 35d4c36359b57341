"""Transforms that make other texts of parallel rows: what comes out, how often, from which seed."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxalign.data.chat import render_examples
from jaxalign.data.example import Example
from jaxalign.data.sources import Record, read_all
from jaxalign.data.streams import task_stream
from jaxalign.data.tasks import render
from jaxalign.data.transforms import transformed
from jaxalign.data.transforms.code_switch import cut, windows
from jaxalign.errors import UserError
from jaxalign.settings import Config
from tests.tiny import ASSETS

NTREX = Path(__file__).resolve().parents[3] / "shared" / "data" / "ntrex"
FIVE = ["en", "de", "fr", "es", "it"]


def run(records, name, seed=1, **options):
    entry = {"name": name, "options": options}
    return transformed(list(records), [entry], "task.transforms", "train", seed)


def sentences(number=300, languages=FIVE, documents=40):
    """n-way rows: 'de3 7 de de ...', as long as the sentence number says."""
    return [
        Record(
            {"id": str(n), "doc": f"d{n % documents}" if documents else "",
             "texts": {name: " ".join([f"{name}{n}", *[name] * (n % 23)]) for name in languages}},
            f"rows:{n}",
        )
        for n in range(number)
    ]  # fmt: skip


def ntrex(languages):
    """NTREX as n-way rows; docs/objectives.md has these lines."""
    lines = {name: (NTREX / f"{name}.txt").read_text("utf-8").splitlines() for name in languages}
    documents = (NTREX / "doc_ids.txt").read_text("utf-8").splitlines()
    return [
        Record(
            {"id": str(n), "doc": doc, "texts": dict(zip(lines, row, strict=True))}, f"ntrex:{n}"
        )
        for n, (doc, *row) in enumerate(zip(documents, *lines.values(), strict=True))
    ]


def within(counts, shares):
    """Whether each count is within three deviations of its share."""
    total = sum(counts.values())
    return all(
        abs(counts[name] - total * p) <= 3 * np.sqrt(total * p * (1 - p))
        for name, p in shares.items()
    )


# Mixed text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["document", "sentence", "window"])
def test_rate_0_is_the_english_corpus_byte_for_byte(unit):
    if not NTREX.is_dir():
        pytest.skip("needs ../shared/data/ntrex")
    rows = ntrex(["en", "de", "zh"])
    found = run(rows, "code_switch", unit=unit, rate=0)
    text = "\n".join(row.fields["text"] for row in found) + "\n"
    assert text.encode() == (NTREX / "en.txt").read_bytes()
    assert {row.fields["lang"] for row in found} == {"en"}
    assert len(found) == len({row.fields["doc"] for row in rows})


@pytest.mark.parametrize("unit", ["document", "sentence", "window"])
def test_languages_are_drawn_evenly(unit):
    rows = sentences(documents=0 if unit == "document" else 40)
    found = run(rows, "code_switch", unit=unit, languages=FIVE)
    spoken = Counter(name for row in found for name in row.fields["languages"])
    # Where a cut has no word, the window stays English: only of one-word sentences here.
    assert within(spoken, dict.fromkeys(FIVE, 0.2)), spoken
    half = run(rows, "code_switch", unit=unit, languages=FIVE, rate=0.5)
    spoken = Counter(name for row in half for name in row.fields["languages"])
    assert within(spoken, dict.fromkeys(FIVE[1:], 0.1) | {"en": 0.6}), spoken
    assert found == run(rows, "code_switch", unit=unit, languages=FIVE)
    assert found != run(rows, "code_switch", seed=2, unit=unit, languages=FIVE)


def test_units_put_together_are_the_sentences():
    rows = sentences()
    for row in run(rows, "code_switch", unit="sentence", languages=FIVE):
        numbers = [n for n in range(300) if f"d{n % 40}" == row.fields["id"]]
        lines = row.fields["text"].split("\n")
        spoken = row.fields["languages"]
        texts = [rows[n].fields["texts"][name] for n, name in zip(numbers, spoken, strict=True)]
        assert lines == texts
    for row in run(rows, "code_switch", unit="document", languages=FIVE):
        (name,) = row.fields["languages"]
        assert row.fields["lang"] == name and row.fields["text"].startswith(name)


def test_a_window_is_the_proportional_cut_of_the_translation():
    own, other = "one two three four five six", "eins zwei drei vier"
    assert windows(own, 4) == ["one two three four ", "five six"]
    assert [cut(other, n, 4, 6) for n in (0, 1)] == ["eins zwei ", "drei vier"]
    assert [cut("我喜欢你们", n, 4, 6) for n in (0, 1)] == ["我喜欢", "你们"]  # by character
    assert "".join(windows(" two  blanks\t kept ", 1)) == " two  blanks\t kept "
    record = Record({"texts": {"en": own, "de": other, "zh": "我喜欢你们"}}, "x")
    (found,) = run([record], "code_switch", unit="window", window=4, languages=["de"])
    assert found.fields["text"] == "eins zwei drei vier" and found.fields["lang"] == "de"
    short = Record({"texts": {"en": own, "de": "eins"}}, "x")
    (found,) = run([short], "code_switch", unit="window", window=2, languages=["de"])
    assert found.fields["text"] == "one two three four eins"  # cuts without a word stay
    assert found.fields["languages"] == ["en", "en", "de"]


def test_pairs_and_rows_with_ids_are_parallel_too():
    pairs = read_all([str(ASSETS / "pairs_xsid.jsonl")])
    found = run(pairs, "code_switch", languages=["en", "da", "tr"])
    times = Counter((row.fields["text1"], row.fields["lang0"]) for row in pairs)
    most = {text: max(n for (one, _), n in times.items() if one == text) for text, _ in times}
    assert len(found) == sum(most.values())  # an English text as often as a language has it
    rows = read_all([str(ASSETS / f"dev.{name}.jsonl") for name in ("de", "en")])
    found = run(rows, "code_switch", languages=["de"])
    assert [row.fields["text"] for row in found] == [row.fields["utterance"] for row in rows[:79]]
    twice = [
        Record({"text0": f"Hallo {n}", "text1": "Hello", "lang0": "de", "lang1": "en"}, "x")
        for n in range(2)
    ]
    assert len(run(twice, "code_switch", languages=["de"])) == 2  # two German texts, none is lost


def test_sentences_of_documents_that_are_pairs_are_not_lost():
    """Sentences come again, within a document and in others, in every language's pairs."""
    documents = {
        "a": ["Good morning.", "Yes.", "It rains."],
        "b": ["Who is there?", "Yes.", "Come in.", "Yes.", "Yes."],
    }
    pairs = [
        Record({"text0": f"{name} {text}", "text1": text, "lang0": name, "lang1": "en", "doc": doc},
               f"{name}:{doc}")
        for name in ("de", "fr") for doc, texts in documents.items() for text in texts
    ]  # fmt: skip
    found = run(pairs, "code_switch", rate=0)
    assert [row.fields["text"].split("\n") for row in found] == list(documents.values())
    found = run(pairs, "code_switch", languages=["fr"])  # none is left in English
    assert {name for row in found for name in row.fields["languages"]} == {"fr"}
    assert [row.fields["text"].count("\n") for row in found] == [2, 4]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bilingual_prompt", {}),
        ("cross_lingual_answer", {}),
        ("mixup", {}),
        ("question_translation", {}),
        ("code_switch", {"languages": ["de"]}),
    ],
)
def test_an_id_that_two_items_have_is_refused(name, options):
    """Files that both number their rows from 0: a row would go with another one's translation."""
    rows = [
        Record({"id": 0, "lang": lang, "utterance": f"{lang} {file}", "intent": file},
               f"{file}.{lang}.jsonl:1")
        for file in ("alarm", "weather") for lang in ("en", "de")
    ]  # fmt: skip
    says = r"weather\.en\.jsonl:1: the id '0' has a row in 'en' already \(alarm\.en\.jsonl:1\)"
    with pytest.raises(UserError, match=says):
        run(rows, name, **options)
    with pytest.raises(UserError, match=says):  # also where the other language lies between
        run([rows[1], rows[0], rows[2]], name, **options)


def test_a_row_that_is_there_twice_says_the_same():
    rows = [Record({"id": "1", "lang": name, "utterance": name}, "x") for name in ("en", "de")]
    assert len(run([*rows, *rows], "question_translation")) == 1


def test_a_text_trains_all_of_its_tokens(chatml, jsonl):
    config = Config()
    config.task.kind = "text"
    config.task.train = [jsonl("n.jsonl", [row.fields for row in sentences(24)])]
    config.task.transforms = [{"name": "code_switch", "options": {"languages": FIVE}}]
    config.batch.size, config.batch.pack = 4, "none"
    stream = task_stream(config, chatml)
    for row in stream.rows:
        assert row.prompt == 0 and row.targets == len(row.tokens) - 1
    batch = stream.batch(0)
    tokens, at = batch.tokens[0], batch.answer_at[0]
    assert list(tokens[at[: len(tokens[tokens != 0]) - 1] + 1]) == [
        token for token in batch.answers[0] if token != -100
    ]


# Question translation -----------------------------------------------------------------------------


def test_no_training_row_holds_an_answer(chatml):
    rows = read_all([str(ASSETS / f"dev.{name}.jsonl") for name in ("de", "en", "tr")])
    found = run(rows, "question_translation", directions=["x-en"])
    assert len(found) == 2 * 79
    assert all(set(r.fields) == {"src", "tgt", "src_lang", "tgt_lang"} for r in found)
    assert Counter(r.fields["src_lang"] for r in found) == {"de": 79, "tr": 79}
    assert {r.fields["tgt_lang"] for r in found} == {"en"}
    labels = {row.fields["intent"] for row in rows}
    labels |= {kind for row in rows for kind, _ in row.fields["slots"]} - {"location"}
    examples = [render("translation", record) for record in found]
    for whole in render_examples(examples, chatml):
        assert not any(
            label in (whole.prompt + whole.completion).split("<|im_start|>user")[1]
            for label in labels
            if "/" in label or "_" in label
        )
        assert not any(name in whole.prompt for name in ("intent", "slots"))


def test_directions():
    rows = [
        Record({"id": "1", "lang": name, "utterance": f"{name} text"}, "x")
        for name in ("en", "de-st", "sw")
    ]

    def sides(*directions, **more):
        found = run(rows, "question_translation", directions=list(directions), **more)
        return [(row.fields["src_lang"], row.fields["tgt_lang"]) for row in found]

    assert sides() == [("de-st", "en"), ("sw", "en")]
    assert sides(pivot="sw") == [("en", "sw"), ("de-st", "sw")]
    assert sides("sw-de-st", "en-x") == [("sw", "de-st"), ("en", "de-st"), ("en", "sw")]
    with pytest.raises(UserError, match="no row is in 'fr'"):
        sides("fr-en")
    with pytest.raises(UserError, match="should be two languages"):
        sides("fr")


# Companions ---------------------------------------------------------------------------------------


def intents(languages=("de", "en", "tr")):
    return read_all([str(ASSETS / f"dev.{name}.jsonl") for name in languages])


@pytest.mark.parametrize("name", ["bilingual_prompt", "cross_lingual_answer"])
def test_ids_that_match_no_other_language(name):
    """Every row would stay as it is, and the run be one without the transform."""
    rows = [
        replace(row, fields=row.fields | {"id": f"{row.fields['lang']}-{number}"})
        for number, row in enumerate(intents(("de", "en")))
    ]
    with pytest.raises(UserError, match="no row has a translation: translations have the same 'i"):
        run(rows, name)
    alone = intents(("en",))  # rows of one language have none, and no other is meant
    assert run(alone, name) == alone


def test_both_texts_in_one_prompt():
    rows = intents()
    found = run(rows, "bilingual_prompt", order="pivot")
    german, english = render("intent", found[0]), render("intent", found[79])
    assert german.prompt == "English: How hot is it?\nGerman: Wie heiß ist es?"
    assert german.answer == "intent: weather/find" == german.reference
    assert english.prompt == "How hot is it?"  # has no other text
    own = render("intent", run(rows, "bilingual_prompt")[0])
    assert own.prompt == "German: Wie heiß ist es?\nEnglish: How hot is it?"
    # What the answer is judged by stays that of the row alone.
    assert found[0].fields == rows[0].fields
    halves = run(rows, "bilingual_prompt", rate=0.5)
    both = sum(row.companion is not None for row in halves)
    assert abs(both - 79) <= 3 * np.sqrt(158 / 4) and halves == run(
        rows, "bilingual_prompt", rate=0.5
    )
    assert run(rows, "bilingual_prompt", rate=0) == rows


def test_the_english_answer_first():
    example = render("slots", run(intents(), "bilingual_prompt", form="answers")[0])
    assert example.answer == "English: weather/attribute: hot\nGerman: weather/attribute: heiß"
    assert example.reference == "weather/attribute: heiß"
    assert example.read("English: a: b\nGerman: c: d") == "c: d"
    assert example.read("English: a: b") == ""  # never came to its own answer
    assert Example("q", "a").read("all") == "all"


def test_answers_in_another_language():
    rows = intents()
    found = run(rows, "cross_lingual_answer")
    others = [row for row in found if row.companion]
    assert within(Counter(bool(row.companion) for row in found), {True: 0.5, False: 0.5})
    spoken = Counter(
        row.companion.record.fields["lang"] for row in others if row.fields["lang"] == "de"
    )
    assert within(spoken, {"en": 0.5, "tr": 0.5})
    for row in others[:20]:
        example, other = render("slots", row), render("slots", row.companion.record)
        names = {"de": "German", "en": "English", "tr": "Turkish"}
        language = names[row.companion.record.fields["lang"]]
        assert example.prompt == f"{row.fields['utterance']} Answer in {language}:"
        assert example.answer == other.answer
    assert run(rows, "cross_lingual_answer", rate=0) == rows
    plain = [
        Record({"id": "1", "lang": lang, "prefix": f"Say it ({lang})", "text": lang * 2}, "x")
        for lang in ("en", "de")
    ]
    example = render("rows", run(plain, "cross_lingual_answer", rate=1)[0])
    assert (example.prompt, example.answer) == ("Say it (en) Answer in German: ", "dede")
    assert (example.language, example.answered_in) == ("en", "de")


@pytest.mark.parametrize(
    "last",
    [
        {"name": "choices", "options": {"number": 4}},  # a new row has lost the other language
        {"name": "cross_lingual_answer", "options": {"rate": 1}},
        f"{__name__}:doubled",
    ],
)
def test_joined_rows_are_changed_no_more(last):
    def joined(entry):
        return transformed(intents(), ["bilingual_prompt", entry], "task.transforms", "train", 1)

    with pytest.raises(UserError, match=r"changes a row that another transform has joined with"):
        joined(last)
    kept = joined({"name": "sample", "options": {"rows": 20}})
    assert len(kept) == 20 and any(record.companion for record in kept)


def doubled(records, options, seed):
    return [replace(r, fields=r.fields | {"utterance": r.fields["utterance"] * 2}) for r in records]


def test_parts_share_no_item():
    rows = intents()
    train = run(rows, "part", share=0.8)
    valid = run(rows, "part", share=0.8, rest=True)
    one, other = ({row.fields["id"] for row in part} for part in (train, valid))
    assert not one & other and len(one | other) == 79 and len(train) + len(valid) == len(rows)
    assert 50 < len(one) < 75 and train == run(rows, "part", seed=2, share=0.8)
    assert one != {row.fields["id"] for row in run(rows, "part", share=0.8, cut=2)}


# Choices ------------------------------------------------------------------------------------------


def test_choices_of_an_item_are_the_same_in_all_languages():
    rows = intents()
    found = run(rows, "choices", number=4, form="intent: {}")
    for german, english, row in zip(found[:79], found[79:158], rows, strict=False):
        assert german.fields["choices"] == english.fields["choices"]
        assert german.fields["answer"] == english.fields["answer"]
        example = render("choice", german)
        assert example.answer == f"intent: {row.fields['intent']}" and len(example.choices) == 4
        assert example.prompt == row.fields["utterance"] and example.language == "de"
    places = Counter(row.fields["answer"] for row in found[:79])
    assert within(places, dict.fromkeys(range(4), 0.25))


def test_mixup_puts_each_part_into_another_language():
    rows = [
        Record(
            {"id": str(n), "lang": name, "question": f"{name} q{n}",
             "choices": [f"{name} c{n}.{c}" for c in range(4)], "answer": n % 4},
            f"rows:{n}",
        )
        for name in FIVE
        for n in range(200)
    ]  # fmt: skip
    found = run(rows, "mixup", languages=FIVE)
    assert len(found) == 200 and found == run(rows, "mixup", languages=FIVE)
    first = Counter()
    for n, row in enumerate(found):
        parts = [row.fields["question"], *row.fields["choices"]]
        spoken = [part.split()[0] for part in parts]
        assert sorted(spoken) == sorted(FIVE) and spoken == row.fields["languages"]
        assert [part.split()[1] for part in parts] == [f"q{n}", *(f"c{n}.{c}" for c in range(4))]
        assert row.fields["answer"] == n % 4
        first[spoken[0]] += 1
    assert within(first, dict.fromkeys(FIVE, 0.2))
    for what, places in {"question": [0], "options": [1, 2, 3, 4], "right": [2], "wrong": [1, 3, 4],
                         "right_question": [0, 2]}.items():  # fmt: skip
        row = run(rows, "mixup", languages=FIVE, what=what)[1]  # choice 1 is right
        assert [n for n, name in enumerate(row.fields["languages"]) if name != "en"] == places
    with pytest.raises(UserError, match="5 parts of this row would be in different languages; 4"):
        run(rows, "mixup", languages=FIVE[:4])


def test_mixup_of_choices_in_another_order_is_refused():
    listed = {"en": ["Cardiff", "Bangor", "Newport"], "de": ["Bangor", "Newport", "Cardiff"]}
    rows = [
        Record({"id": "1", "lang": name, "question": "?", "choices": texts, "answer": "Cardiff"},
               f"{name}.jsonl:1")
        for name, texts in listed.items()
    ]  # fmt: skip
    says = r"de\.jsonl:1: choice 2 .* right in 'de', but choice 0 in 'en' \(en\.jsonl:1\)"
    with pytest.raises(UserError, match=says):
        run(rows, "mixup", what="right")


def test_letters():
    row = Record(
        {"question": "Which?", "choices": ["x", "y", "z"], "answer": "y", "lang": "en"}, "r"
    )
    (found,) = run([row], "lettered")
    assert found.fields["question"] == "Which?\nA. x\nB. y\nC. z\nAnswer:"
    example = render("choice", found)
    assert example.answer == "B" and example.choices == ("A", "B", "C")


# What does not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "entry", "says"),
    [
        ({"id": "1", "utterance": "x"}, {"name": "bilingual_prompt"}, "names no language"),
        ({"lang": "en", "utterance": "x"}, {"name": "cross_lingual_answer"}, "has no 'id'"),
        ({"id": "1", "lang": "de", "utterance": "x"}, {"name": "bilingual_prompt"}, "no row is in"),
        ({"texts": {"en": ""}}, {"name": "code_switch"}, "the text in 'en' is ''"),
        ({"texts": []}, {"name": "code_switch"}, "should be a mapping"),
        ({"texts": {"de": "x"}}, {"name": "code_switch"}, "no row is in 'en'"),
        ({"texts": {"en": "x"}}, {"name": "code_switch", "options": {"rat": 1}}, "did you mean"),
        ({"texts": {"en": "x"}}, {"name": "code_switch", "options": {"rate": 2}}, "from 0 to 1"),
        ({"texts": {"en": "x"}}, {"name": "code_switch", "options": {"unit": "word"}}, "document"),
        ({"text0": "x", "text1": "y"}, {"name": "question_translation"}, "its two languages"),
        ({"intent": "a", "utterance": "x"}, {"name": "choices"}, "only 1 different"),
        ({"question": "x", "choices": "ab"}, "lettered", "a list of two texts"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "lettered", "from 0 to 1"),
        ({"utterance": "x"}, "part", "has no 'id'"),
        ({"utterance": "x"}, {"name": "part", "options": {"rest": 1}}, "true or false"),
    ],
)
def test_one_sentence(fields, entry, says):
    with pytest.raises(UserError) as error:
        transformed([Record(fields, "f.jsonl:1")], [entry], "task.transforms", "train", 1)
    assert says in str(error.value) and str(error.value).startswith("task.transforms[0]")
    assert "fails:" not in str(error.value)


def test_transforms_of_an_evaluation_know_no_splits():
    row = Record({"src": "a", "tgt": "b", "src_lang": "de"}, "x")
    assert transformed([row], ["swap"], "evaluate.transforms", "data", 1)[0].fields["src"] == "b"
    with pytest.raises(UserError, match="'splits' is not one of name, options"):
        transformed(
            [row], [{"name": "swap", "splits": ["train"]}], "evaluate.transforms", "data", 1
        )
