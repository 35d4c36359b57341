"""How a plan is shown: tables on a terminal, JSON for programs.

show(plan, console(), price=1.2)                 # dollars a chip-hour
Path('plan.json').write_text(json.dumps(as_json(plan, price=1.2)))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxalign.plan.advice import Advice, reason, seen
from jaxalign.plan.cost import Traffic
from jaxalign.plan.programs import Program
from jaxalign.plan.run import Plan
from jaxalign.plan.search import Found

SOURCES = {
    "compiler": (
        "Estimates of the compiler for this chip, not measurements: memory is what it reserves; "
        "time leaves out traffic that is not hidden and counts attention kernels at the chip's "
        "peak."
    ),
    "formula": (
        "Estimated by formula (arrays exactly, what a program keeps within about 30 %); no "
        "compiler for this chip is here, so time is unknown."
    ),
}


def show(
    plan: Plan, console: Console, advices: Sequence[Advice], price: float | None = None
) -> None:
    """Prints the programs, one update, the price and the verdict."""
    chip = plan.place.chip
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    console.print(
        f"{plan.config.model.path} on {plan.place.name}: {plan.place.chips} chips of "
        f"{_gb(chip.memory)} GB, mesh {mesh or 'of one'}",
        style="bold",
    )
    console.print(_programs(plan))
    for note in (*plan.notes, *_unknown(plan), SOURCES[_source(plan)]):
        console.print(note, style="dim")
    for line in (*_update(plan), *_bill(plan, price)):
        console.print(line)
    _verdict(plan, console, advices)


def show_search(found: list[Found], console: Console) -> None:
    """Prints what was tried, best first, and what to put into the configuration."""
    table = Table(box=None, header_style="bold")
    for name in ("", "ms a row", "peak GB", "FLOPs", "exposed ms", "settings"):
        table.add_column(name, justify="left" if name in ("", "settings") else "right")
    for one in found:
        mark = "*" if one.best else "" if one.plan.fits else "too large"
        table.add_row(
            mark,
            _ms(one.seconds_a_row),
            _gb(one.plan.peak),
            _number(one.ratio, "x"),
            _ms(one.exposed),
            one.text or "as configured",
            style="bold" if one.best else "" if one.plan.fits else "dim",
        )
    console.print(table)
    console.print(SOURCES[_source(found[0].plan)], style="dim")
    console.print(
        "* no other try is both faster and smaller. Exposed: traffic of an update that no "
        "computation hides, at the links' full speed; it is not in the time.",
        style="dim",
    )
    winner = next((one for one in found if one.plan.fits), None)
    if winner is not None and winner.text:
        console.print(f"fastest that fits: {winner.text}", style="bold green")


def as_json(plan: Plan, advices: Sequence[Advice], price: float | None = None) -> dict[str, Any]:
    """Everything a plan knows, in bytes, seconds and FLOPs of one chip."""
    hours = plan.chip_hours
    return {
        "place": plan.place.name,
        "chips": plan.place.chips,
        "chip": dataclasses.asdict(plan.place.chip),
        "mesh": plan.mesh,
        "settings": seen(plan.config),
        "programs": [_program_json(program) for program in plan.programs],
        "micro_batches": plan.counts,
        "source": _source(plan),
        "fits": plan.fits,
        "reason": reason(plan),
        "advice": [{"settings": advice.text, "peak": advice.peak} for advice in advices],
        "peak": plan.peak,
        "update": {
            "seconds": plan.update_seconds,
            "roofline": plan.update_roofline,
            "tokens": plan.update_tokens,
            "utilisation": plan.utilisation,
        },
        "updates": plan.updates,
        "chip_hours": hours,
        "dollars": None if hours is None or price is None else hours * price,
        "notes": list(plan.notes),
    }


def search_json(found: list[Found]) -> list[dict[str, Any]]:
    """Every try, best first."""
    return [
        {
            "settings": one.text,
            "fits": one.plan.fits,
            "pareto": one.best,
            "seconds_a_row": one.seconds_a_row,
            "peak": one.plan.peak,
            "mesh": one.plan.mesh,
            "programs": [_program_json(program) for program in one.plan.programs],
        }
        for one in found
    ]


def line(program: Program) -> str:
    """One program as it is ready: `task (32 x 512): 4.9 GB, 307 ms, compiled in 98 s`."""
    words = [f"{_gb(program.peak)} GB" if program.peak else "", program.error]
    words += [f"{_ms(program.seconds)} ms" if program.seconds else ""]
    words += [f"compiled in {program.took:.0f} s" if program.took else ""]
    return f"{program.name} ({program.what}): {', '.join(word for word in words if word)}"


def _programs(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold")
    known_rows = any(program.counted is not None for program in plan.programs)
    heads = ("program", "rows x tokens", *(["tokens that count"] if known_rows else []),
             "arguments", "temporary", "peak GB", "FLOPs / least", "collectives", "estimate ms",
             "roofline ms", "compiled s")  # fmt: skip
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < 2 else "right")
    for program in plan.programs:
        known = not program.error
        share = f" ({program.peak / program.chip.memory:.0%})" if program.peak else ""
        table.add_row(
            program.name,
            program.what,
            *([_percent(program.counted)] if known_rows else []),
            _gb(program.arguments) if known else "",
            _gb(program.temporaries) if known else "",
            (_gb(program.peak) if program.peak else program.error) + share,
            _number(program.ratio, "") if known else "",
            _collectives(program),
            _ms(program.seconds) if known else "",
            _ms(program.roofline) if known and program.least else "",
            f"{program.took:.0f}" if program.took else "",
            style="" if program.fits else "red",
        )
    return table


def _collectives(program: Program) -> str:
    if program.error or program.source == "formula":
        return ""
    whole = Traffic()
    for traffic in program.cost.collectives.values():
        whole.add(traffic, 1.0)
    if not whole.bytes:
        return "none"
    return f"{whole.count:.0f}, {_gb(whole.bytes)} GB, {whole.hidden / whole.bytes:.0%} hidden"


def _update(plan: Plan) -> list[str]:
    if not plan.update:
        return []
    parts = " + ".join(
        f"{times:g} x {program.name}" if times != 1 else program.name
        for program, times in plan.update
    )
    seconds, chips = plan.update_seconds, plan.place.chips
    if seconds is None:
        return [f"one update ({parts}): time unknown, roofline {_ms(plan.update_roofline)} ms"]
    speed = plan.update_tokens / seconds
    return [
        f"one update ({parts}): {_ms(seconds)} ms (roofline {_ms(plan.update_roofline)} ms), "
        f"{speed:,.0f} tokens/s ({speed / chips:,.0f} a chip), model FLOPs utilisation "
        f"{plan.utilisation:.0%} by the estimate"
    ]


def _bill(plan: Plan, price: float | None) -> list[str]:
    hours = plan.chip_hours
    if hours is None:
        return []
    dollars = "" if price is None else f", {hours * price:,.2f} dollars at {price:g} a chip-hour"
    return [
        f"{plan.updates:,} updates: {hours / plan.place.chips:.2f} hours, {hours:.1f} "
        f"chip-hours{dollars}, without loading, compiling, evaluations and checkpoints"
    ]


def _unknown(plan: Plan) -> list[str]:
    return [
        f"{program.name}: time unknown, the compiler's estimate lacks {len(program.cost.unknown)} "
        f"operations, as {program.cost.unknown[0]}"
        for program in plan.programs
        if program.cost.unknown
    ]


def _verdict(plan: Plan, console: Console, advices: Sequence[Advice]) -> None:
    if plan.fits:
        share = plan.peak / plan.place.chip.memory
        console.print(
            f"fits: {_gb(plan.peak)} of {_gb(plan.place.chip.memory)} GB ({share:.0%})",
            style="bold green",
        )
        return
    console.print(f"does not fit: {reason(plan)}", style="bold red")
    for advice in advices:
        enough = "" if advice.peak <= plan.place.chip.memory else ", still too much"
        console.print(f"  try {advice.text} (about {_gb(advice.peak)} GB{enough})")
    if not advices or advices[0].peak > plan.place.chip.memory:
        console.print("  try a larger slice, or batch.max_length")


def _source(plan: Plan) -> str:
    return plan.programs[0].source if plan.programs else "compiler"


def _program_json(program: Program) -> dict[str, Any]:
    return {
        "name": program.name,
        "what": program.what,
        "tokens": program.tokens,
        "mean": program.mean,
        "counted": program.counted,
        "fits": program.fits,
        "error": program.error,
        "source": program.source,
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "beside": program.beside,
        "peak": program.peak,
        "flops": program.cost.flops or None,
        "least_flops": program.least,
        "ratio": program.ratio,
        "collectives": {
            kind: dataclasses.asdict(traffic) for kind, traffic in program.cost.collectives.items()
        },
        "exposed_seconds": program.exposed,
        "seconds": program.seconds,
        "roofline": program.roofline,
        "unknown": program.cost.unknown,
        "compile_seconds": program.took,
    }


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3f}{unit}"
