"""Several processes through jax.distributed train what one trains."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign import multihost
from jaxalign.adapters import Lora
from jaxalign.config import to_yaml
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import load_peft
from jaxalign.plan import topology
from jaxalign.sharding import make_mesh
from jaxalign.train import loop
from tests.conftest import FLAGS
from tests.train import worker

REPO = Path(__file__).resolve().parents[2]


def start(commands, devices, **more):
    """Starts one Python process per command (what follows `python -m`), all in one cluster.

    Args:
        more: environment variables.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for index, command in enumerate(commands):
        env = os.environ | {
            "XLA_FLAGS": " ".join([*FLAGS, f"--xla_force_host_platform_device_count={devices}"]),
            "JAX_PLATFORMS": "cpu",
            **more,
        }
        if len(commands) > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(len(commands)),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                env=env,
                cwd=REPO,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def train(configs, tmp_path, devices, *words, **more):
    """`jaxalign train`, one process per config."""
    commands = []
    for index, config in enumerate(configs):
        file = tmp_path / f"{len(configs)}_{index}.yaml"
        file.write_text(to_yaml(config))
        commands.append(["jaxalign", "train", file, *words])
    return start(commands, devices, **more)


def finish(started, code=0):
    """Their outputs, once all have ended with this exit code."""
    outputs = [process.communicate(timeout=500)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == code, output
    return outputs


# A start that every prompt has, so that there is something to share. Sums over the texts of a
# sequence have another order with more of them: Adam makes of it a share of its step.
END_TO_END = (
    "batch.buckets=[]",
    "prompt.system='Name the intent and the slots of the request.'",
    "optim.learning_rate=0.001",
)


def order_of(name, slices, sizes):
    """The process at each place of the mesh that `make_mesh` lays over these slices."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(*sizes, devices=topology.devices(topology.parse(name, slices)))
    return [device.process_index for device in mesh.devices.flat]


# Processes, devices of each, meshes: sizes, and the (topology, slices) whose order they have.
CLUSTERS = {
    "two": (2, 1, {"tensor": ((1, 1, 2, 1), None)}),
    "two, other axes": (
        2,
        1,
        {
            "seq": ((1, 1, 1, 2), None),
            "fsdp": ((1, 2, 1, 1), None),
            "data": ((2, 1, 1, 1), None),
        },
    ),
    "four": (
        4,
        1,
        {
            "tensor": ((1, 1, 4, 1), None),
            "data, tensor": ((2, 1, 2, 1), None),
            "fsdp, seq": ((1, 2, 1, 2), None),
            "data, fsdp": ((2, 2, 1, 1), None),
            "tensor, seq": ((1, 1, 2, 2), None),
        },
    ),
    "slices": (
        4,
        4,
        {
            "ring": ((1, 16, 1, 1), ("v5e:4x4", 1)),
            "tensor over hosts": ((1, 4, 4, 1), ("v5e:4x4", 1)),
            "all four": ((2, 2, 2, 2), ("v5e:4x4", 1)),
            "two slices": ((2, 4, 2, 1), ("v5e:2x4", 2)),
        },
    ),
}


@pytest.mark.parametrize(
    "cluster",
    [c if c == "two" else pytest.param(c, marks=pytest.mark.slow) for c in CLUSTERS],
)
def test_processes_compute_what_one_computes(configure, rows, tmp_path, cluster):
    """Losses, gradients and retrieval, whichever axis of the mesh crosses the processes."""
    lines = (rows / "pairs.jsonl").read_text("utf-8").splitlines()
    target = json.loads(lines[0])["text1"]  # several sources of one target, in different batches
    more = [json.dumps(json.loads(line) | {"text1": target}) for line in lines[40:46]]
    valid = tmp_path / "valid.jsonl"
    valid.write_text("\n".join([*lines[:34], *more]) + "\n", "utf-8")
    config = configure(
        *("lora.dropout=0.0", "batch.size=16", "batch.pairs=16", "align.group=8"),
        *("train.eval_batches=0", f"align.valid=[{valid}]", f"task.valid=[{rows}/task.jsonl]"),
    )
    processes, devices, wanted_meshes = CLUSTERS[cluster]
    meshes = {
        name: (sizes, order_of(*place, sizes) if place else None)
        for name, (sizes, place) in wanted_meshes.items()
    }
    file, out = tmp_path / "run.yaml", tmp_path / "found.npz"
    file.write_text(to_yaml(config))
    command = ["tests.train.worker", file, out, json.dumps(meshes)]
    started = start([command] * processes, devices)
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(Lora, "init", worker.warm(Lora.init))
        alone = make_mesh(1, 1, 1, 1, devices=jax.devices()[:1])
        wanted = worker.measure(config, alone, monkey.setattr)
    finish(started)
    found = np.load(out)
    assert len(found) == len(meshes) * len(wanted)
    assert 0 < wanted["eval/retrieval"] < 1
    for name in meshes:
        for what, value in wanted.items():
            ours, scale = found[f"{name}|{what}"], np.abs(value).max() + 1e-8
            np.testing.assert_allclose(
                ours / scale, value / scale, atol=2e-5, rtol=0, err_msg=f"{name}: {what}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "mesh", "rows_as"),
    [
        (2, (), ()),
        # As two slices of four chips lie: data between them, everything else within.
        (4, ("mesh.data=2", "mesh.fsdp=4"), ()),
        (4, ("mesh.data=2", "mesh.fsdp=2", "mesh.seq=2"), ()),
        (2, (), END_TO_END),
        (2, ("mesh.data=2", "mesh.fsdp=2"), (*END_TO_END, "batch.share_prefix=off")),
    ],
    ids=["2 x 2", "2 x 4", "2 x 4, seq", "2 x 2, end to end, shared", "2 x 2, end to end"],
)
def test_two_processes_train_as_one(configure, tmp_path, devices, mesh, rows_as):
    words = ("lora.dropout=0.0", "train.steps=4", "train.eval_every=2", *rows_as)
    one = configure(*words, f"output={tmp_path / 'one'}")
    two = configure(*words, *mesh, f"output={tmp_path / 'two'}")
    (alone,) = finish(train([one], tmp_path, devices=1))
    outputs = finish(train([two, two], tmp_path, devices=devices))
    assert "written" in outputs[0] and "written" not in outputs[1]
    for output in (alone, outputs[0]):
        assert ("rows end to end" in output) == bool(rows_as), output
        assert ("shared tokens once" in output) == (rows_as == END_TO_END), output

    def events(config):
        rows = map(json.loads, Path(config.output, "log.jsonl").read_text().splitlines())
        return [(r["step"], r["event"], r) for r in rows]

    for (step, event, a), (step2, event2, b) in zip(events(one), events(two), strict=True):
        assert (step, event) == (step2, event2)
        for name in ("task/loss", "align/loss", "eval/loss", "eval/retrieval", "grad_norm"):
            if name in a:
                np.testing.assert_allclose(b[name], a[name], rtol=1e-5)
    spec = load_spec(one.model.path)
    first, second = (load_peft(f"{c.output}/adapter", spec)[0] for c in (one, two))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=0)


@pytest.mark.slow
def test_all_processes_stop_at_the_step_after_one_was_asked(configure, tmp_path):
    out = tmp_path / "run"
    config = configure("lora.dropout=0.0", "train.steps=100000", "train.log_every=1",
                       "checkpoint.every=100000", f"output={out}")  # fmt: skip
    started = train([config, config], tmp_path, devices=2)
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


@pytest.mark.slow
def test_other_rows_in_one_process_are_refused(configure, rows, tmp_path):
    lines = (rows / "task.jsonl").read_text("utf-8").splitlines()
    other = tmp_path / "task.jsonl"
    other.write_text("\n".join([*lines[:-1], lines[0]]) + "\n", "utf-8")
    configs = [configure(), configure(f"task.train=[{other}]")]
    for output in finish(train(configs, tmp_path, 1), 2):
        assert "the rows of task.train of process 1 (counted from 0) differ" in output
        assert "Traceback" not in output


def losses(config):
    """Step -> losses of both phases, by the log."""
    rows = map(json.loads, Path(config.output, "log.jsonl").read_text().splitlines())
    return {
        row["step"]: [row["task/loss"], row["align/loss"]]
        for row in rows
        if row["event"] == "train"
    }


@pytest.mark.slow
def test_a_run_goes_on_with_more_and_fewer_processes(configure, tmp_path):
    """Two, one, two: the rows that come are those of a run in one go."""
    words = ("lora.dropout=0.0", "train.eval_every=0", "checkpoint.every=2")

    def at(name, steps):
        return configure(*words, f"output={tmp_path / name}", f"train.steps={steps}")

    finish(train([at("straight", 6)], tmp_path, 1))
    for processes, steps in ((2, 2), (1, 4), (2, 6)):
        finish(train([at("changing", steps)] * processes, tmp_path, 1))
    wanted, found = losses(at("straight", 6)), losses(at("changing", 6))
    assert sorted(found) == sorted(wanted) == [1, 2, 3, 4, 5, 6]
    for step, values in wanted.items():
        np.testing.assert_allclose(found[step], values, rtol=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_devices(configure, tmp_path, monkeypatch):
    """Eight, four, two."""
    words = ("lora.dropout=0.0", "train.eval_every=0", "checkpoint.every=2")

    def go(name, steps, devices):
        mesh = make_mesh(1, devices, 1, 1, devices=jax.devices()[:devices])
        monkeypatch.setattr(bases, "make_mesh", lambda *_: mesh)
        config = configure(*words, f"output={tmp_path / name}", f"train.steps={steps}")
        loop.train(config)
        return losses(config)

    wanted = go("straight", 6, 1)
    for steps, devices in ((2, 8), (4, 4), (6, 2)):
        found = go("changing", steps, devices)
    assert sorted(found) == sorted(wanted) == [1, 2, 3, 4, 5, 6]
    for step, values in wanted.items():
        np.testing.assert_allclose(found[step], values, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_ends_the_other_with_a_sentence_and_both_go_on(configure, tmp_path, victim):
    out = tmp_path / "run"
    words = ("lora.dropout=0.0", "train.eval_every=0", "checkpoint.every=5", f"output={out}")
    config = configure(*words, "train.steps=100000")
    started = train([config, config], tmp_path, 1, JAXALIGN_HEARTBEAT_SECONDS="20")
    try:
        deadline = time.monotonic() + 300
        while not (out / "checkpoints" / "5").is_dir():
            assert time.monotonic() < deadline, "no checkpoint in five minutes"
            assert all(process.poll() is None for process in started)
            time.sleep(0.2)
        started[victim].kill()
        output, _ = started[1 - victim].communicate(timeout=120)
    finally:
        for process in started:
            process.kill()
    assert started[1 - victim].returncode in (multihost.LOST, -signal.SIGABRT), output
    assert re.search(r"^jaxalign: .* process of this run .* goes on from the last", output, re.M)
    assert "Traceback" not in output
    steps = max(int(folder.name) for folder in (out / "checkpoints").iterdir()) + 3
    config = configure(*words, f"train.steps={steps}")
    assert f"finished at step {steps}" in finish(train([config, config], tmp_path, 1))[0]
    assert sorted(losses(config)) == list(range(1, steps + 1))


@pytest.mark.slow
def test_processes_diverge_together(configure, tmp_path):
    """All count the same updates, look at the same rows and leave at the same step."""
    config = configure("optim.learning_rate=1e30", "train.max_skipped=2", "train.eval_every=0",
                       "checkpoint.every=1")  # fmt: skip
    first, _ = finish(train([config] * 2, tmp_path, 1), code=1)
    assert "diverged: 2 updates in a row were skipped, from update 2 on" in first
    assert "no checkpoint is kept" in first
    assert not Path(config.output, "adapter").exists()
