"""The demo from end to end, cut to a few steps and rows: what it prints, writes and measures."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from jaxalign import base
from jaxalign.cli import main
from jaxalign.data.pairs import to_pair
from jaxalign.data.sources import read
from jaxalign.demo import ALIGNED, ASSETS, LANGUAGES
from jaxalign.demo import run as demo
from jaxalign.demo.corpus import normal
from jaxalign.demo.measure import read_rows
from jaxalign.sharding import make_mesh


def test_demo_reports_what_it_measured(tmp_path, capsys, monkeypatch):
    one = partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(base, "make_mesh", one)
    rows = read_rows(ASSETS, "test", LANGUAGES)
    few = {name: dict(list(part.items())[:60]) for name, part in rows.items()}
    monkeypatch.setattr(demo, "read_rows", lambda *_: few)
    out = tmp_path / "demo"
    words = ["train.steps=3", "train.eval_every=0", "batch.size=8", "batch.pairs=8",
             "batch.buckets=[40]", "train.eval_batches=1"]  # fmt: skip
    assert main(["demo", "--out", str(out), *words]) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "demo.json").read_text())
    assert [run["kind"] for run in found["runs"]] == ["sft", "aligned"]
    for run in (*found["runs"], found["base"]):
        assert set(run["retrieval"]) == set(LANGUAGES) - {"en"}
        assert all(len(layers) == 5 for layers in run["retrieval"].values())
    # The embeddings are frozen: layer 0 is the same before and after.
    for language, layers in found["base"]["retrieval"].items():
        for run in found["runs"]:
            assert run["retrieval"][language][0] == pytest.approx(layers[0], abs=0.01)
    scores = found["runs"][1]["scores"]["intent_accuracy"]
    mean = np.mean([scores[lang] for lang in ALIGNED])
    row = next(line for line in printed.splitlines() if "mean, with pairs" in line)
    assert f"{mean:.1f}" in row
    assert str(found["runs"][1]["adapter"]) in printed.replace("\n", "")
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("word", ["seed=7", "output=x"])
def test_what_the_demo_decides_is_not_set_by_words(word, capsys):
    assert main(["demo", "--seeds", "3", word]) == 2
    assert "is set for each run of the demo; use --seeds or --out" in capsys.readouterr().err


def test_nothing_measured_was_trained_on():
    """No test or dev utterance is a pair or a task row."""
    measured = {
        normal(record.fields["utterance"])
        for split in ("test", "dev")
        for record in read(str(ASSETS / "data" / f"{split}.*.jsonl"))
    }
    trained = [
        record.fields["utterance"] for record in read(str(ASSETS / "data" / "train.en.jsonl"))
    ]
    for name in ("pairs_xsid", "pairs_tatoeba"):
        for record in read(str(ASSETS / "data" / f"{name}.jsonl")):
            pair = to_pair(record)
            trained += [pair.source, pair.target]
    assert len(trained) > 10_000
    assert not {normal(text) for text in trained} & measured
