"""Scores of a sample while training: the same numbers as afterwards, and they may choose."""

import dataclasses
import signal
from pathlib import Path

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluate.during import sample_judge
from jaxalign.evaluate.gold import kind_of
from jaxalign.evaluate.run import Entrant, evaluate
from jaxalign.evaluate.scorers import SCORERS
from jaxalign.train.loop import train
from jaxalign.train.stop import Request
from tests.train.conftest import base, configure, rows  # noqa: F401  (fixtures)
from tests.train.test_loop import lines, use_devices

pytestmark = pytest.mark.usefixtures("one_device")


def test_the_sample_chooses_the_best(configure, golds, monkeypatch, tmp_path):  # noqa: F811
    use_devices(monkeypatch, 1)
    config = configure(
        "train.steps=4", "train.eval_every=2", "train.metric=eval/intent_accuracy",
        "train.goal=max", f"evaluate.data=[{golds}/test.*.jsonl]", "evaluate.sample=4",
        "generate.max_new_tokens=8", "lora.dropout=0.0", "mesh.fsdp=1",
    )  # fmt: skip
    result = train(config, judge=sample_judge(config))
    logged = lines(config, "eval")
    assert len(logged) == 2
    keys = {"eval/slot_f1", "eval/slot_f1/de", "eval/intent_accuracy/en", "eval/task_loss"}
    assert keys <= logged[0].keys()
    config.evaluate.rows = 4
    after = evaluate(config, [Entrant("a", result.adapter)], str(tmp_path / "out"))
    row = next(row for row in logged if row["step"] == result.best_step)
    for measure in ("intent_accuracy", "span_f1"):
        score = after.measures[measure].groups["a"]["all"].mean
        assert row[f"eval/{measure}"] == pytest.approx(score, abs=1e-9)


def test_other_rows_of_a_sample_that_judged_are_refused(configure, golds, monkeypatch, tmp_path):  # noqa: F811
    """Scores of other rows would be compared with the best so far."""
    use_devices(monkeypatch, 1)
    lines_of = (golds / "test.en.jsonl").read_text().splitlines(True)
    file, copy = tmp_path / "judged.jsonl", "".join(lines_of[:2])
    words = (
        "task.valid=[]", "align.weight=0", "align.valid=[]", "train.metric=eval/exact_match",
        "train.goal=max", "train.eval_every=1", f"evaluate.data=[{file}]", "evaluate.sample=2",
        "generate.max_new_tokens=2", "mesh.fsdp=1",
    )  # fmt: skip

    def run(steps, text):
        file.write_text(text)
        config = configure(*words, f"train.steps={steps}")
        return train(config, judge=sample_judge(config))

    run(1, copy)
    assert run(1, copy).repeated
    assert not run(1, copy + "".join(lines_of[2:3])).repeated  # a row that is not of the sample
    other = "".join(lines_of[2:4])
    for steps in (1, 2):  # to repeat it, to go on
        with pytest.raises(UserError, match=r"trained with other rows of evaluate\.data than are"):
            run(steps, other)
    assert run(2, copy).step == 2


def test_a_stop_does_not_wait_for_the_other_answers(configure, golds, monkeypatch):  # noqa: F811
    """A machine that goes away gives seconds: between two batches of answers the run looks up."""
    use_devices(monkeypatch, 1)
    calls = []
    real = Request.leave

    def leave(self, step):
        calls.append(step)
        if len(calls) == 2:
            self.hear(signal.SIGTERM)
        real(self, step)

    monkeypatch.setattr(Request, "leave", leave)
    config = configure(
        "train.steps=1", "task.valid=[]", "align.valid=[]", "align.weight=0",
        "train.metric=eval/intent_accuracy", "train.goal=max", "evaluate.sample=4",
        f"evaluate.data=[{golds}/test.*.jsonl]", "generate.max_new_tokens=8", "mesh.fsdp=1",
        "generate.batch=2",
    )  # fmt: skip
    result = train(config, judge=sample_judge(config))
    assert (result.step, result.stopped, calls) == (1, "signal", [1, 1])
    assert lines(config, "eval") == []
    assert Path(config.output, "checkpoints", "1").is_dir()


def test_a_metric_without_rows_is_refused(configure, golds):  # noqa: F811
    config = configure(f"evaluate.data=[{golds}/test.*.jsonl]", "evaluate.sample=2",
                       "task.valid=[]", "align.valid=[]", "train.steps=1")  # fmt: skip
    with pytest.raises(UserError, match=r"train\.metric: eval/loss needs validation rows"):
        train(config, judge=sample_judge(config))


def test_options_that_the_scorer_lacks_are_refused(configure, golds):  # noqa: F811
    config = configure(f"evaluate.data=[{golds}/test.*.jsonl]", "evaluate.sample=2",
                       "evaluate.options={tokenize: zh}")  # fmt: skip
    with pytest.raises(UserError, match=r"evaluate\.options\.tokenize"):
        sample_judge(config)


def test_a_score_is_of_the_languages_that_have_it(configure, golds, monkeypatch):  # noqa: F811
    """As fidelity, which is missing in a language that nobody recognises."""
    config = configure(f"evaluate.data=[{golds}/test.*.jsonl]", "evaluate.sample=2")
    scorer = SCORERS[kind_of(config)]

    def some(part, answers):
        found = scorer(part, answers)
        if part[0].example.language == "en":
            return found
        fewer = [one for one in found.measures if one.name != "span_f1"]
        return dataclasses.replace(found, measures=fewer)

    monkeypatch.setitem(SCORERS, kind_of(config), some)
    scores = sample_judge(config).scores
    assert {"eval/span_f1", "eval/span_f1/en", "eval/slot_f1/en", "eval/slot_f1/de"} <= scores
    assert "eval/span_f1/de" not in scores


def test_no_sample_no_judge(configure):  # noqa: F811
    assert sample_judge(configure()) is None
