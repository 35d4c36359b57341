"""Measures jaxalign on one NVIDIA GPU, and PyTorch's PEFT on the same card: one JSON, one table.

    python benchmarks/gpu/run.py                       # about ten minutes
    python benchmarks/gpu/run.py --quick               # half of it
    python benchmarks/gpu/run.py --only correct,fast=60
    python benchmarks/gpu/run.py --rehearse            # tiny shapes on the CPU: does all of it run?

Every part is a process of its own with a limit of its own; a part that fails or hangs does not stop
the others, and the JSON is written again after each. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from table import show  # noqa: E402

# Seconds at most.
PARTS = {"correct": 110, "fast": 190, "peers": 110, "slots": 110, "where": 100, "real": 120}
LEAST = 20.0  # seconds with which a part is still begun
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "numpy", "torch", "transformers", "peft",
    "nvidia-cudnn-cu13", "nvidia-cublas",
)  # fmt: skip


def main() -> None:
    options = parse()
    ends = time.monotonic() + options.limit
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "versions": versions(),
        "card": card(),
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, asked in options.only.items():
            most = asked or PARTS[name] / (2 if options.quick else 1)
            seconds = min(most * (10 if options.rehearse else 1), ends - time.monotonic())
            found["parts"][name] = run_part(name, seconds, options, Path(scratch))
            save(options.out, found)
    show(found)
    print(f"\nwritten to {options.out}")
    if any(part["status"] in ("failed", "stopped") for part in found["parts"].values()):
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="half the time, fewer rows")
    parser.add_argument("--full", action="store_true", help="a 70B model, torch.compile")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--only",
        type=parts,
        default=dict.fromkeys(PARTS, 0.0),
        help="parts, with commas, each perhaps with seconds",
    )
    parser.add_argument("--rows", default="", help="only rows named so; several with ';'")
    parser.add_argument("--model", help="real weights for slots and real: a Hugging Face folder")
    parser.add_argument("--limit", type=float, help="seconds in all; default: 600, quick: 300")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON")
    options = parser.parse_args()
    usual = 7200 if options.rehearse else 300 if options.quick else 600
    options.limit = options.limit or usual
    return options


def parts(text: str) -> dict[str, float]:
    """`fast=60,peers`: the parts in the order in which they run, and the seconds asked for."""
    asked = dict(word.partition("=")[::2] for word in text.split(","))
    if unknown := [name for name in asked if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a part: {', '.join(PARTS)}")
    return {name: float(asked[name] or 0) for name in PARTS if name in asked}


def run_part(
    name: str, seconds: float, options: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """The rows of one part, and how it ended."""
    if seconds < LEAST:
        return {"status": "skipped", "why": f"{seconds:.0f} s left of {options.limit:.0f}"}
    print(f"== {name}, {seconds:.0f} s at most", flush=True)
    rows, began = scratch / f"{name}.json", time.monotonic()
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(rows)]
    command += ["--seconds", str(seconds), "--rows", options.rows]
    command += ["--model", options.model] if options.model else []
    command += [f"--{word}" for word in ("rehearse", "quick", "full") if getattr(options, word)]
    process = subprocess.Popen(command, env=environment(scratch), start_new_session=True)
    found: dict[str, Any] = {"status": "finished"}
    try:
        if code := process.wait(seconds):
            found = {"status": "failed", "why": f"exit code {code}; the log says why"}
    except subprocess.TimeoutExpired:
        found = {"status": "stopped", "why": f"not finished after {seconds:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found["took"] = round(time.monotonic() - began, 1)
    found["rows"] = json.loads(rows.read_text("utf-8")) if rows.exists() else []
    return found


def environment(scratch: Path) -> dict[str, str]:
    """Programs are kept from part to part, and JAX may take most of the card's memory."""
    usual = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return usual | os.environ


def save(file: Path, found: dict[str, Any]) -> None:
    """Writes the JSON so that there is always a whole one."""
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(found, indent=1), "utf-8")
    fresh.replace(file)


def versions() -> dict[str, str]:
    """Of the packages that matter and are there."""
    known = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return known


def card() -> str:
    """What nvidia-smi says of the first GPU."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


if __name__ == "__main__":
    main()
