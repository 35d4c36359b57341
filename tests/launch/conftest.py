"""Stand-ins for the clouds' programs: they write down how they were called and play a part.

`calls()` gives what was called since the last look, in order. `gcloud` answers `describe` with the
next line of `states` and plays the workers; see STAND_IN.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
PATIENCE = 120  # seconds until a test gives up what takes less than one on an idle machine

STAND_IN = r'''
import json, os, subprocess, sys
from pathlib import Path

here = Path(os.environ["STAND_INS"])
name, argv = Path(sys.argv[0]).name, sys.argv[1:]
stdin = sys.stdin.read() if {"--filename=-", "tee"} & set(argv) else None
kept = ("JAX_", "XLA_", "NCCL_", "CUDA_", "LIBTPU_", "SLURM_", "PYTHONUNBUFFERED")
call = {
    "program": name,
    "argv": argv,
    "stdin": stdin,
    "env": {k: v for k, v in os.environ.items() if k.startswith(kept)},
    "cwd": os.getcwd(),
}
with open(here / "calls", "a") as file:
    file.write(json.dumps(call) + "\n")


def next_line(file):
    """The first line, taken away unless it is the only one."""
    lines = (here / file).read_text().splitlines()
    if len(lines) > 1:
        (here / file).write_text("\n".join(lines[1:]) + "\n")
    return lines[0]


def option(name):
    return next((a.split("=", 1)[1] for a in argv if a.startswith(f"--{name}=")), None)


if name == "gcloud" and "describe" in argv:
    state = next_line("states")
    if state == "ABSENT":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource")
    if state == "DENIED":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) PERMISSION_DENIED: no")
    print(state)
elif name == "gcloud" and "ssh" in argv:
    command = option("command")
    homes = sorted((here / "workers").glob("*"))
    if homes:  # the workers are folders here, and the command really runs
        for home in homes if option("worker") == "all" else homes[:1]:
            done = subprocess.run(
                ["bash", "-c", command], cwd=home, env=os.environ | {"HOME": str(home)}
            )
            if done.returncode:
                sys.exit(done.returncode)
    elif command.endswith("follow"):
        ended = next_line("ends")
        print("a line of the log")
        if ended == "lost":
            sys.exit(255)
        print(f"jaxalign ended with {ended}")
elif name == "gcloud" and "scp" in argv:
    for home in (here / "workers").glob("*"):
        for source in [a for a in argv if a.startswith("/")]:
            (home / Path(source).name).write_bytes(Path(source).read_bytes())
elif name == "kubectl" and "jobset" in argv and "get" in argv:
    print((here / "terminal").read_text(), end="")
elif name == "python3":  # installs uv
    uv = Path(os.environ["HOME"], ".local", "bin", "uv")
    uv.parent.mkdir(parents=True, exist_ok=True)
    uv.unlink(missing_ok=True)
    uv.symlink_to(here / "bin" / "uv")
elif name == "sudo" and "install" in argv:
    (here / "bin" / argv[-1]).symlink_to(here / "bin" / "sudo")
elif name == "lsb_release":
    print("jammy")
elif name == "uv":
    if argv[0] == "venv":
        python = Path(argv[-1], "bin", "python")
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
    elif argv[:2] == ["pip", "install"]:
        installed = Path(argv[argv.index("--python") + 1]).with_name("jaxalign")
        installed.unlink(missing_ok=True)
        installed.symlink_to(here / "bin" / "jaxalign")
elif name == "mountpoint":
    sys.exit(1)
elif name == "nvidia-smi":
    print("GPU 0: a\nGPU 1: b\nGPU 2: c")
elif name == "jaxalign":
    import signal, time

    part = os.environ.get("PLAY", "")
    rank = os.environ.get("JAX_PROCESS_ID", "0")
    print("hello from jaxalign", rank, flush=True)
    if part in ("sleep", "last step") or (part == "one fails" and rank != "1"):
        def stop(*_):
            # The group's signal and the one passed on are one request, as they are to jaxalign.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("a last checkpoint", rank, flush=True)
            sys.exit(0 if part == "last step" else 143)

        signal.signal(signal.SIGTERM, stop)
        (here / f"ready{rank}").touch()
        time.sleep(600)
    elif part == "one fails":
        while not all((here / f"ready{r}").exists() for r in (0, 2)):
            time.sleep(0.05)
        sys.exit(3)
    elif part.isdigit():
        sys.exit(int(part))
elif name == "srun":
    sys.exit(int(os.environ.get("PLAY", "0")))
'''

PROGRAMS = (
    *("gcloud", "kubectl", "docker", "sbatch", "srun", "scontrol", "jaxalign"),
    *("uv", "python3", "sudo", "mountpoint", "gcsfuse", "curl", "lsb_release", "nvidia-smi"),
)


@dataclass
class StandIns:
    """A folder of programs that only pretend, and what they were called with."""

    folder: Path
    launch: Path  # the launchers in a copy of the repository without its weight

    def tell(self, **parts: str | list[str]) -> None:
        """Sets what they play: states, ends, terminal."""
        for name, lines in parts.items():
            text = lines if isinstance(lines, str) else "\n".join(lines) + "\n"
            (self.folder / name).write_text(text)

    def environment(self, **more: str) -> dict[str, str]:
        """Ours in front of the real programs."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "CUDA_"))}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return kept | {"PATH": path, "STAND_INS": str(self.folder)} | more

    def run(self, script: str, *words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
        """Runs one of the launchers."""
        return subprocess.run(
            [str(self.launch / script), *words],
            cwd=cwd,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def wait_for(self, *files: Path) -> None:
        """Until all of them are there, `PATIENCE` at most."""
        deadline = time.monotonic() + PATIENCE
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def calls(self) -> list[dict]:
        """Every call since the last look."""
        file = self.folder / "calls"
        found = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("")
        return found


@pytest.fixture
def stand_ins(tmp_path):
    """All programs that the launchers call, as recording stand-ins."""
    folder = tmp_path / "stand_ins"
    (folder / "bin").mkdir(parents=True)
    (folder / "workers").mkdir()
    (folder / "calls").touch()
    for name in PROGRAMS:
        program = folder / "bin" / name
        program.write_text(f"#!{sys.executable} -IS\n{STAND_IN}")  # starts fast
        program.chmod(0o755)
    repo = tmp_path / "repo"
    shutil.copytree(LAUNCH, repo / "launch")
    for file in ("jaxalign/__init__.py", "jaxalign/__pycache__/x.pyc", "configs/a.yaml"):
        (repo / file).parent.mkdir(parents=True, exist_ok=True)
        (repo / file).touch()
    for file in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (repo / file).touch()
    found = StandIns(folder, repo / "launch")
    found.tell(states="ACTIVE", ends="0", terminal="")
    return found


@pytest.fixture
def work(tmp_path):
    """A working folder with a configuration."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "own.yaml").write_text("output: runs/own\n\ntask:\n  train: [/mnt/bucket/a.jsonl]\n")
    return folder


@pytest.fixture
def companions(work):
    """A comparison and all that it goes on from, with a file that nobody names."""
    (work / "studies").mkdir()
    texts = {
        "studies/study.yaml": "base: '../base.yaml'  # not: spare.yaml\noutput: runs/study\n"
        "systems:\n  sft: {align.weight: 0}\n  mine: {extends: ../method.yaml, seed: 2}\n",
        "base.yaml": "output: /nfs/own\n",
        "method.yaml": "extends: base.yaml\n",
    }
    for name, text in texts.items():
        (work / name).write_text(text)
    (work / "spare.yaml").write_text("seed: 3\n")
    return set(texts)
