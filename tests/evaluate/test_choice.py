"""Multiple choice: which one a model finds likeliest, by three scores, and how that is judged."""

import json
import math

import jax
import numpy as np
import pytest

from jaxalign.adapters import KINDS
from jaxalign.base import open_base
from jaxalign.data.beginnings import beginnings, encode_choices, token_texts
from jaxalign.data.example import Example
from jaxalign.errors import UserError
from jaxalign.evaluate.ask import ask
from jaxalign.evaluate.choice import score_choice
from jaxalign.evaluate.gold import read_golds
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.run import Entrant, evaluate
from jaxalign.evaluate.write import write
from jaxalign.hf.peft import save_peft
from jaxalign.settings import data
from tests.evaluate.conftest import rows_of
from tests.tiny import SPEC

INTENTS = {"name": "choices", "options": {"number": 3, "form": "intent: {}"}}
CHOOSE = ["evaluate.kind=choice", f"evaluate.transforms={json.dumps([INTENTS])}"]


@pytest.fixture
def choosing(judged):
    """words -> Config that lets the tiny model choose among intents."""
    return lambda *words: judged(*CHOOSE, "mesh.fsdp=-1", *words)


@pytest.fixture(scope="module")
def theirs(base):
    """The tiny model in transformers: texts of tokens -> log-probabilities of the next ones."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def chances(tokens):
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1).double().numpy()

    return chances


def asked(config, limit=4):
    base = open_base(config)
    golds = [gold for rows in read_golds(config, limit).values() for gold in rows]
    questions, _ = ask(base, [gold.example for gold in golds])
    found = {}
    for rows, texts, _ in questions.chunks(base, base.bare()):
        found |= {row: json.loads(text) for row, text in zip(rows, texts, strict=True)}
    return base, golds, questions, [found[row] for row in range(len(golds))]


def test_label_is_the_log_likelihood_of_transformers(choosing, theirs):
    base, golds, questions, found = asked(choosing())
    for gold, prompt, said in zip(golds, questions.prompts, found, strict=True):
        assert base.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
        for choice, score, count in zip(
            gold.example.choices, said["scores"], said["tokens"], strict=True
        ):
            label = base.tokenizer(choice)["input_ids"]  # no end token
            chances = theirs(prompt + label)[len(prompt) - 1 : -1]
            whole = sum(row[token] for row, token in zip(chances, label, strict=True))
            assert count == len(label) and score == pytest.approx(whole, abs=2e-4)


def test_prefix_sum_is_the_plain_loop_over_the_vocabulary(choosing, theirs):
    base, golds, questions, found = asked(choosing("evaluate.options.score=prefix_sum"))
    tokenizer = base.tokenizer
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    for gold, prompt, said in zip(golds, questions.prompts, found, strict=True):
        next_ = np.exp(theirs(prompt)[-1])
        for choice, score in zip(gold.example.choices, said["scores"], strict=True):
            total = 0.0
            for token, text in enumerate(texts):
                begins = choice.startswith(text) or (" " + choice).startswith(text)
                if text and begins and token not in tokenizer.all_special_ids:
                    total += next_[token]
            assert math.exp(score) == pytest.approx(total, rel=1e-3)


def test_first_token_is_the_argmax_over_the_letters(judged, theirs):
    transforms = json.dumps([INTENTS, "lettered"])
    config = judged(
        "mesh.fsdp=-1",
        "evaluate.kind=choice",
        f"evaluate.transforms={transforms}",
        "evaluate.options.score=first_token",
    )
    base, golds, questions, found = asked(config)
    texts = [json.dumps(said) for said in found]
    read = score_choice(golds, texts, score="first_token").read
    letters = [base.tokenizer(letter)["input_ids"][-1] for letter in "ABC"]
    for gold, prompt, letter in zip(golds, questions.prompts, read, strict=True):
        assert gold.example.choices == ("A", "B", "C") and "\nB. intent: " in gold.example.prompt
        assert letter == "ABC"[int(np.argmax(theirs(prompt)[-1][letters]))]


def test_an_evaluation_from_end_to_end(choosing, adapters, tmp_path):
    config = choosing()
    entrants = [Entrant("base", kind="base"), Entrant("a1", str(adapters / "a1"))]
    found = evaluate(config, entrants, str(tmp_path / "out"))
    assert set(found.measures) == {"accuracy", "accuracy_norm"}
    rows = rows_of(tmp_path / "out" / "a1" / "predictions.jsonl")
    assert len(rows) == 16 and {row["language"] for row in rows} == {"en", "de"}
    for row in rows:
        scores = json.loads(row["answer"])["scores"]
        assert row["read"].startswith("intent: ") and len(scores) == 3
    hits = np.mean([row["read"] == row["reference"] for row in rows if row["language"] == "de"])
    (mean,) = [found.measures["accuracy"].languages["a1"]["de"].mean]
    assert mean == pytest.approx(100 * hits)
    # Known answers are not asked again, and the same are found without them.
    kept = (tmp_path / "out" / "a1" / "answers.jsonl").read_bytes()
    evaluate(config, entrants, str(tmp_path / "out"))
    assert (tmp_path / "out" / "a1" / "answers.jsonl").read_bytes() == kept
    files = [Entrant("a1", str(tmp_path / "out" / "a1" / "predictions.jsonl"), "predictions")]
    again = evaluate(config, files, str(tmp_path / "again"))
    for name in found.measures:
        assert again.measures[name].languages["a1"] == found.measures[name].languages["a1"]
    with pytest.raises(UserError, match="made with score=label, now it is prefix_sum"):
        evaluate(choosing("evaluate.options.score=prefix_sum"), entrants, str(tmp_path / "out"))


@pytest.mark.slow
def test_trained_prompts_choose_too(choosing, base, tmp_path):
    """Adapters of every kind of virtual tokens, from a folder to a score; each says its own."""
    config, entrants = choosing("evaluate.rows=2"), [Entrant("base", kind="base")]
    params = open_base(config).bare().params
    for kind in ("prefix", "prompt", "pool"):
        adapter = KINDS[kind](3)
        trained = adapter.init(SPEC, jax.random.key(0), params)
        draw = lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape)  # noqa: E731
        save_peft(tmp_path / kind, jax.tree.map(draw, trained), SPEC, adapter, base_name=base)
        entrants.append(Entrant(kind, str(tmp_path / kind)))
    evaluate(config, entrants, str(tmp_path / "out"))
    said = set()
    for one in entrants:
        rows = rows_of(tmp_path / "out" / one.name / "predictions.jsonl")
        scores = [json.loads(row["answer"])["scores"] for row in rows]
        assert len(rows) == 4 and np.isfinite(scores).all() and np.max(scores) < 0
        said.add(str(scores))
    assert len(said) == 4


def test_solved_rows_come_before_the_question(choosing, tmp_path):
    config = choosing("evaluate.shots=2", "evaluate.rows=2")
    found = evaluate(config, [Entrant("base", kind="few_shot")], str(tmp_path / "out"))
    assert 0 <= found.measures["accuracy"].languages["base"]["en"].mean <= 100
    out = tmp_path / "answers.jsonl"
    write(config, "", [], [], str(out))
    assert all("scores" in json.loads(row["answer"]) for row in rows_of(out))


# Reading ------------------------------------------------------------------------------------------


def gold(*choices, answer=0):
    example = Example("q", choices[answer], choices=choices)
    return Gold(example, {}, "1", "en")


def said(*scores, tokens=(1, 1, 1)):
    return json.dumps({"scores": scores, "tokens": tokens[: len(scores)]})


def test_accuracy_and_its_norms_are_those_of_lm_evaluation_harness():
    rows = [gold("aa", "bbbb", "é")] * 2
    answers = [said(-3.0, -4.0, -2.9), said(-3.0, -7.0, -2.0)]
    found = score_choice(rows, answers)
    assert found.read == ("é", "é") and found["accuracy"].value == 0
    # -3/2, -4/4, -2.9/1 by characters; -2.9/2 by bytes; -3/1, -4/2, ... by tokens.
    assert [score_choice(rows, answers, norm=n)["accuracy_norm"].parts[:, 0].tolist()
            for n in ("characters", "bytes")] == [[0, 1], [0, 0]]  # fmt: skip
    by_tokens = score_choice(rows[:1], [said(-3.0, -4.0, -5.0, tokens=(3, 2, 1))], norm="tokens")
    assert by_tokens["accuracy_norm"].value == 100
    assert [m.name for m in score_choice(rows, answers, score="prefix_sum").measures] == [
        "accuracy"
    ]


def test_answers_of_others_are_read_too():
    rows = [gold("yes", "no", "so", answer=1)] * 6
    answers = ["no", " no\n", "No", "", said(-1.0, -1.0), said(-1.0, -1.0, -2.0)]
    found = score_choice(rows, answers)
    assert found["accuracy"].parts[:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert found.read == ("no", "no", "", "", "", "yes")
    assert found.counts == {"ill_formed": 3, "tied": 1}
    assert score_choice(rows[:1], ['{"scores": [NaN, 1, 2], "tokens": [1, 1, 1]}']).read == ("",)


def test_blanks_around_a_choice_are_no_part_of_it():
    """Behind a `prefix` choices begin with a blank, and written answers are stripped."""
    rows = [gold(" yes", " no\n", answer=1)] * 4
    found = score_choice(rows, [" no\n", "no", " no", "yes"])
    assert found["accuracy"].parts[:, 0].tolist() == [1, 1, 1, 0]
    assert found.read == (" no\n", " no\n", " no\n", " yes")


def test_one_sentence(choosing, judged):
    for words, says in (
        (["evaluate.options.score=labels"], "'labels' should be one of label, prefix_sum"),
        (["evaluate.options.norm=words"], "'words' should be one of characters"),
        (["evaluate.options.rules=paper"], "the scorer of choice takes score, norm"),
    ):
        with pytest.raises(UserError, match=says):
            evaluate(choosing(*words), [Entrant("base", kind="base")], "unused")
    with pytest.raises(UserError, match="rows of kind text ask nothing"):
        read_golds(judged("task.kind=text"))
    assert {"choice", "text"} < set(data.KINDS)


# Tokens -------------------------------------------------------------------------------------------


def test_beginnings_of_a_label(base):
    from jaxalign.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base)
    texts = token_texts(tokenizer)
    assert [texts[i] for i in tokenizer("wake me up")["input_ids"]][-1].startswith(" ")
    found = beginnings(["remind", "weather/find"], tokenizer)
    for label, tokens in found.items():
        assert all((label.startswith(texts[i]) or f" {label}".startswith(texts[i])) for i in tokens)
        assert {label[0], " "} <= {texts[i] for i in tokens}


def test_a_choice_is_what_prompt_and_choice_have_more_than_the_prompt(base):
    from jaxalign.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base)
    finished = Example("Answer:", " yes", choices=(" yes", " no"))
    chat = Example("q", "yes", system="", choices=("yes", "no"))
    for example in (finished, chat):
        (found,) = encode_choices([example], tokenizer)
        assert [tokenizer.decode(tokens) for tokens in found] == list(example.choices)
