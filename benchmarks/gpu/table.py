"""The JSON of a run as a table.

python benchmarks/gpu/table.py gpu.json
python benchmarks/gpu/table.py gpu.json --markdown    # our updates against PEFT's, for a page
python benchmarks/gpu/table.py gpu.json other.json    # with PEFT of another run, if it has none
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADS = ("", "tokens/s", "TFLOP/s", "MFU", "memory", "compile")


def show(found: dict[str, Any]) -> None:
    """Prints every part that ran."""
    print(f"\n{found['card'] or 'no GPU'}; {found['date']}; jax {found['versions'].get('jax')}")
    rate = measured(found, "flops_per_s")
    if rate:
        bandwidth = measured(found, "bytes_per_s") / 1e12
        print(f"this card: {rate / 1e12:.0f} TFLOP/s (bf16), {bandwidth:.2f} TB/s; MFU is of that")
    for name, part in found["parts"].items():
        why = f": {part['why']}" if "why" in part else ""
        rows = part.get("rows", [])
        bad = sum("error" in row or row.get("ok") is False for row in rows)
        count = f", {bad} of {len(rows)} rows failed" if bad else ""
        print(f"\n{name}: {part['status']}{why}{count}")
        speeds = [row for row in rows if "tokens" in row]
        if speeds:
            _print([HEADS, *(_speed(row, rate) for row in speeds)])
        for row in rows:
            for line in _others(row):
                print("  " + line)
    ratios = compare(found)
    if ratios:
        print("\nours against the best of PEFT's rows, tokens a second")
    for what, ratio in ratios.items():
        print(f"  {what}: {ratio:.2f} times")


def read(file: Path, *others: Path) -> dict[str, Any]:
    """A run; PEFT's updates are those of another one where it did not measure them."""
    found, *more = (json.loads(path.read_text("utf-8")) for path in (file, *others))
    for other in more:
        found["parts"].setdefault("peers", other["parts"]["peers"])
    return dict(found)


def markdown(found: dict[str, Any]) -> str:
    """Our updates and, where they were measured, PEFT's: tokens a second."""
    rate, ratios = measured(found, "flops_per_s"), compare(found)
    theirs = {
        row["what"]: f"{row['tokens'] / row['seconds']:,.0f}" if "tokens" in row else "no memory"
        for row in found["parts"].get("peers", {}).get("rows", [])
        if "tokens" in row or "OutOfMemory" in row.get("error", "")
    }
    lines = [
        "| update | tokens/s | MFU | memory | compile | PEFT, checkpointing off | on | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["parts"]["fast"]["rows"]:
        if "tokens" not in row:
            continue
        _, speed, _, share, memory, compiled = _speed(row, rate)
        what = row["what"]
        off, on = (theirs.get(f"{what}, checkpointing {word}", "") for word in ("off", "on"))
        ratio = f"{ratios[what]:.2f}" if what in ratios else ""
        lines.append(
            f"| {what} | {speed} | {share} | {memory} | {compiled} | {off} | {on} | {ratio} |"
        )
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def compare(found: dict[str, Any]) -> dict[str, float]:
    """Update -> our tokens a second over those of PEFT's fastest row."""
    fast, peers = (
        [
            (row["what"], row["tokens"] / row["seconds"])
            for row in found["parts"].get(part, {}).get("rows", [])
            if "tokens" in row
        ]
        for part in ("fast", "peers")
    )
    best: dict[str, float] = {}
    for what, speed in peers:
        work = what.rpartition(", ")[0]  # behind it: checkpointing on, torch.compile
        best[work] = max(speed, best.get(work, 0.0))
    return {what: speed / best[what] for what, speed in fast if what in best}


def measured(found: dict[str, Any], key: str) -> float:
    """What the card did, 0 where it was not measured."""
    rows = found["parts"].get("fast", {}).get("rows", [])
    return next((row[key] for row in rows if key in row), 0.0)


def _speed(row: dict[str, Any], rate: float) -> tuple[str, ...]:
    seconds, flops = row["seconds"], row.get("flops", 0.0)
    memory = row.get("memory_gb", row.get("peak_gb"))
    how = row.get("remat") or (f"{row['rows']} rows" if "rows" in row else "")
    return (
        row["what"] + (f" [{how}]" if how else ""),
        f"{row['tokens'] / seconds:,.0f}",
        f"{flops / seconds / 1e12:.0f}" if flops else "",
        f"{flops / seconds / rate:.0%}" if flops and rate else "",
        f"{memory:.1f} GB" if memory is not None else "",
        f"{row['compile_s']:.0f} s" if "compile_s" in row else "",
    )


def _others(row: dict[str, Any]) -> list[str]:
    """What a row says besides its speed."""
    what = row["what"]
    if "error" in row or "skipped" in row:
        return [f"{what}: " + (row.get("error") or f"skipped, {row['skipped']}")]
    lines = []
    if "ok" in row:
        worst = f"{row['worst']:.1e} (limit {row['limit']:.0e})" if "worst" in row else ""
        words = ["right" if row["ok"] else "WRONG", worst, row.get("note", "")]
        lines.append(f"{what}: " + "; ".join(word for word in words if word))
    if "texts" in row:
        speed = row["texts"] / row["seconds"]
        computed = f"{row['computed']:,} tokens computed for {row['tokens']:,} of the rows"
        lines.append(f"{what}: {speed:,.0f} rows/s; {computed}")
    if "shares" in row:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
        lines.append(f"{what}: {shares}")
        lines += [
            f"  {one['share']:6.1%} {one['ms_an_update']:9.2f} ms {one['calls_an_update']:6.0f} x "
            f"{one['kind']:12} {one['kernel']}"
            for one in row["longest"]
        ]
    return lines


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())


if __name__ == "__main__":
    known = read(*(Path(word) for word in sys.argv[1:] if not word.startswith("--")))
    if "--markdown" in sys.argv:
        print(markdown(known))
    else:
        show(known)
