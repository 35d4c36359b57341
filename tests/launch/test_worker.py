"""What runs on a machine: the worker's part, and the wrapper that tells a stop from an end."""

import os
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.launch.conftest import PATIENCE


@pytest.fixture
def worker(stand_ins, tmp_path):
    """`worker('start', ...)` on a machine where jaxalign is installed."""
    home = tmp_path / "home"
    (home / "jaxalign").mkdir(parents=True)
    (home / "jaxalign" / "launch").symlink_to(stand_ins.launch)
    (home / "jaxalign-venv" / "bin").mkdir(parents=True)
    for program in ("jaxalign", "python"):
        (home / "jaxalign-venv/bin" / program).symlink_to(stand_ins.folder / "bin/jaxalign")

    def call(*words, **more):
        done = stand_ins.run("tpu_worker", *words, cwd=home, HOME=str(home), **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call.home = home
    return call


def test_a_run_outlives_the_call_and_stops_on_request(worker, stand_ins):
    ready = stand_ins.folder / "ready0"
    worker("start", "v5e", "train", "own.yaml", PLAY="sleep")
    stand_ins.wait_for(ready)
    assert "already" in worker("start", "v5e", "train", "own.yaml", PLAY="sleep")
    assert "nothing is installed" in worker("setup", "my-bucket")
    worker("stop")
    log = worker("follow")
    assert log.splitlines() == [
        "hello from jaxalign 0",
        "a last checkpoint 0",
        "jaxalign ended with 143",
    ]
    calls = [call for call in stand_ins.calls() if call["program"] == "jaxalign"]
    assert [call["argv"] for call in calls] == [["train", "own.yaml"]]
    assert calls[0]["env"]["PYTHONUNBUFFERED"] == "1"
    assert "nothing runs here" in worker("stop")

    # The same again: a run of its own, with a log of its own.
    worker("start", "v5e", "train", "own.yaml", PLAY="0")
    assert worker("follow").splitlines() == ["hello from jaxalign 0", "jaxalign ended with 0"]


def test_a_run_that_noted_its_code_has_ended(worker):
    """Though its process be in the table yet: here this test's own stands for it."""
    state = worker.home / "jaxalign-run"
    state.mkdir()
    (state / "pid").write_text(str(os.getpid()))
    assert "already" in worker("start", "v5e", "train", "own.yaml", PLAY="0")
    (state / "code").write_text("0")
    assert "nothing runs here" in worker("stop")
    assert worker("start", "v5e", "train", "own.yaml", PLAY="0") == ""
    assert worker("follow").splitlines() == ["hello from jaxalign 0", "jaxalign ended with 0"]


def test_a_killed_run_is_told(worker, stand_ins):
    worker("start", "v6e", "train", "own.yaml", PLAY="sleep")
    stand_ins.wait_for(stand_ins.folder / "ready0")
    group = int(Path(worker.home, "jaxalign-run/pid").read_text())
    os.killpg(group, signal.SIGKILL)
    assert worker("follow").splitlines()[-1] == "jaxalign ended with 137"


def test_given_flags_come_last(worker, stand_ins):
    worker("start", "v6e", "demo", LIBTPU_INIT_ARGS="--xla_tpu_scoped_vmem_limit_kib=1")
    worker("follow")
    (call,) = [call for call in stand_ins.calls() if call["program"] == "jaxalign"]
    assert call["env"]["LIBTPU_INIT_ARGS"].split() == [
        "--xla_tpu_scoped_vmem_limit_kib=98304",
        "--xla_tpu_scoped_vmem_limit_kib=1",
    ]


def test_setup_brings_what_a_fresh_machine_lacks(worker, stand_ins):
    (stand_ins.folder / "bin" / "gcsfuse").unlink()
    with tarfile.open(worker.home / "bundle.tar.gz", "w:gz") as bundle:
        bundle.add(stand_ins.launch, "launch")
    worker("setup", "my-bucket")
    recorded = stand_ins.calls()
    calls = [(call["program"], call["argv"]) for call in recorded]
    key = "/usr/share/keyrings/cloud.google.asc"
    source = f"deb [signed-by={key}] https://packages.cloud.google.com/apt gcsfuse-jammy main\n"
    assert source in [call["stdin"] for call in recorded if "tee" in call["argv"]]
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300"]
    assert ("sudo", ["tee", key]) in calls
    assert ("sudo", [*apt, "install", "-y", "-qq", "gcsfuse"]) in calls
    assert calls.index(("sudo", [*apt, "update", "-qq"])) < calls.index(
        ("sudo", [*apt, "install", "-y", "-qq", "gcsfuse"])
    )
    mounted = ["--implicit-dirs", "--metadata-cache-ttl-secs=0"]
    mounted += ["--metadata-cache-negative-ttl-secs=0", "my-bucket", "/mnt/bucket"]
    assert ("gcsfuse", mounted) in calls
    assert ("python3", ["-m", "pip", "install", "--quiet", "--user", "uv"]) in calls
    assert not [argv for program, argv in calls if program == "uv" and argv[0] == "venv"]
    pages = "echo always > /sys/kernel/mm/transparent_hugepage/enabled"
    assert ("sudo", ["sh", "-c", pages]) in calls


@pytest.mark.parametrize("code", [0, 2, 7])
def test_stoppable_gives_the_command_s_own_code(stand_ins, tmp_path, code):
    done = stand_ins.run("stoppable", "jaxalign", "demo", cwd=tmp_path, PLAY=str(code))
    assert done.returncode == code


@pytest.mark.parametrize(("play", "code"), [("sleep", 143), ("last step", 0)])
def test_stoppable_passes_a_stop_on_and_waits(stand_ins, tmp_path, play, code):
    """A run that was done when it was asked has ended well: no other try is needed."""
    started = subprocess.Popen(
        [stand_ins.launch / "stoppable", "jaxalign", "train"],
        env=stand_ins.environment(PLAY=play),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    stand_ins.wait_for(stand_ins.folder / "ready0")
    started.terminate()
    output, _ = started.communicate(timeout=PATIENCE)
    assert "a last checkpoint" in output
    assert started.returncode == code
