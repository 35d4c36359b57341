"""Where the time of an update goes, and what settings change it.

First a trace of three updates of Llama 3 8B: the longest kernels, and the shares of products,
attention, element-wise work, copies and gaps. Then the same update with other micro-batches, and
with XLA's flags, each in a process of its own. `--quick` measures the flags alone.

    python benchmarks/gpu/where.py --seconds 300
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from part import Part, Row, median_seconds, need_gpu
from shapes import LLAMA, TASK, Work, hf_config, least_flops, shrunk, spec_of

UPDATES, LONGEST = 3, 10
HERE = "trace and micro-batches"  # of the process that measures them

# The first pattern that a kernel's name has says what it is.
KINDS = {
    "attention": r"fmha|flash|sdpa|attention",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|matmul|_dot|\bdot|splitk",
    "copies": r"memcpy|memset|copy|transpose|concatenate|dynamic_update_slice|dynamic-update-slice",
    "element-wise": r"",
}

# XLA's flags, each against the default: the one of launch/gpu_flags.sh that concerns a single GPU
# (the others are about gathering weights between GPUs), and two that choose how kernels run.
FLAGS = {
    "products without Triton": "--xla_gpu_enable_triton_gemm=false",
    "latency hiding scheduler": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "without command buffers": "--xla_gpu_enable_command_buffer=",
}


def main() -> None:
    part = Part(__doc__, lambda parser: parser.add_argument("--one", help=argparse.SUPPRESS))
    if part.options.one == HERE:
        need_gpu(part)
        inside(part)
    elif part.options.one:
        need_gpu(part)
        part.measure(part.options.one, partial(timed, part.rehearse, most=2))
    else:  # this process leaves the GPU alone: it belongs to one of the others at a time
        if not part.quick and (error := child(part, HERE, part.options.out, {})):
            part.measure(HERE, partial(_fail, error))
        for name in FLAGS:
            part.measure(f"XLA: {name}", partial(flagged, part, name), need=20)


def inside(part: Part) -> None:
    """The rows that one process can measure."""
    part.measure("trace: task 16 x 2,048", partial(traced, part.rehearse), need=30)
    for rows in (2, 8):
        work = TASK._replace(rows=rows, micro_batches=16 // rows)
        name = f"micro-batches of {rows} x 2,048"
        part.measure(name, partial(timed, part.rehearse, work), need=35)


def child(part: Part, name: str, out: Path | None, environment: dict[str, str]) -> str:
    """Measures `name` in a process of its own, which writes to `out`; why it failed, if it did."""
    command = [sys.executable, __file__, "--one", name, "--seconds", str(part.left)]
    command += [f"--{word}" for word in ("rehearse", "quick") if getattr(part, word)]
    command += ["--out", str(out)] if out else []
    shown = None if name == HERE else subprocess.PIPE
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdout=shown,
        stderr=shown,
        text=True,
        timeout=max(part.left, 1),
    )
    if name == HERE and out and out.exists():
        part.rows = json.loads(out.read_text("utf-8"))
    if not done.returncode:
        return ""
    return ((done.stderr or "").strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def flagged(part: Part, name: str) -> Row:
    """The update in a process with one more of XLA's flags."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        given = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS[name]}".strip()
        if error := child(part, name, out, {"XLA_FLAGS": given}):
            raise RuntimeError(error)
        (row,) = json.loads(out.read_text("utf-8"))
    return {**{k: v for k, v in row.items() if k not in ("what", "took")}, "flag": FLAGS[name]}


def _fail(error: str) -> Row:
    raise RuntimeError(error)


def timed(rehearse: bool, work: Work = TASK, most: int = 3) -> Row:
    """Seconds of an update."""
    import ours

    small = shrunk(work) if rehearse else work
    one = ours.Ours(spec_of(hf_config(LLAMA, rehearse)), small)
    compiled = one.compile()
    one.run()
    seconds = median_seconds(one.run, most=most)
    return {
        "seconds": seconds,
        "tokens": small.tokens,
        "flops": least_flops(one.plan.spec, small),
        "compile_s": round(compiled, 1),
        "memory_gb": round(one.memory / 1e9, 2),
    }


# --- the trace ------------------------------------------------------------------------------------


def traced(rehearse: bool) -> Row:
    """What the device did during some updates."""
    import jax
    import ours

    work = shrunk(TASK) if rehearse else TASK
    one = ours.Ours(spec_of(hf_config(LLAMA, rehearse)), work)
    one.compile()
    one.run()
    seconds = median_seconds(one.run, most=3)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(UPDATES):
                one.run()
        file = max(Path(folder).rglob("*.xplane.pb"), key=os.path.getmtime)
        events = list(kernels(jax.profiler.ProfileData.from_file(str(file))))
    if not events:
        raise RuntimeError("the profiler recorded no kernel")
    return {"seconds": seconds, "tokens": work.tokens, **summary(events)}


def kernels(data: Any) -> Iterable[tuple[str, float, float]]:
    """(name, start, end) in ns of what ran on a GPU's streams, or of the CPU's operations."""
    planes = [plane for plane in data.planes if "GPU" in plane.name]
    for plane in planes or data.planes:
        for line in plane.lines:
            if planes and "Stream" not in line.name:
                continue  # sums of what the streams did
            for event in line.events:
                if planes or dict(event.stats).get("hlo_op"):
                    yield event.name, event.start_ns, event.start_ns + event.duration_ns


def summary(events: list[tuple[str, float, float]]) -> Row:
    """Shares of the time between the first kernel's start and the last one's end."""
    span = max(end for _, _, end in events) - min(start for _, start, _ in events)
    spent: dict[str, float] = defaultdict(float)
    times: dict[str, int] = defaultdict(int)
    for name, start, end in events:
        spent[family(name)] += end - start
        times[family(name)] += 1
    shares: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for name, ns in spent.items():
        shares[kind_of(name)] += ns / span
    shares["gaps"] = 1 - busy(events) / span
    longest = sorted(spent, key=lambda name: -spent[name])[:LONGEST]
    return {
        "shares": {name: round(share, 4) for name, share in shares.items()},
        "longest": [
            {
                "kernel": name[:120],
                "kind": kind_of(name),
                "share": round(spent[name] / span, 4),
                "ms_an_update": round(spent[name] / UPDATES / 1e6, 3),
                "calls_an_update": times[name] / UPDATES,
            }
            for name in longest
        ],
    }


def family(name: str) -> str:
    """A kernel's name without the number of its instance."""
    return re.sub(r"[._]\d+$", "", name)


def kind_of(name: str) -> str:
    """The row of KINDS that a kernel belongs to."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def busy(events: list[tuple[str, float, float]]) -> float:
    """ns in which at least one kernel ran."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((start, end) for _, start, end in events):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    main()
