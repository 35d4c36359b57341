"""Evaluations and generations that are killed at any moment end with the same bytes.

The short ones are `test_a_killed_run_goes_on` and `test_a_file_cut_anywhere_goes_on`.

`pytest -m slow tests/evaluate/test_kills.py -s` says at which moments.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

KILLS = int(os.environ.get("KILLS", "6"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Command:
    """`jaxalign evaluate` or `generate` of a tiny model, each in a process of its own."""

    def __init__(self, name, base, adapters, golds):
        settings = {
            "model": {"path": base, "dtype": "float32"}, "mesh": {"fsdp": 1},
            "task": {"kind": "intent_slots"}, "log": {"progress": "none"},
            "evaluate": {"data": [f"{golds}/test.*.jsonl"], "draws": 20},
            "generate": {"max_new_tokens": 24, "batch": 2, "method": "sample", "temperature": 3.0},
        }  # fmt: skip
        self.name, self.words = name, ["--adapter", f"a={adapters}/a1"]
        if name == "generate":
            self.words = ["--adapter", f"{adapters}/a1"]
        self.settings = json.dumps(settings)  # JSON is YAML

    def start(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(self.settings)
        out = folder / ("out" if self.name == "evaluate" else "answers.jsonl")
        words = [self.name, str(folder / "config.yaml"), *self.words, "--out", str(out)]
        flags = "--xla_force_host_platform_device_count=1"
        return subprocess.Popen(
            [sys.executable, "-m", "jaxalign", *words],
            env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finish(self, folder):
        process = self.start(folder)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "config.yaml"
        }


# A whole evaluation but for the model, which is made up: what is killed is the writing of files.
# The parent has everything imported, and each child that it forks is killed at a random moment.
FORKS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from jaxalign.config import load
from jaxalign.data.template import Prompts
from jaxalign.evaluate import run
from jaxalign.generate import chunks

work, data, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = load(None, ["task.kind=intent_slots", f"evaluate.data=[{data}]", "evaluate.draws=5",
                     "evaluate.rows=6", "generate.batch=2", "log.progress=none"]).config

class Made:
    prompts, params, fingerprint, share_prefix = Prompts(None, "chat"), {}, "made up", True
    def __init__(self, config): self.config = config
    def encode(self, examples, how, *more): return [[*e.prompt.encode()] for e in examples], 0
    def decode(self, answers): return [bytes(a).decode() for a in answers]
    def stops(self, how): return (2,)
    def bare(self): return self
    def chunks(self, prompts, decoding, batch, rows, numbers):
        for group in chunks([len(p) for p in prompts], batch):
            if not set(rows).isdisjoint(group):
                time.sleep(0.004)
                yield group, [list(f"intent: a; datetime: {i}".encode()) for i in group]

run.open_base = Made

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def start(folder):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    try:
        run.evaluate(config, [run.Entrant("a", kind="base")], str(folder))
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)

def finish(folder):
    begin = time.monotonic()
    assert os.waitpid(start(folder), 0)[1] == 0, (work / "log").read_text()
    return time.monotonic() - begin

finish(work / "whole")
whole = finish(work / "timed")
expected, dice, done, redone = files(work / "whole"), random.Random(1), 0, 0
for number in range(kills):
    folder = work / "parts"
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(dice.randint(1, 3)):
        pid = start(folder)
        time.sleep(dice.uniform(0, whole))
        os.kill(pid, dice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        done += os.waitpid(pid, 0)[1] != 0
    finish(folder)
    found = files(folder)
    assert found.keys() == expected.keys(), (number, found.keys() ^ expected.keys())
    for name, content in found.items():
        if name.endswith("answers.jsonl"):  # torn lines stay in it
            redone += content != expected[name]
            known = {line for line in content.splitlines()}
            assert known >= set(expected[name].splitlines()), number
        else:
            assert content == expected[name], (number, name)
print(done, "killed,", redone, "with torn lines")
"""


@pytest.mark.slow
def test_files_of_an_evaluation_that_is_killed(golds, tmp_path):
    words = [str(tmp_path), f"{golds}/test.*.jsonl", str(KILLS)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    killed = int(done.stdout.split()[0])
    print(done.stdout)
    assert killed >= KILLS // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_killed_at_any_moment(name, base, adapters, golds, tmp_path):
    command = Command(name, base, adapters, golds)
    command.finish(tmp_path / "warm")  # compiled programs are on disk now
    begin = time.monotonic()
    expected = command.finish(tmp_path / "whole")
    whole = time.monotonic() - begin
    dice, kills, number = random.Random(name), 0, 0
    while kills < KILLS:
        folder = tmp_path / f"parts{number}"
        number += 1
        for _ in range(3):
            process = command.start(folder)
            # Mostly where answers and files are written, which is the last third.
            wait, how = whole * dice.triangular(0, 1.1, 0.85), dice.choice(SIGNALS)
            try:
                said, _ = process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                process.send_signal(how)
                said, _ = process.communicate(timeout=300)
                kills += 1
                known = sum(1 for file in folder.rglob("answers.jsonl*") for _ in file.open())
                print(f"{name}: {how.name} after {wait:.1f} of {whole:.1f} s, {known} lines known")
            assert "Traceback" not in said or how == signal.SIGINT, said
        found = command.finish(folder)
        assert found.keys() == expected.keys()
        for path, content in found.items():
            if "answers.jsonl" in path and path != "answers.jsonl":  # torn lines stay in the cache
                continue
            assert content == expected[path].replace(b"whole", folder.name.encode()), path
