"""Evaluations and generations that are killed at any moment end with the same bytes.

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
