"""A damaged evaluation folder: its numbers are those that were written, or one sentence says why.

`pytest -m slow tests/evaluate/test_damage.py -s` prints the table of the whole sweep.
"""

from collections import Counter

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluate.gold import read_golds
from jaxalign.evaluate.predictions import read_predictions
from jaxalign.evaluate.run import Entrant, evaluate
from jaxalign.evaluate.write import write
from jaxalign.probe.tasks import read_scores
from tests.corrupt import sweep
from tests.evaluate.conftest import rows_of
from tests.tiny import ASSETS

pytestmark = pytest.mark.usefixtures("one_device")
LANGUAGES = ("da", "de", "it", "en")


class Probed:
    """As much of a probe's table as reading scores takes."""

    systems, languages, pivot = ("gold", "a"), LANGUAGES, "en"


class Evaluation:
    """A finished evaluation, how to do it again, and everything that reads it."""

    def __init__(self, config, entrants, folder):
        self.config, self.entrants, self.folder = config, entrants, folder
        self.golds = read_golds(config)
        self.again()

    def read(self):
        """What a user's next command takes from the folder."""
        texts = read_predictions(str(self.folder / "a" / "predictions.jsonl"), self.golds)
        return texts, read_scores(str(self.folder / "report.json"), Probed)

    def again(self):
        evaluate(self.config, self.entrants, str(self.folder))
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.suffix in (".json", ".csv", ".md", ".tex") or "predictions" in path.name
        }


@pytest.fixture
def configure(judged):
    data = ",".join(str(ASSETS / f"test.{language}.jsonl") for language in LANGUAGES)
    return judged("evaluate.rows=2", f"evaluate.data=[{data}]")


def outcome(call, right):
    """'the same' or 'refused'; anything else fails the test."""
    try:
        found = call()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return "refused"
    assert found == right
    return "the same"


def swept(evaluation, flips):
    read_right, again_right = evaluation.read(), evaluation.again()
    table = Counter()
    for damage in sweep(evaluation.folder, flips):
        name = damage.path.relative_to(evaluation.folder).as_posix()
        with damage:
            table[name, damage.how, "read", outcome(evaluation.read, read_right)] += 1
            done = outcome(evaluation.again, again_right)
            table[name, damage.how, "evaluated again", done] += 1
    assert evaluation.again() == again_right
    return table


def test_some_damages(configure, tmp_path):
    """Of files of predictions and reports; `test_answers` damages answers, bit by bit."""
    texts = [gold.example.answer for rows in read_golds(configure).values() for gold in rows]
    (tmp_path / "gold.txt").write_text("".join(f"{text}\n" for text in texts))
    entrants = [Entrant("a", str(tmp_path / "gold.txt"), "predictions")]
    table = swept(Evaluation(configure, entrants, tmp_path / "out"), flips=6)
    assert table["a/predictions.jsonl", "cut", "read", "refused"] == 1
    assert table["report.json", "cut", "read", "refused"] == 1
    # What is only written is written again.
    assert not any(what == "evaluated again" and how == "refused" for *_, what, how in table)


@pytest.mark.slow
def test_every_file_and_200_bits(configure, adapters, tmp_path):
    entrants = [Entrant("gold", kind="base"), Entrant("a", f"{adapters}/a1")]
    table = swept(Evaluation(configure, entrants, tmp_path / "out"), flips=200)
    for key, number in sorted(table.items()):
        print(f"{' | '.join(key):70s} {number:4d}")
    assert table.total() > 400
    assert table["a/answers.jsonl", "cut", "evaluated again", "the same"] == 1


def test_answers_of_generate_are_repaired(judged, adapters, tmp_path):
    config, out = judged("evaluate.rows=3"), tmp_path / "answers.jsonl"
    data = config.evaluate.data[0].replace("*", "de")

    def again():
        write(config, f"{adapters}/a1", [], [data], str(out))
        return rows_of(out)

    right = again()
    table = Counter()
    for damage in sweep(tmp_path, flips=8):
        with damage:
            table[damage.path.name, damage.how, outcome(again, right)] += 1
    # Answers are written whole from the cache; the cache tells whose answers it holds, or says so.
    assert not any(name == "answers.jsonl" and how == "refused" for name, _, how in table)
    assert table["answers.jsonl.cache", "cut", "the same"] == 1
