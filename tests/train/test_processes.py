"""Two processes through jax.distributed train what one trains."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxalign.config import to_yaml
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import load_peft

REPO = Path(__file__).resolve().parents[2]


def start(configs, tmp_path, devices):
    """Starts one process per config, all in one cluster."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for index, config in enumerate(configs):
        file = tmp_path / f"{len(configs)}_{index}.yaml"
        file.write_text(to_yaml(config))
        env = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        }
        if len(configs) > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(len(configs)),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "jaxalign", "train", str(file), "--debug"],
                env=env,
                cwd=REPO,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(started, code=0):
    """Their outputs, once all have ended with this exit code."""
    outputs = [process.communicate(timeout=500)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == code, output
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        (2, ()),
        # As two slices of four chips lie: data between them, everything else within.
        (4, ("mesh.data=2", "mesh.fsdp=4")),
        (4, ("mesh.data=2", "mesh.fsdp=2", "mesh.seq=2")),
    ],
    ids=["2 x 2", "2 x 4", "2 x 4, seq"],
)
def test_two_processes_train_as_one(configure, tmp_path, devices, mesh):
    words = ("lora.dropout=0.0", "train.steps=4", "train.eval_every=2")
    one = configure(*words, f"output={tmp_path / 'one'}")
    two = configure(*words, *mesh, f"output={tmp_path / 'two'}")
    finish(start([one], tmp_path, devices=1))
    outputs = finish(start([two, two], tmp_path, devices=devices))
    assert "written" in outputs[0] and "written" not in outputs[1]

    def events(config):
        rows = map(json.loads, Path(config.output, "log.jsonl").read_text().splitlines())
        return [(r["step"], r["event"], r) for r in rows]

    for (step, event, a), (step2, event2, b) in zip(events(one), events(two), strict=True):
        assert (step, event) == (step2, event2)
        for name in ("task/loss", "align/loss", "eval/loss", "eval/retrieval", "grad_norm"):
            if name in a:
                np.testing.assert_allclose(b[name], a[name], rtol=1e-5)
    spec = load_spec(one.model.path)
    import jax

    first, second = (load_peft(f"{c.output}/adapter", spec)[0] for c in (one, two))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_all_processes_stop_at_the_step_after_one_was_asked(configure, tmp_path):
    out = tmp_path / "run"
    config = configure("lora.dropout=0.0", "train.steps=100000", "train.log_every=1",
                       "checkpoint.every=100000", f"output={out}")  # fmt: skip
    started = start([config, config], tmp_path, devices=2)
    try:
        deadline = time.monotonic() + 300
        while not (out / "log.jsonl").is_file() or not (out / "log.jsonl").read_text():
            assert time.monotonic() < deadline, "no step in five minutes"
            assert all(process.poll() is None for process in started)
            time.sleep(0.5)
        started[1].send_signal(signal.SIGTERM)
        outputs = finish(started, 128 + signal.SIGTERM)
    finally:
        for process in started:
            process.kill()
    (stopped,) = re.findall(r"stopped on request at step (\d+)", outputs[0])
    assert (out / "checkpoints" / stopped).is_dir(), sorted((out / "checkpoints").iterdir())
