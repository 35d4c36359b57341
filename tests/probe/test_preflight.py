"""What is wrong with a probe is said before weights are loaded; what was measured is kept."""

import json
import re

import numpy as np
import pytest

import jaxalign
from jaxalign import base as base_module
from jaxalign import cli
from jaxalign.errors import UserError
from jaxalign.probe import run as run_module
from jaxalign.probe import states as states_module
from jaxalign.probe.corpus import Parallel
from jaxalign.probe.preflight import Probed, check_systems, folder_of
from jaxalign.probe.run import measure_corpora, probe
from tests.probe.tables import in_forms
from tests.tiny import ASSETS

LANGUAGES = ("de", "en", "it", "nl", "tr")


@pytest.fixture
def text(tmp_path):
    """A folder of parallel text in five languages."""
    folder = tmp_path / "text"
    folder.mkdir()
    for language in LANGUAGES:
        lines = (ASSETS / f"test.{language}.jsonl").read_text("utf-8").splitlines()[:12]
        texts = [json.loads(line)["utterance"] for line in lines]
        (folder / f"{language}.txt").write_text("\n".join(texts) + "\n", "utf-8")
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a base fails the test."""

    def loads(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(base_module, "load_params", loads)


def scores_file(tmp_path, content):
    file = tmp_path / "scores.json"
    file.write_text(content)
    return str(file)


BAD = [
    ({"systems": [Probed("base"), Probed("a", "nowhere/adapter")]}, "nowhere/adapter"),
    ({"systems": [Probed("base"), Probed("../../a", "x")]}, "cannot name a system"),
    ({"systems": [Probed("base"), Probed("", "x")]}, "cannot name a system"),
    ({"poolings": ["mean", "max"]}, "--pooling: 'max'"),
    ({"poolings": ["mean", "mean"]}, "--pooling: 'mean'"),
    ({"states_as": ["raw", "whitened"]}, "--states-as: 'whitened'"),
    ({"dtype": "int8"}, "--states: 'int8'"),
    ({"width": 0}, "--width: 0"),
    ({"neurons": -1}, "--neurons: -1"),
    ({"rows": -3}, "--rows: -3"),
    ({"rows": 1}, "one sentence"),
    ({"languages": ["de", "xx"]}, "has no 'xx'"),
    ({"pivot": "zz"}, "pivot language 'zz'"),
    ({"scores": "missing.json"}, "missing.json"),
    ({"items": "missing.jsonl"}, "missing.jsonl"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=[next(iter(row[0])) for row in BAD])
def test_mistakes_are_found_before_the_weights(config, text, tmp_path, no_weights, words, sentence):
    words = {"systems": [Probed("base")], "out": str(tmp_path / "out"), **words}
    with pytest.raises(UserError) as error:
        probe(config, str(text), words.pop("systems"), words.pop("out"), **words)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_files_are_read_before_the_weights(config, text, tmp_path, no_weights):
    def refused(**words):
        with pytest.raises(UserError) as error:
            probe(
                config, str(text), [Probed("base")], words.pop("out", str(tmp_path / "o")), **words
            )
        return str(error.value)

    assert "these were probed: base" in refused(
        scores=scores_file(tmp_path, '{"other": {"de": 1}}')
    )
    assert "only 2 were probed" in refused(scores=scores_file(tmp_path, '{"de": 1, "it": 2}'))
    rows = [
        {"id": "1", "lang": language, "premise": "p", "options": ["a", "b"]}
        for language in ("de", "it")
    ]
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "pivot language 'en'" in refused(items=str(items))
    items.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    assert "de has the item '1'" in refused(items=str(items))
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(out=str(tmp_path / "file"))


def test_sentences_that_are_all_the_same(config, tmp_path, no_weights):
    corpus = Parallel({"de": ["a", "b", "c"], "en": ["x"] * 3}, "made")
    with pytest.raises(UserError, match="all 3 sentences of en"):
        measure_corpora(base_module.open_base(config), [corpus], [Probed("base")], str(tmp_path))


def test_names_become_folders_within_the_report():
    for name in ("de-en", "zh.Hans-en", "runs a+b"):
        assert folder_of(name) == name
    assert folder_of("/data/x/de-en.tsv") == "de-en"
    assert folder_of("..") == folder_of("") == "_"
    assert folder_of("a/../..\\b") == "b"
    check_systems([Probed("base"), Probed("sft 1", "x")])


def test_what_was_measured_is_on_disk_before_it_is_printed(tmp_path, monkeypatch, capsys):
    from jaxalign.probe import report, tasks

    table, said = in_forms(), []
    monkeypatch.setattr(run_module, "probe", lambda *args, **words: table)
    monkeypatch.setattr(tasks, "read_scores", lambda file, names: {})
    monkeypatch.setattr(report, "show", lambda *args: said.append(set(tmp_path.rglob("*.*"))))
    words = ["probe", "model", "--parallel", "text", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    names = {path.name for path in said[0]}
    assert {"report.json", "report.html", "states.png", "pairs.csv"} <= names
    (tmp_path / "out" / "report.json").unlink()

    def fails(*args):
        raise UserError("scores that cannot be related")

    monkeypatch.setattr(tasks, "relations", fails)
    assert cli.main([*words, "--scores", "scores.json"]) == 2
    assert "cannot be related" in capsys.readouterr().err
    saved = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert "standardised_margin" in saved["pairs"]


def test_long_sentences_are_counted(config, tmp_path, monkeypatch):
    monkeypatch.setattr(states_module, "LONGEST", 8)
    corpus = Parallel({"de": ["a", "b", "wake me up " * 9], "en": ["x", "y", "z"]}, "made")
    out = str(tmp_path)
    table = measure_corpora(
        base_module.open_base(config), [corpus], [Probed("base")], out, states_as=["raw"]
    )
    (note,) = table.notes
    assert re.findall(r"\d+", note) == ["6", "1", "8"]
    assert table.forms == ("raw",) and set(table.pairs) == {"cosine", "csls", "margin"}


def test_long_texts_are_counted_wherever_states_are_taken(base, text, tmp_path, capsys):
    long = "wake me up " * 300
    (text / "de.txt").write_text("\n".join([*["es regnet", long] * 6]) + "\n", "utf-8")
    found = jaxalign.states(base, ["rain", long, long + "at nine"], [1])[1]
    assert "Of 3 texts 2 are longer than 512 tokens and were cut." in capsys.readouterr().out
    np.testing.assert_array_equal(found[1], found[2])
    jaxalign.states(base, ["rain"], [1])
    assert "cut" not in capsys.readouterr().out
    words = ["--parallel", str(text), "--out", str(tmp_path / "s.npz"), "--layer", "1"]
    assert cli.main(["prepare", "subspace", base, *words, "model.dtype=float32"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Of 60 sentences 6 are longer than 512 tokens and were cut." in said
