"""A comparison in the terminal: tables that fit its width, foreign names written out.

show(compare(systems, groups), Console())
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxalign.evaluate.comparable import ALL
from jaxalign.evaluate.compare import Comparison
from jaxalign.evaluate.report import (
    PLUS_MINUS,
    by_group,
    count_table,
    group_name,
    label,
    lines,
    mark,
    notes,
    score_text,
    signed,
    tally_text,
)
from jaxalign.terminal import visible

HEAD = 12  # letters of a system's name before it is folded


def show(comparison: Comparison, console: Console) -> None:
    """Prints the main measure by language, the others by group, and the counts.

    Systems that do not fit next to each other get tables of their own, each with the baseline.
    """
    main, *others = comparison.measures
    for systems in _chunks(comparison, console.width):
        rows = list(_main_rows(comparison, main, systems))
        _print(console, _head(label(main), systems), rows)
    for systems in _chunks(comparison, console.width) if others else ():
        rows = []
        for measure in others:
            rows += [[label(measure)], *_rows(comparison, measure, systems, "group")]
        _print(console, _head("means", systems), rows)
    if any(comparison.counts.values()):
        head, body = count_table(comparison)
        _print(console, head, body)
    for note in notes(comparison):
        console.print(visible(note), style="dim")


def _chunks(comparison: Comparison, width: int) -> Iterator[list[str]]:
    """The baseline with as many others as a terminal of this width takes."""
    base, *others = comparison.systems
    if not others:
        yield [base]
    start = 0
    while start < len(others):
        step = len(others) - start
        while step > 1 and _width(comparison, [base, *others[start : start + step]]) > width:
            step -= 1
        yield [base, *others[start : start + step]]
        start += step


def _width(comparison: Comparison, systems: Sequence[str]) -> int:
    """Letters that the widest table of these systems takes."""
    widest = 0
    for measure in comparison.measures:
        columns = _columns(_head(measure, systems), list(_main_rows(comparison, measure, systems)))
        widest = max(widest, sum(width for _, width in columns) + 3 * len(columns) + 1)
    return widest


def _head(title: str, systems: Sequence[str]) -> list[str]:
    base, *others = systems
    return [title, base, *(cell for system in others for cell in (system, "gain"))]


def _rows(
    comparison: Comparison, measure: str, systems: Sequence[str], level: str
) -> Iterator[list[str]]:
    """Name, scores, gains; before the languages of a group the group's name alone."""
    last = ""
    several = len(by_group(comparison)) > 1
    for line in lines(comparison, measure):
        if line.level != level:
            continue
        if level == "language" and several and line.group != last:
            yield [line.group]
        last = line.group
        row = [line.name if level == "language" else group_name(comparison, line.name)]
        for system in systems:
            row.append(score_text(line.scores[system], PLUS_MINUS))
            if gain := line.gains.get(system):
                row.append(signed(gain.gain) + mark(gain.p))
        yield row


def _main_rows(comparison: Comparison, measure: str, systems: Sequence[str]) -> Iterator[list[str]]:
    yield from _rows(comparison, measure, systems, "language")
    yield ["mean"]
    yield from _rows(comparison, measure, systems, "group")
    gains = [comparison.measures[measure].group_gains[system][ALL] for system in systems[1:]]
    if not gains:
        return
    yield ["won-lost-tied"]
    tallies = {"languages": [g.languages for g in gains], "rows": [g.rows for g in gains]}
    for name, found in tallies.items():
        if any(found):
            cells = [cell for tally in found for cell in (tally_text(tally) if tally else "", "")]
            yield [name, "", *cells]


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    """(heading, width) of each column: cells stay whole, long headings are folded."""
    found = []
    for number, name in enumerate(head):
        cells = max((len(row[number]) for row in rows if len(row) > number), default=1)
        folded = textwrap.wrap(name, max(cells, HEAD)) or [""]
        found.append(("\n".join(folded), max(cells, *map(len, folded))))
    return found


def _print(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table; a row of a single cell is a heading."""
    head = [visible(cell) for cell in head]
    rows = [[visible(cell) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for number, (name, width) in enumerate(_columns(head, rows)):
        table.add_column(
            Text(name),
            justify="right" if number else "left",
            min_width=width,
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if len(row) == 1 else None)
    console.print(table)
