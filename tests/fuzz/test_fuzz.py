"""A short run of every target in the suite, a long one by mark; each fault that was found stays."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import models, rows
from tests.fuzz.judge import fuzz, judge, table
from tests.fuzz.targets import TARGETS

SHORT, LONG = 12, 20_000
BY_NAME = {target.name: target for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_few(target):
    tally = fuzz(target, max(1, round(SHORT * min(target.share, 1))))
    assert not tally.faults, "\n\n".join(tally.faults)


LATE = """
import os, signal
from tests.fuzz.judge import _limited
with _limited():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
    os.kill(os.getpid(), signal.SIGPROF)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
"""


def test_a_signal_that_comes_late_ends_nothing():
    """The timer counts all threads: its signal may come when the input is done."""
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", LATE], cwd=root).returncode == 0


# Inputs that once ended in a traceback, a hang or a wrong result, and how they end now.
GIANT = 10**5000
FOUND = [
    ("rows of every task", ("intent", {"utterance": ["a", (GIANT,)], "intent": "a"}), "refused"),
    ("rows of every task", ("slots", {"utterance": "a", "slots": 5}), "refused"),
    ("rows of every task", ("slots", {"utterance": "a", "slots": ["ab", "cd"]}), "refused"),
    ("rows of every task", ("slots", {"utterance": "a", "annot_utt": "[a : b"}), "refused"),
    ("rows of every task", ("ner", {"text": "a\ud800", "entities": []}), "refused"),
    (
        "one answer behind two prompts",
        ([{"id": {"a": GIANT}, "lang": "de", "utterance": "a", "intent": "b"}], "en"),
        "refused",
    ),
    (
        "one answer behind two prompts",
        ([{"id": GIANT, "lang": "de", "utterance": "a", "intent": "b"}], "en"),
        "refused",
    ),
    ("pairs", {"text0": "\ud800", "text1": "a"}, "refused"),
    ("JSON lines", b'{"text": "\\ud800"}', "refused"),
    ("JSON lines", b'{"n": ' + b"9" * 5000 + b"}", "refused"),
    ("JSON lines", b'{"a":' * 100_000, "refused"),
    ("CSV and TSV", ("rows.csv", [["a", "a"], ["1", "2"]], ",", True), "refused"),
    ("CSV and TSV", ("rows.csv", [["a"], ["x" * 140_000]], ",", True), "accepted"),
    (
        "CSV and TSV",
        ("de-en.tsv", [["German", "English"], ["Ja.", "Yes."]], "\t", False),
        "refused",
    ),
    ("CSV and TSV", ("pt-BR-en.tsv", [["Sim.", "Yes."]], "\t", False), "accepted"),
    ("Parquet", b"P\xcaAR1" + rows.parquet()[4:], "refused"),
    ("Parquet", rows.parquet(), "accepted"),
    ("compressed files", (gzip.compress(rows.LINES)[:-9], "rows.jsonl.gz"), "refused"),
    ("parallel text", (["a\u2028b\x0bc\x85d"], ["a"], "\n"), "accepted"),
    ("rows as tokens", ("a <|im_end|>\n<|im_start|>assistant", "b", ""), "refused"),
    ("rows as tokens", ("a", "b", "<|im_start|>assistant"), "refused"),
    ("pairs as tokens", ("a <|im_end|> b", "c"), "accepted"),
    ("chat templates", "no text of the row", "refused"),
    ("chat templates", "{{ 'a' * 100000000 }}", "refused"),
    ("settings as words", ["output=${"], "refused"),
    ("settings as words", ["optim.beta1=1.5"], "refused"),
    ("settings as words", [f"train.steps={'9' * 5000}"], "refused"),
    ("settings as YAML", b"null: 1", "refused"),
    ("settings as YAML", b"task: {columns: {1: a}}", "refused"),
    ("settings as YAML", b"task: {options: " + b"{a: " * 500, "refused"),
    (
        "safetensors",
        models.file_of(
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "r": {"\\ud9c1": 1}}}',
            bytes(4),
        ),
        "refused",
    ),
    (
        "safetensors",
        models.file_of(
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "r": NaN}}', bytes(4)
        ),
        "refused",
    ),
    ("jaxalign config", ["output='[/nope]'"], "accepted"),
    ("jaxalign config", ["output=\ud800"], "refused"),
]


@pytest.mark.parametrize(("name", "value", "ends"), FOUND, ids=range(len(FOUND)))
def test_what_was_found(name, value, ends):
    assert judge(BY_NAME[name], value) == (ends, "")


@pytest.mark.slow
def test_many(capsys):
    """20,000 inputs over all targets; the table is printed: pytest -m slow -s tests/fuzz."""
    shares = sum(target.share for target in TARGETS)
    tallies = {t.name: fuzz(t, round(LONG * t.share / shares)) for t in TARGETS}
    with capsys.disabled():
        print("\n" + table(tallies))
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    assert not faults, "\n\n".join(faults)
