"""launch/local_gpu with a stand-in of jaxalign, in one process and in several."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.conftest import PATIENCE

WORDS = ("--", "train", "own.yaml", "align.layer=2")
HEARING = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def test_one_process_with_all_gpus(stand_ins, work):
    done = stand_ins.run("local_gpu", "--gpus", "0,2", *WORDS, cwd=work)
    assert done.returncode == 0 and "hello" in done.stdout
    (call,) = stand_ins.calls()
    assert call["argv"] == ["train", "own.yaml", "align.layer=2"]
    assert call["env"]["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert call["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    assert "JAX_NUM_PROCESSES" not in call["env"]
    assert stand_ins.run("local_gpu", *WORDS, cwd=work, PLAY="2").returncode == 2


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (("--gpus", "0,1,5"), {}),
        ((), {}),  # nvidia-smi counts them
        ((), {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}),
    ],
)
def test_one_process_for_each(stand_ins, work, words, more):
    run = ("--process", "gpu", "--port", "9999", *words, *WORDS)
    assert stand_ins.run("local_gpu", *run, cwd=work, **more).returncode == 0
    calls = [call for call in stand_ins.calls() if call["program"] == "jaxalign"]
    envs = sorted((call["env"] for call in calls), key=lambda env: env["JAX_PROCESS_ID"])
    for index, env in enumerate(envs):
        assert env["JAX_PROCESS_ID"] == env["JAX_LOCAL_DEVICE_IDS"] == str(index)
        assert env["JAX_NUM_PROCESSES"] == "3"
        assert env["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:9999"
    assert len(envs) == 3


def test_one_that_fails_takes_the_others_along(stand_ins, work):
    start = time.monotonic()
    run = ("--process", "gpu", "--gpus", "0,1,2", *WORDS)
    done = stand_ins.run("local_gpu", *run, cwd=work, PLAY="one fails")
    assert done.returncode == 3
    assert "a last checkpoint 0" in done.stdout and "a last checkpoint 2" in done.stdout
    assert time.monotonic() - start < 30  # not the ten minutes that the others would sleep


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_all(stand_ins, work, sent):
    script = stand_ins.launch / "local_gpu"
    started = subprocess.Popen(
        # Started in the background of a script this test would hand down an ignored SIGINT. Not
        # preexec_fn: a fork of a process in which JAX runs threads may never come to its exec.
        [sys.executable, "-c", HEARING, script, "--process", "gpu", "--gpus", "0,1", *WORDS],
        env=stand_ins.environment(PLAY="sleep"),
        cwd=work,
        stdout=subprocess.PIPE,
        text=True,
    )
    stand_ins.wait_for(*(stand_ins.folder / f"ready{rank}" for rank in (0, 1)))
    os.kill(started.pid, sent)
    output, _ = started.communicate(timeout=PATIENCE)
    assert output.count("a last checkpoint") == 2
    assert started.returncode == 143


def test_dry_run_runs_nothing(stand_ins, work):
    run = ("--process", "gpu", "--gpus", "3,4", "--dry-run", *WORDS)
    done = stand_ins.run("local_gpu", *run, cwd=work)
    assert done.returncode == 0
    assert stand_ins.calls() == []
    assert done.stdout.count("jaxalign train own.yaml align.layer=2") == 2
    assert "export CUDA_VISIBLE_DEVICES=3,4" in done.stdout
    single = stand_ins.run("local_gpu", "--dry-run", *WORDS, cwd=work)
    assert single.stdout.splitlines()[-1] == "+ jaxalign train own.yaml align.layer=2"
    assert stand_ins.calls() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpus", "all", *WORDS), "--gpus: 'all'"),
        (("--process", "core", *WORDS), "--process: 'core'"),
        (("--port", "x", *WORDS), "--port: 'x'"),
        (("--", "train", "absent.yaml"), "absent.yaml: "),
        (("--dry-run",), "nothing to run"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(stand_ins, work, words, says):
    done = stand_ins.run("local_gpu", *words, cwd=work)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and says in done.stderr
    assert stand_ins.calls() == []
