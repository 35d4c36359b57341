"""What the log says: how long updates took, which were skipped; and a tracker's own run."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jaxalign.train import metrics
from jaxalign.train.flops import Work
from jaxalign.train.metrics import Log
from jaxalign.train.pace import Pace


class Arriving:
    """A number of the device: ready from `at` on; who waits for it moves the clock there."""

    def __init__(self, now, at):
        self._now, self._at = now, at

    def is_ready(self):
        return self._now.at >= self._at

    def block_until_ready(self):
        self._now.at = max(self._now.at, self._at)
        return self

    def __array__(self, dtype=None, copy=None):
        return np.float32(1.0)

    def __float__(self):
        return 1.0


@pytest.fixture
def now(monkeypatch):
    time = SimpleNamespace(at=0.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: time.at)
    monkeypatch.setattr(metrics.jax, "device_get", lambda tree: tree)
    return time


def read(folder, event="train"):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def test_an_update_lasts_until_it_is_over(tmp_path, now):
    """Updates of 14 s, dispatched two ahead, after 11 s of compiling; then 30 s of validation."""
    log, pace = Log(tmp_path, steps=6, every=1, progress="none"), Pace(ahead=2)
    now.at = 11.0
    for step in range(1, 7):
        result = Arriving(now, 11.0 + 14 * step)
        pace.dispatched(result, {"task": Work(28, 1.0)})
        log.update(step, {"loss": result}, {"task": Work(28, 1.0)})
    log.drain()
    now.at += 30
    log.event("eval", 6, {"eval/loss": 1.0})
    result = Arriving(now, now.at + 14)
    log.update(7, {"loss": result}, {"task": Work(28, 1.0)})
    log.close()
    assert [row["seconds_per_step"] for row in read(tmp_path)] == [25, *[14] * 6]
    assert [row["tokens_per_second"] for row in read(tmp_path)][1:] == [2.0] * 6


def test_updates_that_end_unseen_share_their_time(tmp_path, now):
    log = Log(tmp_path, steps=6, every=1, progress="none")
    for step in (1, 2):
        log.update(step, {"loss": Arriving(now, 0.5 * step)}, {"task": Work(8, 1.0)})
    now.at = 3.0  # the host was away
    log.close()
    assert [row["seconds_per_step"] for row in read(tmp_path)] == [1.5, 1.5]
    assert [row["flops_per_step"] for row in read(tmp_path)] == [1.0, 1.0]


def test_means_are_those_of_updates_that_were_done():
    done, bad = {"loss": 2.0, "skipped": 0}, {"loss": float("nan"), "skipped": 1}
    assert metrics.mean_metrics([done, bad, {"loss": 4.0, "skipped": 0}]) == {
        "loss": 3.0,
        "skipped": 1,
    }
    alone = metrics.mean_metrics([bad])
    assert np.isnan(alone["loss"]) and alone["skipped"] == 1


def test_a_tracker_goes_on_with_its_own_run(tmp_path, monkeypatch):
    asked = []

    def init(**settings):
        asked.append(settings)
        return SimpleNamespace(log=lambda values, step: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start, project in ((0, "one"), (3, "one"), (3, "two"), (0, "one")):
        log = Log(tmp_path, steps=6, start=start, progress="none", wandb=project)
        log.event("eval", 3, {"eval/loss": 1.0})
        log.close()
    first, resumed, other, fresh = (one["id"] for one in asked)
    assert first == resumed and len({first, other, fresh}) == 3
    assert all(one["resume"] == "allow" for one in asked)
    (known,) = read(tmp_path, "wandb")
    assert known["id"] == fresh and known["step"] == 0
