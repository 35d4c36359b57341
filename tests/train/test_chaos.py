"""Killed at random moments until it is done: bit by bit what nobody disturbed.

JAXALIGN_KILLS=40 pytest -m slow -s tests/train/test_chaos.py     # 40 in all instead of 200
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxalign.config import to_yaml
from tests.chaos import Server, same_files, table, torment, undisturbed

KILLS = int(os.environ.get("JAXALIGN_KILLS", "200"))
TRAINING, OTHERS = KILLS * 11 // 20, KILLS * 3 // 20
# The keys of a line that tell of time.
CLOCK = ("time", "tokens_per_second", "seconds_per_step", "mfu")


@pytest.fixture(scope="module")
def server():
    with Server() as started:
        yield started


def told(folder):
    """The lines of updates and validations, without what the clock says."""
    rows = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in row.items() if not key.endswith(CLOCK)}
        for row in rows
        if row["event"] in ("train", "eval")
    ]


def test_training_short(server, configure, tmp_path):
    assert len(train(server, configure, tmp_path, kills=2, steps=8)) >= 2


@pytest.mark.slow
def test_training(server, configure, tmp_path):
    kills = train(server, configure, tmp_path, kills=TRAINING, steps=30)
    assert {kill.signal.name for kill in kills} == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert sum(kill.inside == "save" for kill in kills) >= TRAINING // 20


def train(server, configure, tmp_path, kills, steps):
    words = (f"train.steps={steps}", "train.eval_every=3", "checkpoint.every=2",
             "train.patience=0")  # fmt: skip
    file, rng, found = tmp_path / "own.yaml", np.random.default_rng(7), []
    whole = tmp_path / "whole"
    file.write_text(to_yaml(configure(*words, f"output={whole}")), "utf-8")
    span = undisturbed(server, ["train", str(file)], whole)
    while len(found) < kills:
        out = tmp_path / "killed"
        shutil.rmtree(out, ignore_errors=True)
        command = ["train", str(file), f"output={out}"]
        found += torment(server, command, out, kills - len(found), rng, span)
        assert not same_files(whole / "adapter", out / "adapter")
        assert told(out) == told(whole)
        left = {path.name for path in out.iterdir()}
        assert left == {
            ".lock", "adapter", "best", "checkpoints", "config.yaml", "log.jsonl", "result.json",
        }, left  # fmt: skip
        assert not [p for p in out.rglob("*") if "orbax-checkpoint-tmp" in p.name]
    print("\n" + table("training", found))
    return found


@pytest.fixture(scope="module")
def adapter(server, tmp_path_factory):
    """The settings and the output of a run that was trained once, for those that read one."""
    return tmp_path_factory.mktemp("trained"), server


def trained(adapter, configure):
    """The run's folder; its YAML file is beside it."""
    place, server = adapter
    out, file = place / "run", place / "run.yaml"
    if not out.exists():
        file.write_text(to_yaml(configure("train.steps=2", f"output={out}")), "utf-8")
        undisturbed(server, ["train", str(file)], out)
    return out, file


def beside(server, words, place, kills, names=None):
    """A command with `OUT` in its words, once as it is and then killed; files must be the same."""
    rng, found, whole, out = np.random.default_rng(11), [], place / "whole", place / "out"
    words = [word.replace("OUT", str(out)) for word in words]
    span = undisturbed(server, words, out)
    out.rename(whole)
    while len(found) < kills:
        shutil.rmtree(out, ignore_errors=True)
        found += torment(server, words, out, kills - len(found), rng, span)
        differ = [n for n in same_files(whole, out) if names is None or n in names]
        assert not differ, differ
    print("\n" + table(words[0], found))
    return found


@pytest.mark.slow
def test_generation(server, adapter, configure, rows, tmp_path):
    out, file = trained(adapter, configure)
    words = ["generate", str(file), "--adapter", str(out / "adapter"), "--data",
             str(rows / "task.jsonl"), "--out", "OUT/answers.jsonl", "generate.max_new_tokens=8",
             "generate.batch=2"]  # fmt: skip
    assert len(beside(server, words, tmp_path, OTHERS, names={"answers.jsonl"})) >= OTHERS


@pytest.mark.slow
def test_probe(server, adapter, configure, rows, tmp_path):
    out, file = trained(adapter, configure)
    pairs = [json.loads(line) for line in (rows / "pairs.jsonl").read_text().splitlines()]
    texts = [(p.get("text0") or p["source"], p.get("text1") or p["target"]) for p in pairs]
    parallel = tmp_path / "en-de.tsv"
    parallel.write_text("".join(f"{a}\t{b}\n" for a, b in texts), "utf-8")
    words = ["probe", str(file), "--parallel", str(parallel), "--adapter", str(out / "adapter"),
             "--out", "OUT"]  # fmt: skip
    assert len(beside(server, words, tmp_path, OTHERS)) >= OTHERS


@pytest.mark.slow
def test_export(server, adapter, configure, tmp_path):
    out, _ = trained(adapter, configure)
    words = ["export", str(out), "--format", "merged", "--out", "OUT/model"]
    assert len(beside(server, words, tmp_path, OTHERS)) >= OTHERS
