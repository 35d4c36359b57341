"""A long run: memory and file handles stay flat, nothing is compiled again.

JAXALIGN_UPDATES=2000 pytest -m slow -s tests/train/test_endurance.py     # a shorter one
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.train import loop
from tests.train.test_loop import lines, use_devices

UPDATES = int(os.environ.get("JAXALIGN_UPDATES", "20000"))
LOOKS = 20


@pytest.mark.slow
def test_nothing_grows(configure, monkeypatch):
    use_devices(monkeypatch, 1)
    every = UPDATES // (4 * LOOKS)
    config = configure(
        f"train.steps={UPDATES}", f"train.eval_every={every}", f"checkpoint.every={every}",
        "train.eval_batches=1", "train.log_every=50", "batch.size=4", "batch.pairs=4",
        "batch.max_length=96", "batch.buckets=[96]", "batch.accumulate=2", "train.patience=0",
    )  # fmt: skip
    compiled, seen = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    real = loop.validate

    def validate(run, state):
        found = real(run, state)
        if int(state.step) % (UPDATES // LOOKS) == 0:
            seen.append((int(state.step), _megabytes(), _handles(), len(compiled)))
        return found

    monkeypatch.setattr(loop, "validate", validate)
    result = loop.train(config)
    assert result.step == UPDATES
    print(f"\n{'update':>8s} {'MB':>8s} {'handles':>8s} {'programs':>8s}")
    for row in seen:
        print("{:8d} {:8.0f} {:8d} {:8d}".format(*row))
    steps, memory, handles, programs = np.array(seen, float).T
    late = steps > UPDATES / 4
    slope = np.polyfit(steps[late], memory[late], 1)[0] * UPDATES
    print(f"memory grows by {slope:+.1f} MB over {UPDATES} updates; log "
          f"{Path(config.output, 'log.jsonl').stat().st_size / 1e6:.1f} MB")  # fmt: skip
    assert slope < 0.05 * memory[-1]
    # A checkpoint that is being written holds a few.
    third = len(handles) // 3
    assert handles[-third:].max() <= handles[:third].max() + 5
    assert programs[late].max() == programs[late].min()
    assert len(lines(config, "eval")) == 4 * LOOKS
    assert sorted(os.listdir(Path(config.output, "checkpoints"))) == sorted(
        map(str, (UPDATES - every, UPDATES))
    )


def _megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _handles() -> int:
    return len(os.listdir("/proc/self/fd"))
