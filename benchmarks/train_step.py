"""One training update of ours against the same update in PyTorch: time, memory, equal losses.

Everything runs in float32 on the CPU with random weights, one LoRA (rank 8, seven projections),
clipping and AdamW. Two rivals: `peft`, what one writes with transformers and PEFT (pairs: all
layers of both sides with `output_hidden_states=True`), and `paper`, the steps of the paper's code
as we understand them (pairs: the lower blocks of each side, plus a head whose logits nobody reads).

    python benchmarks/train_step.py                                # 10 M parameters, 2 threads
    python benchmarks/train_step.py --model 60m --remat full       # with gradient checkpointing
    python benchmarks/train_step.py --answers 1.0 --dropout 0.1
    python benchmarks/train_step.py --memory                       # a process per side and step
    python benchmarks/train_step.py --profile                      # where our step spends its time

Before anything is timed, both sides must give the same loss and, after three updates, the same
adapter: otherwise the run ends. Then ours and a rival take turns (A B A B), and the table shows the
median of the ratios of neighbouring runs, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.sides import MODELS, SIDES, Ours, Update, make_batches, random_llama, write_models

STEPS, RIVALS = ("task", "align"), ("peft", "paper")
TOLERANCE = 1e-4


def check_equal(sides: dict[str, Any], dropout: float) -> None:
    """Ends the run where two sides do not compute the same thing."""
    print("same weights, same batch: loss of three updates, then the sum of |adapter|")
    for step in STEPS:
        losses = {name: [side.update(step) for _ in range(3)] for name, side in sides.items()}
        for name, values in losses.items():
            shown = " ".join(f"{value:.6f}" for value in values)
            print(f"  {step:5} {name:5} {shown}  {sides[name].adapter():.4f}")
        gap = max(
            abs(a - b) for n in losses for a, b in zip(losses[n], losses["ours"], strict=True)
        )
        if dropout:
            print(f"  {step:5} not compared: dropout draws other masks on either side")
        elif gap > TOLERANCE:
            sys.exit(f"{step}: losses differ by {gap:.1e}, more than {TOLERANCE}")


def take_turns(ours: Update, theirs: Update, rounds: int) -> dict[str, Any]:
    """Seconds of each side and their ratios over `rounds` turns A B A B."""
    ours(), theirs()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "theirs_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def _seconds(update: Update) -> float:
    start = time.perf_counter()
    update()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios of every step and rival, in this process."""
    batches = make_batches(MODELS[options.model], options.answers)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        sides = {name: make(Path(folder), options, batches) for name, make in SIDES.items()}
    check_equal(sides, options.dropout)
    rows = []
    for step in options.steps:
        for rival in RIVALS:
            a, b = (partial(sides[name].update, step) for name in ("ours", rival))
            rows.append({"step": step, "rival": rival, **take_turns(a, b, options.rounds)})
    print(
        f"\n{'step':6} {'rival':6} {'ours ms':>8} {'theirs':>8} {'ratio':>6} {'lowest':>7} highest"
    )
    for row in rows:
        times = f"{row['ours_ms']:8.0f} {row['theirs_ms']:8.0f}"
        ratios = f"{row['ratio']:6.2f} {row['lowest']:7.2f} {row['highest']:7.2f}"
        print(f"{row['step']:6} {row['rival']:6} {times} {ratios}")
    return rows


def measure_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of each side and step, each in a process of its own."""
    rows = []
    print(f"\n{'step':6} {'side':6} {'peak MB':>8} {'added by three updates':>23} compiled")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        for step in options.steps:
            for side in SIDES:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", side, step, folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
                rows.append({"step": step, "side": side, **row})
                compiled = f"{row['compiled_mb']:8.0f}" if "compiled_mb" in row else ""
                print(f"{step:6} {side:6} {row['peak_mb']:8.0f} {row['added_mb']:23.0f} {compiled}")
    return rows


def measure_one(options: argparse.Namespace) -> None:
    """This process's memory: prints one line of JSON."""
    name, step, folder = options.one
    batches = make_batches(MODELS[options.model], options.answers)
    side = SIDES[name](Path(folder), options, batches)
    found = {}
    if name == "ours":
        # What the compiler itself needs would hide in the peak, hence the program's own figure.
        found["compiled_mb"] = side.compile(step).memory_analysis().temp_size_in_bytes / 1e6
    before = _peak_mb()
    for _ in range(3):
        side.update(step)
    print(json.dumps({"peak_mb": _peak_mb(), "added_mb": _peak_mb() - before, **found}))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux: KB


def profile(options: argparse.Namespace) -> None:
    """Our time by kind of instruction, from a trace of three updates."""
    import jax

    batches = make_batches(MODELS[options.model], options.answers)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), options)
        ours = Ours(Path(folder), options, batches)
        for step in options.steps:
            ours.update(step)
            with jax.profiler.trace(folder):
                for _ in range(3):
                    ours.update(step)
            trace = max(Path(folder).rglob("*.xplane.pb"), key=os.path.getmtime)
            data = jax.profiler.ProfileData.from_file(str(trace))
            spent: dict[str, float] = {}
            for plane in data.planes:
                for line in plane.lines:
                    for event in line.events:
                        if dict(event.stats).get("hlo_op"):
                            spent[event.name] = spent.get(event.name, 0) + event.duration_ns / 3e6
            print(f"\n{step}: ms an update, nested instructions count twice")
            for name, ms in sorted(spent.items(), key=lambda item: -item[1])[:40]:
                print(f"  {ms:8.1f}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="10m", help="10m, 60m; with --rows slots also a folder")
    parser.add_argument("--rows", choices=("random", "slots"), default="random",
                        help="slots: real rows, see benchmarks/slots.py")  # fmt: skip
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--remat", choices=("none", "full"), default="none")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter, either side")
    parser.add_argument("--answers", type=float, default=0.25, help="share of trained positions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peft-rows", type=int, default=32,
                        help="--rows slots: task rows that PEFT runs at a time")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model not in MODELS and options.rows == "random":
        parser.error(f"--model {options.model}: choose one of {', '.join(MODELS)}")
    # XLA takes as many threads as it may run on cores, so the affinity binds it; torch is told.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.rows == "slots":
        from benchmarks import slots

        shape = MODELS.get(options.model)
        make = shape and partial(random_llama, shape)
        rows = slots.measure(options, shape, make)
        if options.json:
            options.json.write_text(
                json.dumps({"options": vars(options), "rows": rows}, indent=1, default=str)
            )
    elif options.one:
        measure_one(options)
    elif options.profile:
        profile(options)
    else:
        facts = f"{options.model}, remat {options.remat}, dropout {options.dropout}"
        print(f"{facts}, answers {options.answers:.0%} of the tokens, {options.threads} threads")
        rows = measure_memory(options) if options.memory else measure(options)
        if options.json:
            options.json.write_text(json.dumps({"options": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
