"""Systems answer, are scored and compared; a run that dies goes on; bad input is told."""

import contextlib
import json

import numpy as np
import pytest

from jaxalign.base import open_base
from jaxalign.data.wanted import wanted_examples, wanted_pairs
from jaxalign.errors import UserError
from jaxalign.evaluate import comparable
from jaxalign.evaluate import run as running
from jaxalign.evaluate.answers import Answers
from jaxalign.evaluate.ask import ask
from jaxalign.evaluate.compare import compare
from jaxalign.evaluate.entrants import name_of
from jaxalign.evaluate.gold import questions, read_golds, solved_examples, with_shots
from jaxalign.evaluate.prepare import identity, prepare
from jaxalign.evaluate.run import Entrant, evaluate, score
from jaxalign.evaluate.write import write
from jaxalign.generate import System
from jaxalign.generate import run as generation
from jaxalign.hf.peft import weights_digest
from tests.evaluate.conftest import rows_of

pytestmark = pytest.mark.usefixtures("one_device")


def test_systems_side_by_side(judged, adapters, tmp_path, capsys):
    entrants = [Entrant("a", f"{adapters}/a1"), Entrant("a", f"{adapters}/a2"),
                Entrant("base", kind="base"), Entrant("base 2-shot", kind="few_shot")]  # fmt: skip
    config = judged("evaluate.shots=2", "evaluate.groups={supervised: [en], transfer: [de]}")
    found = evaluate(config, entrants, str(tmp_path / "out"))
    assert found.systems == ["a", "base", "base 2-shot"] and found.seeds["a"] == 2
    assert found.groups == {"supervised": ["en"], "transfer": ["de"], "all": ["de", "en"]}
    assert set(found.measures) >= {"slot_f1", "exact_match", "intent_accuracy"}
    out = capsys.readouterr().out
    assert "slot" in out and "transfer" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a_1", "a_2", "base", "base 2-shot", "report.json", "report.md", "report.tex",
                     "report.csv", "gains.png", "SHA256SUMS"}  # fmt: skip
    rows = rows_of(tmp_path / "out" / "a_1" / "predictions.jsonl")
    assert len(rows) == 16 and list(rows[0]) == [
        "id", "language", "question", "reference", "answer", "read",
    ]  # fmt: skip
    bare = rows_of(tmp_path / "out" / "base" / "predictions.jsonl")
    assert [row["answer"] for row in rows] != [row["answer"] for row in bare]
    # The written predictions score the same without a model.
    again = evaluate(
        judged("model.path=''"),
        [Entrant("file", str(tmp_path / "out" / "base" / "predictions.jsonl"), "predictions")],
        str(tmp_path / "again"),
    )
    for measure in ("slot_f1", "exact_match", "intent_accuracy"):
        assert (
            again.measures[measure].languages["file"]["de"].mean
            == found.measures[measure].languages["base"]["de"].mean
        )


def test_a_report_knows_whose_answers_it_is_of(judged, adapters, tmp_path, monkeypatch):
    out = tmp_path / "out"
    entrants = [Entrant("a", f"{adapters}/a1"), Entrant("a", f"{adapters}/a2"),
                Entrant("base", kind="base")]  # fmt: skip
    config = judged()
    evaluate(config, entrants, str(out))
    made_by = json.loads((out / "report.json").read_text("utf-8"))["made_by"]
    digests = [weights_digest(f"{adapters}/{name}") for name in ("a1", "a2")]
    assert [one["adapter_weights"] for one in made_by["a"]] == digests
    assert [one["adapter_weights"] for one in made_by["base"]] == [""]
    assert {one["base"] for of in made_by.values() for one in of} == {open_base(config).fingerprint}
    # A run that dies while it answers leaves no report of what was there before.
    monkeypatch.setattr(running, "answer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(config, entrants[:1], str(out))
    assert not [file for file in out.iterdir() if file.is_file()]


def test_merged_and_unmerged_adapters_say_the_same(judged, adapters, tmp_path):
    answers = []
    for how in ("unmerged", "merged"):
        config = judged(f"generate.adapter={how}")
        evaluate(config, [Entrant("a", f"{adapters}/a1")], str(tmp_path / how))
        rows = rows_of(tmp_path / how / "a" / "predictions.jsonl")
        answers.append([row["answer"] for row in rows])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", ["greedy", "sample"])
def test_a_killed_run_goes_on(judged, adapters, tmp_path, monkeypatch, method):
    config = judged(f"generate.method={method}", "generate.temperature=3.0")
    entrant = [Entrant("a", f"{adapters}/a1")]
    evaluate(config, entrant, str(tmp_path / "whole"))
    expected = (tmp_path / "whole" / "a" / "predictions.jsonl").read_bytes()

    real, written = System.chunks, []

    def dies_after_two(self, prompts, *args, **kwargs):
        for number, part in enumerate(real(self, prompts, *args, **kwargs)):
            if number == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(System, "chunks", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, entrant, str(tmp_path / "parts"))
    cache = tmp_path / "parts" / "a" / "answers.jsonl"
    assert len(rows_of(cache)) == 1 + 8
    with cache.open("a", encoding="utf-8") as file:
        file.write('{"key": "torn')  # the line at which the process died

    def counts(self, prompts, *args, **kwargs):
        for part in real(self, prompts, *args, **kwargs):
            written.extend(part[0])
            yield part

    monkeypatch.setattr(System, "chunks", counts)
    evaluate(config, entrant, str(tmp_path / "parts"))
    assert len(written) == 8  # the other half
    assert (tmp_path / "parts" / "a" / "predictions.jsonl").read_bytes() == expected
    evaluate(config, entrant, str(tmp_path / "parts"))
    assert len(written) == 8  # nothing is generated twice


def test_what_prompts_share_is_said_and_changes_no_answer(
    judged, adapters, tmp_path, capsys, monkeypatch
):
    real, shared = generation.share, []
    monkeypatch.setattr(generation, "share", lambda *given: shared.append(1) or real(*given))
    entrant = [Entrant("a", f"{adapters}/a1")]
    evaluate(judged("generate.share_prefix=off"), entrant, str(tmp_path / "off"))
    assert "share their first" not in capsys.readouterr().out and not shared
    evaluate(judged(), entrant, str(tmp_path / "auto"))
    assert shared == [1]
    said = "a: 16 prompts of 2,067 tokens share their first 109: 624 tokens computed"
    assert said in capsys.readouterr().out
    off, auto = (tmp_path / name / "a" / "predictions.jsonl" for name in ("off", "auto"))
    assert auto.read_bytes() == off.read_bytes()
    # About speed: the answers of the one are those of the other.
    evaluate(judged("generate.share_prefix=off"), entrant, str(tmp_path / "auto"))


def test_answers_of_other_settings_are_not_mixed(judged, adapters, tmp_path):
    entrant = [Entrant("a", f"{adapters}/a1")]
    evaluate(judged(), entrant, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"made with max_new_tokens=6, now it is 5; choose another"):
        evaluate(judged("generate.max_new_tokens=5"), entrant, str(tmp_path / "out"))
    with pytest.raises(UserError, match="made with adapter_weights="):
        evaluate(judged(), [Entrant("a", f"{adapters}/a2")], str(tmp_path / "out"))


def test_a_file_that_two_sources_name_is_refused(judged, golds):
    one, other = f"{golds}/test.*.jsonl", f"{golds}/../{golds.name}/test.en.jsonl"
    with pytest.raises(UserError) as error:
        read_golds(judged(f"evaluate.data=[{one},{other}]"))
    assert str(error.value) == (
        f"evaluate.data: {other} is named by {one} and by {other}, and its rows would count "
        "twice; leave one of them out"
    )
    # To train on rows twice may be meant.
    config = judged("evaluate.shots=99", f"task.train=[{other},{other}]")
    assert len(solved_examples(config)[""]) == 18


def test_shots_are_in_the_languages_of_the_task(judged, golds):
    train = f"task.train=[{golds}/test.*.jsonl]"
    german = {row["utterance"] for row in rows_of(golds / "test.de.jsonl")}
    found = solved_examples(judged("evaluate.shots=16", train, "task.languages=[de]"))[""]
    assert {question for question, _ in found} == german and len(found) == 7
    assert len(solved_examples(judged("evaluate.shots=16", train))[""]) == 16
    with pytest.raises(UserError, match=r"task\.languages: no row of task\.train is in cy"):
        solved_examples(judged("evaluate.shots=2", train, "task.languages=[cy]"))


def test_shots_are_turns_before_the_question(judged):
    config = judged("evaluate.shots=2")
    golds = read_golds(config)
    shown = with_shots(golds, solved_examples(config))
    base = open_base(config)
    (plain,), _ = base.encode([golds["de"][0].example])
    (prompt,), _ = base.encode([shown["de"][0].example])
    text = base.tokenizer.decode(prompt)
    for question, answer in solved_examples(config)[""]:
        assert question in text and answer in text
    assert text.count("<|im_start|>user") == 3 and text.count("<|im_start|>assistant") == 3
    assert base.tokenizer.decode(plain).split("<|im_start|>user")[-1] == text.split(
        "<|im_start|>user")[-1]  # fmt: skip
    assert solved_examples(config) == solved_examples(config)


def test_shots_of_translations_are_of_the_rows_direction(judged, tmp_path):
    def file(name, *directions):
        rows = [
            {"src": f"{a} {i}", "tgt": f"{b} {i}", "src_lang": a, "tgt_lang": b}
            for a, b in directions
            for i in range(5)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return tmp_path / name

    train = file("train.jsonl", ("fr", "en"), ("en", "de"), ("de", "en"))
    words = ["task.kind=translation", f"task.train=[{train}]", "evaluate.shots=3"]
    test = file("test.jsonl", ("de", "en"), ("fr", "en"))
    config = judged(*words, f"evaluate.data=[{test}]")
    shown = with_shots(read_golds(config), solved_examples(config))
    for direction, rows in shown.items():
        source, target = direction.split("-")
        for gold in rows:
            assert len(gold.example.shots) == 3
            assert all(
                question.startswith(source) and answer.startswith(target)
                for question, answer in gold.example.shots
            )
    config = judged(*words, f"evaluate.data=[{file('other.jsonl', ('es', 'en'))}]")
    with pytest.raises(UserError, match=r"translates es-en \(they have: fr-en, en-de, de-en\)"):
        with_shots(read_golds(config), solved_examples(config))


def test_finished_questions_take_no_shots(judged, tmp_path):
    """They have no turns; their solved rows were left out without a word."""
    row = {"lang": "en", "choices": ["yes", "no"], "answer": 0}
    for name, field in (("asked", "question"), ("finished", "prefix")):
        lines = [json.dumps({**row, field: f"q{i}"}) + "\n" for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    words = ["task.kind=choice", f"task.train=[{tmp_path}/asked.jsonl]", "evaluate.shots=2"]
    config = judged(*words, f"evaluate.data=[{tmp_path}/asked.jsonl]")
    assert with_shots(read_golds(config), solved_examples(config))["en"][0].example.shots
    config = judged(*words, f"evaluate.data=[{tmp_path}/finished.jsonl]")
    with pytest.raises(UserError, match=r"finished\.jsonl:1: .*finished row.*evaluate\.shots=0"):
        with_shots(read_golds(config), solved_examples(config))


@pytest.mark.parametrize(
    ("kind", "field"), [("slots", "utterance"), ("intent_slots", "utterance"), ("ner", "text")]
)
def test_copied_words_are_not_asked_in_another_language(judged, tmp_path, kind, field):
    rows = [
        {"id": "1", "lang": language, field: words, "intent": "x", "slots": [["time", words]],
         "entities": [["PER", words]]}
        for language, words in (("en", "nine"), ("de", "neun"))
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"evaluate.data=[{tmp_path}/rows.jsonl]"
    asks = "evaluate.transforms=[{name: cross_lingual_answer, options: {rate: 1}}]"
    if kind != "ner":
        assert read_golds(judged("task.kind=intent", data, asks))
    config = judged(f"task.kind={kind}", data, asks)
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: answers of kind {kind} copy words"):
        evaluate(config, [Entrant("base", kind="base")], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_finished_rows_end_where_answers_end(judged, tmp_path):
    """Their text ends with the end token, which no answer holds."""
    row = {"lang": "en", "prefix": "Who?\nAnswer:", "text": " Goethe<|im_end|>"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = judged("task.kind=rows", f"evaluate.data=[{tmp_path}/rows.jsonl]")
    golds = read_golds(config)
    for answer, right in ((" Goethe", 100), ("Goethe<|im_end|>\n", 100), ("Goethe!", 0), ("", 0)):
        assert running.score(config, golds, {"en": [answer]})["en"]["exact_match"].value == right
    # What is written down is the row's own text, by which the answers of a file are compared.
    assert golds["en"][0].example.answer == row["text"]
    config.model.path = ""
    found = running.score(config, read_golds(config), {"en": ["Goethe<|im_end|>"]})
    assert found["en"]["exact_match"].value == 100


def test_long_prompts(judged, golds):
    config = judged("generate.max_new_tokens=480")
    base = open_base(config)
    examples = [gold.example for gold in read_golds(config)["en"]]
    with pytest.raises(
        UserError, match=r"test.en.jsonl:1: the prompt has \d+ tokens .*generate.long=cut"
    ):
        base.encode(examples)
    config.generate.long = "cut"
    prompts, cut = open_base(config).encode(examples)
    assert cut == len(examples) and {len(p) for p in prompts} == {32}
    whole, _ = open_base(judged()).encode(examples)
    assert prompts[0] == whole[0][-32:]  # the question at the end stays


def test_rows_per_language_and_only_some_languages(judged):
    golds = read_golds(judged("evaluate.rows=3", "evaluate.languages=[de]"))
    assert {language: len(rows) for language, rows in golds.items()} == {"de": 3}


def test_rows_are_known_by_what_they_hold(judged, golds, tmp_path):
    """Other rows under equal ids are others; prompts that a transform makes are not."""
    data = f"evaluate.data=[{tmp_path}/test.*.jsonl]"
    for file in golds.glob("test.*.jsonl"):
        rows = rows_of(file)
        for row in rows:
            row["utterance"] += "!" if row is rows[1] else ""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / file.name).write_text(text, "utf-8")
    silent = {language: [""] * len(rows) for language, rows in read_golds(judged()).items()}
    fused = "evaluate.transforms=[{name: bilingual_prompt, options: {form: answers}}]"
    own, other, same = (
        score(config, read_golds(config), silent)
        for config in (judged(), judged(data), judged(fused))
    )
    compare([comparable.System("a", [own]), comparable.System("b", [same])], {}, draws=5)
    with pytest.raises(UserError, match="b: the rows of de are not those of a"):
        compare([comparable.System("a", [own]), comparable.System("b", [other])], {}, draws=5)


def test_answers_are_written_for_the_rows_that_are_judged(judged, golds):
    config = judged("evaluate.rows=3", "evaluate.languages=[de]")
    (judged_rows,) = read_golds(config).values()
    assert questions(config, config.evaluate.data) == judged_rows
    with pytest.raises(UserError, match=r"evaluate\.languages: no row of .*test\.en\.jsonl is in"):
        questions(config, [f"{golds}/test.en.jsonl"])
    # Groups of an evaluation say nothing of other data.
    config = judged("evaluate.groups={low: [cy]}")
    assert len(questions(config, [f"{golds}/test.en.jsonl"])) == 9


def test_a_row_draws_one_answer_wherever_it_stands(judged, tmp_path):
    base = [Entrant("base", kind="base")]

    def drawn(folder: str, *words: str) -> dict[tuple[str, str], str]:
        config = judged("generate.method=sample", "generate.temperature=30", "generate.batch=1",
                        "generate.max_new_tokens=4", *words)  # fmt: skip
        evaluate(config, base, str(tmp_path / folder))
        found = rows_of(tmp_path / folder / "base" / "predictions.jsonl")
        return {(row["language"], row["id"]): row["answer"] for row in found}

    few, grown = drawn("grown", "evaluate.rows=1"), drawn("grown", "evaluate.rows=3")
    whole = drawn("whole", "evaluate.rows=3")
    assert whole == grown and few.items() <= whole.items() and len(set(whole.values())) == 6
    assert drawn("part", "evaluate.rows=3", "evaluate.languages=[en]").items() <= whole.items()
    config = judged("generate.method=sample", "generate.temperature=30", "generate.batch=1",
                    "generate.max_new_tokens=4", "evaluate.rows=2")  # fmt: skip
    write(config, "", [], [], str(tmp_path / "answers.jsonl"))
    written = {(row["language"], row["id"]): row["answer"]
               for row in rows_of(tmp_path / "answers.jsonl")}  # fmt: skip
    assert written.items() <= whole.items() and len(written) == 4


def test_answers_that_were_drawn_by_place_are_refused(judged, tmp_path):
    """They would be mixed with others; answers that are not drawn stay."""
    for method, kept in (("sample", False), ("greedy", True), ("beam", True)):
        base = open_base(judged(f"generate.method={method}"))
        (rows, *_) = read_golds(base.config).values()
        file = tmp_path / method / "answers.jsonl"
        entrant, examples = Entrant("base", kind="base"), [gold.example for gold in rows]
        made = identity(base, entrant, base.prompts, ask(base, examples)[0])
        Answers(file, {name: value for name, value in made.items() if name != "drawn_by"})
        with contextlib.nullcontext() if kept else pytest.raises(UserError, match="drawn_by=None"):
            prepare(base, entrant, examples, file)


def test_columns_of_the_training_are_not_those_of_an_evaluation(judged, adapters, tmp_path, capsys):
    def told(*words: str) -> list[bool]:
        config = judged("evaluate.rows=1", *words)
        found = []
        for work in (
            lambda: evaluate(config, [Entrant("base", kind="base")], str(tmp_path / "e")),
            lambda: write(config, "", [], [], str(tmp_path / "w" / "answers.jsonl")),
        ):
            work()
            text = capsys.readouterr()
            found.append("set evaluate.columns" in " ".join((text.out + text.err).split()))
        return found

    renamed = "task.columns={utterance: better}"
    assert told(renamed) == [True, True]
    assert told() == told(renamed, "evaluate.columns={utterance: utterance}") == [False, False]


@pytest.mark.parametrize("name", ["task", "align", "evaluate"])
def test_the_sentence_about_a_column_names_the_setting_that_helps(judged, tmp_path, name):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"sentence": "x", "text1": "y", "intent": "a", "slots": []}) + "\n", "utf-8"
    )
    config = judged(f"task.train=[{file}]", f"align.train=[{file}]", f"evaluate.data=[{file}]")
    read = {"task": wanted_examples, "align": wanted_pairs, "evaluate": read_golds}[name]
    with pytest.raises(UserError, match=rf"{name}\.columns\.(utterance|text0)=\.\.\."):
        read(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate.data=[]"], "evaluate.data is empty"),
        (["evaluate.languages=[dee]"], "evaluate.languages: no row of evaluate.data is in 'dee' "
         "(it has: de, en); did you mean 'de'?"),
        (["evaluate.groups={low: [cy]}"], "groups.low: no row of evaluate.data is in 'cy'"),
        (["evaluate.kind=ner"], "this row has no 'entities'"),
    ],
)  # fmt: skip
def test_bad_data_is_told(judged, words, message):
    with pytest.raises(UserError) as error:
        read_golds(judged(*words))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "is empty; it should hold one answer for each row"),
        ("p.txt", "a\nb\n", "holds 2 answers, evaluate.data 16 rows (de 7, en 9)"),
        ("p.jsonl", '{"answer": "a"}\n', "holds 1 answers, evaluate.data 16 rows"),
        ("p.jsonl", '{"language": "xx", "id": "test-0", "answer": "a"}\n',
         "p.jsonl:1: unknown language 'xx'; evaluate.data has de, en"),
        ("p.jsonl", '{"language": "de", "id": "test-0", "answer": "a"}\n',
         "has no answer to row 'test-2' of de"),
        ("p.jsonl", '{"text": "a"}\n', "p.jsonl:1: this row has no text under 'answer'"),
    ],
)  # fmt: skip
def test_bad_predictions_are_told(judged, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        evaluate(judged(), [Entrant("p", str(tmp_path / name), "predictions")], str(tmp_path / "o"))
    assert message in str(error.value)


def test_text_predictions_one_a_line(judged, tmp_path):
    golds = read_golds(judged())
    flat = [gold.example.answer for rows in golds.values() for gold in rows]
    (tmp_path / "gold.txt").write_text("\n".join(flat) + "\n")
    found = evaluate(
        judged(), [Entrant("gold", str(tmp_path / "gold.txt"), "predictions")], str(tmp_path / "o")
    )
    assert found.measures["intent_accuracy"].groups["gold"]["all"].mean == 100


def test_name_of():
    names = [name_of(p) for p in ("runs/sft/adapter", "runs/sft/adapter/", "a.jsonl", "org/name")]
    assert names == ["sft", "sft", "a", "name"]
    paths = "runs/lr0.001/adapter", "runs/llama3.1", "sweep/lr0.003/predictions.jsonl"
    assert [name_of(path) for path in paths] == ["lr0.001", "llama3.1", "lr0.003"]


def test_write_answers_rows_and_prompts(judged, adapters, golds, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    unlabelled = tmp_path / "questions.jsonl"
    rows = rows_of(golds / "test.de.jsonl")
    unlabelled.write_text(
        "".join(json.dumps({"utterance": row["utterance"], "lang": "de"}) + "\n" for row in rows)
    )
    write(judged(), f"{adapters}/a1", [], [str(unlabelled)], str(out))
    written = rows_of(out)
    assert [row["question"] for row in written] == [row["utterance"] for row in rows]
    evaluate(judged("evaluate.languages=[de]"), [Entrant("a", f"{adapters}/a1")],
             str(tmp_path / "e"))  # fmt: skip
    judged_rows = rows_of(tmp_path / "e" / "a" / "predictions.jsonl")
    assert [row["answer"] for row in written] == [row["answer"] for row in judged_rows]
    before = out.read_bytes()
    write(judged(), f"{adapters}/a1", [], [str(unlabelled)], str(out))
    assert out.read_bytes() == before
    capsys.readouterr()
    write(judged(), f"{adapters}/a1", [rows[0]["utterance"]], [], "")
    assert capsys.readouterr().out.strip() == written[0]["answer"].strip()
    asked = [row["utterance"] for row in rows[:2]]
    write(judged(), f"{adapters}/a1", asked, [], str(tmp_path / "new" / "prompts.jsonl"))
    assert rows_of(tmp_path / "new" / "prompts.jsonl") == [
        {**row, "language": "und"} for row in written[:2]
    ]
    told = capsys.readouterr().out  # answers are printed as well
    assert written[0]["answer"].strip() in told and "2 answers; written: " in told
    with pytest.raises(UserError, match=r"--out: .* is a folder"):
        write(judged("model.path=nowhere"), "", asked, [], str(tmp_path))
    with pytest.raises(UserError, match="does not say enough for translation"):
        write(judged("task.kind=translation"), "", ["hello"], [], "")


def test_every_row_is_in_the_bootstrap(judged, tmp_path):
    golds = read_golds(judged())
    scored = running.score(judged(), golds, {lang: [""] * len(golds[lang]) for lang in golds})
    assert np.shape(scored["de"].measures[0].parts)[0] == 7 == len(scored["de"].ids)
