"""Kills at random moments: a command is started again and again until it ends by itself.

    with Server() as server:
        span = undisturbed(server, ["train", "own.yaml"], folder)
        kills = torment(server, ["train", "own.yaml"], folder, kills=20, rng=rng, span=span)

Python and JAX are imported once; each try is a fork of that process, so that it starts in a moment.
A try is killed by SIGKILL, SIGTERM or SIGINT: one in five anywhere in its start, one in three just
when something is being written under another name, the others a random while after it first changed
something in its folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# What a try may end with after each signal, besides 0: it was done before. A process that has not
# set up its handlers yet ends as the system has it.
ENDS = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {128 + signal.SIGTERM, -signal.SIGTERM},
    signal.SIGINT: {128 + signal.SIGINT, -signal.SIGINT},
}
LONGEST = 1200.0  # seconds that a try may take: on a busy machine it compiles for minutes


@dataclass(frozen=True)
class Kill:
    """One try that was killed."""

    signal: signal.Signals
    code: int
    after: float  # seconds since the start
    inside: str  # what was being written at that moment: '', save, folder


class Server:
    """A process that forks one command after the other."""

    def __enter__(self) -> Server:
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join(flags),
            "PYTHONPATH": str(REPO),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, cwd=REPO, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def start(self, words: list[str], output: Path) -> int:
        """Starts `jaxalign WORDS`; what it prints goes into a file. Returns the process id."""
        return int(self._ask({"words": words, "output": str(output)}))

    def ended(self, pid: int) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        answer = self._ask({"pid": pid})
        return None if answer == "None" else int(answer)

    def _ask(self, what: dict) -> str:
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


def torment(
    server: Server,
    words: list[str],
    folder: Path,
    kills: int,
    rng: np.random.Generator,
    span: float,
) -> list[Kill]:
    """Runs a command until it ends with 0, killing it up to so many times.

    Args:
      folder: what it writes into; its first change starts the clock.
      span: seconds after that, within which the kill comes; see `undisturbed`.

    Returns:
      The kills that found it alive.
    """
    done: list[Kill] = []
    told = folder.parent / f"{folder.name}.out"
    while True:
        before, began = _stamps(folder), time.monotonic()
        pid = server.start(words, told)
        killing = len(done) < kills
        number = SIGNALS[rng.integers(3)]
        how = rng.random()
        at, first = (rng.uniform(0, 3.0) if how < 0.2 else None), None
        while (code := server.ended(pid)) is None:
            now = time.monotonic() - began
            if now > LONGEST:
                os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"a try took more than {LONGEST} s: {told.read_text()}")
            if killing and at is None and first is None and _stamps(folder) != before:
                first = now
                at = now + rng.uniform(0, span) if how > 0.5 else None
            if killing and at is None and first is not None:
                late = now > first + span
                at = now + rng.uniform(0, 0.05) if late or _inside(folder) else None
            if killing and at is not None and now >= at:
                inside = _inside(folder)
                os.kill(pid, number)
                killing = False
                kill = now, inside
            time.sleep(0.002)
        said = told.read_text("utf-8", "replace")
        assert "Traceback" not in said, said
        if code == 0:
            return done
        assert not killing and code in ENDS[number], f"exit {code} after {number!r}: {said}"
        done.append(Kill(number, code, *kill))


def undisturbed(server: Server, words: list[str], folder: Path) -> float:
    """Runs a command to its end; returns the seconds from its first change in the folder on."""
    told = folder.parent / f"{folder.name}.out"
    before, first = _stamps(folder), None
    pid = server.start(words, told)
    while (code := server.ended(pid)) is None:
        if first is None and _stamps(folder) != before:
            first = time.monotonic()
        time.sleep(0.002)
    assert code == 0, told.read_text("utf-8", "replace")
    return time.monotonic() - (first or time.monotonic())


def table(title: str, kills: list[Kill]) -> str:
    """Counts by signal and by what was being written."""
    lines = [f"{title}: {len(kills)} kills"]
    for number in SIGNALS:
        of = [kill for kill in kills if kill.signal == number]
        inside = {name: sum(kill.inside == name for kill in of) for name in ("save", "folder")}
        lines.append(
            f"  {number.name:8s} {len(of):4d}, while a checkpoint was written {inside['save']}, "
            f"another folder or file {inside['folder']}"
        )
    return "\n".join(lines)


def same_files(one: Path, other: Path) -> list[str]:
    """Names that are in one folder only, or whose content differs."""
    sides = [
        {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (one, other)
    ]
    return sorted(n for n in sides[0] | sides[1] if sides[0].get(n) != sides[1].get(n))


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            if name != ".lock":
                try:
                    stat = os.stat(os.path.join(root, name))
                except OSError:
                    continue
                found[os.path.join(root, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


def _inside(folder: Path) -> str:
    for _, folders, names in os.walk(folder):
        if any(".orbax-checkpoint-tmp" in name for name in folders):
            return "save"
        if any(name.endswith((".partial", ".replaced", ".tmp")) for name in (*folders, *names)):
            return "folder"
    return ""


def _serve() -> None:
    """Imports once, forks for each command."""
    import jaxalign.cli
    import jaxalign.evaluate.during
    import jaxalign.evaluate.write
    import jaxalign.export.run
    import jaxalign.probe.run
    import jaxalign.train.loop  # noqa: F401

    out = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        what = json.loads(line)
        if "pid" in what:
            pid, status = os.waitpid(what["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _try(what["words"], what["output"])
        print(answer, file=out, flush=True)


def _try(words: list[str], output: str) -> None:
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for target in (1, 2):
            os.dup2(file, target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job's background ignores it
        code = jaxalign.cli.main(words)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import jaxalign.cli

    _serve()
