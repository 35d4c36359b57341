"""Who joins a cluster: the environments that the launchers make, and what JAX itself says."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxalign import multihost
from jaxalign.errors import UserError

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TPU = "tpu,cpu"


@pytest.mark.parametrize(
    ("environment", "platforms", "expected"),
    [
        ({}, None, False),
        ({}, "cpu", False),
        # By hand, and launch/local_gpu --process gpu.
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:8476"}, None, True),
        # launch/slurm: a step of several tasks, and of one.
        ({"SLURM_NTASKS": "16"}, None, True),
        ({"SLURM_NTASKS": "1"}, None, False),
        # launch/tpu: a Cloud TPU VM, where only the metadata knows the other hosts.
        ({}, TPU, True),
        ({"TPU_WORKER_HOSTNAMES": ""}, TPU, True),
        ({}, "cpu", False),
        # Chips without metadata to ask, as in hosted notebooks.
        ({"TPU_SKIP_MDS_QUERY": "1"}, TPU, False),
        ({"TPU_PROCESS_ADDRESSES": "local"}, TPU, False),
        # launch/gke: GKE names the hosts of a slice, and counts the slices.
        ({"TPU_WORKER_HOSTNAMES": "a-0.b,a-1.b"}, TPU, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, TPU, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, TPU, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}, TPU, False),
    ],
)
def test_who_is_in_a_cluster(environment, platforms, expected):
    assert multihost.in_cluster(environment, platforms) is expected


def test_jax_asks_for_the_tpu_where_it_finds_one():
    """What `in_cluster` takes for a TPU machine is what JAX does on one."""
    code = "import jax; print(jax.config.jax_platforms)"
    kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    found = kept | {"JAX_FORCE_TPU_INIT": "1"}  # as if the chips were there
    done = subprocess.run([sys.executable, "-c", code], env=found, capture_output=True, text=True)
    assert done.stdout.strip() == TPU, done.stderr


def joined(monkeypatch, initialize, **environment):
    for name in (*multihost.CLUSTER, *multihost.TPU_HOSTS, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    multihost.start()


def test_numbers_of_the_launcher_reach_jax(monkeypatch):
    calls = []
    record = lambda **words: calls.append(words)  # noqa: E731
    joined(monkeypatch, record)
    assert calls == []
    joined(monkeypatch, record, SLURM_NTASKS="4")
    patience = {"heartbeat_timeout_seconds": 100, "shutdown_timeout_seconds": 100}
    assert calls.pop() == {"num_processes": None, "process_id": None} | patience
    joined(
        monkeypatch,
        record,
        JAX_COORDINATOR_ADDRESS="127.0.0.1:1",
        JAX_NUM_PROCESSES="3",
        JAX_PROCESS_ID="2",
    )
    assert calls.pop() == {"num_processes": 3, "process_id": 2} | patience
    joined(monkeypatch, record, SLURM_NTASKS="4", JAXALIGN_HEARTBEAT_SECONDS="30")
    assert calls.pop()["heartbeat_timeout_seconds"] == 30
    with pytest.raises(UserError, match="HEARTBEAT_SECONDS: 'soon' should be a number of seconds"):
        joined(monkeypatch, record, SLURM_NTASKS="4", JAXALIGN_HEARTBEAT_SECONDS="soon")


def test_an_abort_ends_with_a_sentence():
    """As JAX aborts: from a thread in which no Python runs, while the main thread waits."""
    code = (
        "import ctypes, threading, time; from jaxalign import multihost\n"
        "multihost.speak_when_aborted()\n"
        "threading.Thread(target=ctypes.CDLL(None).abort).start(); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr == multihost.ABORTED + "\n"


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        (
            "UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [::1]:3462",
            True,
        ),
        ("Gloo AllReduce failed: Read error [::1]:37008: Connection reset by peer", True),
        ("NCCL operation ncclAllReduce failed: remote process exited", True),
        ("INTERNAL: a broken cable", False),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", False),
    ],
)
def test_errors_of_a_lost_process_are_one_sentence(monkeypatch, text, gone):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    found = multihost.lost(jax.errors.JaxRuntimeError(text))
    assert (found is not None) is gone
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert multihost.lost(jax.errors.JaxRuntimeError(text)) is None


@pytest.mark.parametrize("error", [OSError("metadata.google.internal"), RuntimeError("")])
def test_a_cluster_that_does_not_answer_is_one_sentence(monkeypatch, error):
    def refuse(**_):
        raise error

    with pytest.raises(UserError, match="could not be reached") as told:
        joined(monkeypatch, refuse, SLURM_NTASKS="4")
    assert "\n" not in str(told.value)


def test_xla_knows_the_flags():
    """An unknown flag in XLA_FLAGS ends the process at the start."""
    script = f"source {LAUNCH}/gpu_flags.sh && printf '%s' \"$XLA_FLAGS\""
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    flags = subprocess.run(
        ["bash", "-c", script], env=clean, capture_output=True, text=True, check=True
    ).stdout
    assert len(re.findall(r"--xla_gpu_\w+=\w+", flags)) == len(flags.split()) >= 3
    code = "import jax; print(jax.devices())"
    for more, good in ((flags, True), (flags + " --xla_gpu_no_such_flag=1", False)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=clean | {"XLA_FLAGS": more, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) is good, done.stderr


@pytest.mark.parametrize(
    ("environment", "platforms", "expected"),
    [
        ({"TPU_SKIP_MDS_QUERY": "1"}, None, True),  # JAX looked and found no chip
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", False),  # chips, and no metadata to ask
        ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu", False),  # asked for: its errors are wanted
        ({}, None, False),
    ],
)
def test_absent_chips_are_not_asked_for(monkeypatch, environment, platforms, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    assert multihost.without_chips(environment, platforms) is expected
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ["xla_cuda12"])
    assert not multihost.without_chips(environment, platforms)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_libtpu_says_nothing_on_a_machine_without_chips():
    script = (
        "from jaxalign import multihost; multihost.start(); import jax; print(jax.devices()[0])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "cpu" in done.stdout.lower():
        assert done.stderr == ""


def test_processes_that_hold_something_else_are_named(monkeypatch):
    first, second = "00" * 32, "11" * 32

    def gathered(mine):
        import numpy as np

        assert mine.shape == (2, 32)
        other = np.full_like(mine[:1], 0x11)
        return np.stack([mine, mine, np.concatenate([mine[:1], other])])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gathered)
    multihost.agree({"the settings": first, "the rows of task.train": second})
    with pytest.raises(UserError, match=r"the rows of task\.train of process 2 .* differ from"):
        multihost.agree({"the settings": first, "the rows of task.train": first})
