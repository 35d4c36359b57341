"""A probe written down: one HTML page, JSON, CSV and pictures in a folder, tables in the terminal.

    write(table, Path('report'))           # report.html, report.json, pairs.csv, curves.png, ...
    write(table, Path('report'), {'Celtic': ('cy', 'ga')})
    show(table, Console())

JSON and CSV hold every number in full; the page rounds to three decimals.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.probe.choice import as_json, bests, choose_layer
from jaxalign.probe.draw import curves, difference, forms, health, heatmap, label, scatter
from jaxalign.probe.page import page
from jaxalign.probe.reading import (
    FORM_TITLES,
    MISSING,
    TITLES,
    curve_of,
    groups_of,
    lines_of,
    percent,
    points,
    summary,
)
from jaxalign.probe.table import MAIN, SCORES, Table, keyed
from jaxalign.probe.tasks import Relation, sentence

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Grid

WEAKEST = 10  # languages in the terminal
ROWS = 18  # layers in the terminal; deeper models show every second or third
SHOWN = 5  # warnings of a system in the terminal
COLUMNS = {MAIN: "margin", "cosine": "cosine", "mexa": "MEXA"}
HEADS = FORM_TITLES | {"standardised": "standard-\nised", "all_but_top": "all but\nthe top"}


def write(
    table: Table,
    folder: Path,
    groups: Mapping[str, Sequence[str]] | None = None,
    related: Sequence[Relation] = (),
) -> list[Path]:
    """The files written: report.html, report.json, pairs.csv, languages.csv and PNGs.

    Args:
      table: of `jaxalign.probe.run.probe`.
      folder: made if it is not there; files of an earlier report are overwritten.
      groups: names with languages, each a curve; None: low- and high-resource, where both exist.
      related: task scores against alignment, of `relations`; adds correlations.csv and tasks.png.

    Raises:
      UserError: a group names a language that was not probed.
    """
    named = groups_of(table, groups)
    layer = choose_layer(table).layer
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "report.html": page(table, named, related),
        "report.json": json.dumps(as_json(table), ensure_ascii=False),
    }
    found = []
    for name, text in texts.items():
        found.append(folder / name)
        found[-1].write_text(text, "utf-8")
    found.append(_csv(folder / "pairs.csv", _pairs(table)))
    found.append(_csv(folder / "languages.csv", _languages(table, layer)))
    found += [folder / "curves.png", folder / "health.png"]
    curves(table, found[-2], named)
    health(table, found[-1])
    for system, name in enumerate(table.systems):
        found.append(folder / f"heatmap-{_filename(name)}.png")
        heatmap(table, found[-1], system, layer)
    if len(table.forms) > 1:
        found.append(folder / "states.png")
        forms(table, found[-1])
    if len(table.systems) > 1:
        found.append(folder / "difference.png")
        difference(table, found[-1], layer)
    if related:
        found += [_csv(folder / "correlations.csv", _correlations(related)), folder / "tasks.png"]
        scatter(table, found[-1], related, layer)
    return found


def show(table: Table, console: Console, related: Sequence[Relation] = ()) -> None:
    """Prints the chosen layer, the course over layers, the weakest languages and warnings."""
    layer = choose_layer(table).layer
    console.print(" ".join(summary(table, layer)), soft_wrap=False, markup=False, highlight=False)
    console.print(_course(table, layer))
    if len(table.forms) > 1:
        console.print(_bests(table))
    if len(table.languages) > 2:
        console.print(_weakest(table, layer))
    for relation in related:
        console.print(sentence(relation, layer), markup=False, highlight=False)
    for note in table.notes:
        console.print(note, markup=False, highlight=False)
    for system, warnings in table.warnings.items():
        for text in warnings[:SHOWN]:
            console.print(f"! {system}: {text}", style="yellow", markup=False, highlight=False)
        if len(warnings) > SHOWN:
            more = f"! {system}: and {len(warnings) - SHOWN} more, in report.json"
            console.print(more, style="yellow", markup=False, highlight=False)


# Files --------------------------------------------------------------------------------------------


def _filename(system: str) -> str:
    """A system's name without what a path cannot hold."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in system)


def _csv(path: Path, rows: Iterable[Sequence[object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def _pairs(table: Table) -> Iterator[Sequence[object]]:
    """Long form; directions that were not measured are left out."""
    scores = [keyed(score, form) for form in table.forms for score in SCORES]
    yield ("system", "pooling", "layer", "source", "target", *scores)
    stacked = np.stack([table.pairs[score] for score in scores], axis=-1)
    for s, p, layer, a, b in np.argwhere(~np.isnan(stacked).all(axis=-1)):
        yield (
            table.systems[s], table.poolings[p], layer, table.languages[a], table.languages[b],
            *map(_number, stacked[s, p, layer, a, b]),
        )  # fmt: skip


def _languages(table: Table, layer: int) -> Iterator[Sequence[object]]:
    """As on the page: the weakest first, at the chosen layer."""
    systems = [f"accuracy {system}" for system in table.systems]
    others = [f"accuracy {table.systems[-1]} {form}" for form in table.forms[1:]]
    yield (
        "language", "name", "class", "layer", *systems, "gain", "best_layer", "mexa", "cka",
        "sentences", *others,
    )  # fmt: skip
    for line in lines_of(table, layer):
        yield (
            line.language, line.name, "" if line.resource is None else line.resource, layer,
            *(_number(line.accuracy[system]) for system in table.systems), _number(line.gain),
            "" if line.best is None else line.best, _number(line.mexa), _number(line.cka),
            table.sentences.get(line.language, ""), *map(_number, line.forms.values()),
        )  # fmt: skip


def _correlations(related: Sequence[Relation]) -> Iterator[Sequence[object]]:
    """Every layer's, by system and measure."""
    numbers = ("pearson", "pearson_p", "spearman", "spearman_p")
    yield ("system", "measure", "layer", *numbers, "languages")
    for relation in related:
        for layer, found in enumerate(relation.by_layer):
            values = (getattr(found, name) for name in numbers)
            cells = ("" if value is None else _number(value) for value in values)
            yield (relation.system, relation.measure, layer, *cells, found.number)


# Terminal -----------------------------------------------------------------------------------------


def _bare(value: float) -> str:
    return percent(value).removesuffix("\u00a0%")


def _grid(title: str) -> Grid:
    from rich import box
    from rich.table import Table as Grid

    return Grid(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)


def _course(table: Table, layer: int) -> Grid:
    """A line per layer (per second or third in deep models, the chosen one always)."""
    from rich.text import Text

    systems = _systems(table)
    scores = COLUMNS if len(systems) < 3 else {MAIN: "margin"}  # 80 columns hold no more
    if len(systems) == 1:
        scores = scores | {keyed(MAIN, form): HEADS[form] for form in table.forms[1:]}
    grid = _grid("Means by layer, %" + _left_out(table, systems))
    grid.add_column("layer", justify="right")
    grid.add_column("depth", justify="right")
    curves_of = []
    for s in systems:
        for score, word in scores.items():
            name = table.systems[s] if len(systems) > 1 else ""
            grid.add_column(Text(f"{name}\n{word}".strip()), justify="right", overflow="fold")
            curves_of.append(curve_of(table, score, s, 0))
    step = -(-(table.layers + 1) // ROWS)
    for row in range(table.layers + 1):
        if row % step and row not in (layer, table.layers):
            continue
        cells = [_bare(curve[row]) for curve in curves_of]
        depth = f"{row / table.layers:.0%}"
        mark = f"> {row}" if row == layer else str(row)
        grid.add_row(mark, depth, *cells, style="bold" if row == layer else None)
    return grid


def _bests(table: Table) -> Grid:
    """Block and share found there: a line for each measure, a column for each form of states."""
    from rich.text import Text

    grid = _grid("Best block by measure: % it finds")
    grid.add_column("measure")
    columns = []
    for s in sorted({0, len(table.systems) - 1}):
        found = bests(table, s, 0)
        name = table.systems[s] if len(table.systems) > 1 else ""
        for form in table.forms:
            grid.add_column(Text(f"{name}\n{HEADS[form]}".strip()), justify="right")
            columns.append(found.get(form, {}))
    for score in (MAIN, "csls", "cosine", "mexa"):
        cells = [
            f"{row[score][0]}: {_bare(row[score][1])}" if score in row else MISSING
            for row in columns
        ]
        grid.add_row(TITLES[score].removesuffix(" retrieval"), *cells)
    return grid


def _weakest(table: Table, layer: int) -> Grid:
    from rich.text import Text

    systems = _systems(table)
    grid = _grid(f"Weakest languages at layer {layer}, margin %, from and to all")
    grid.add_column("language", overflow="ellipsis", no_wrap=True, max_width=22)
    grid.add_column("class", justify="right")
    for s in systems:
        grid.add_column(Text(table.systems[s]), justify="right", overflow="fold")
    if len(table.systems) > 1:
        grid.add_column("gain", justify="right")
    for name in ("best layer", "MEXA"):
        grid.add_column(name, justify="right")
    lines = [line for line in lines_of(table, layer) if line.best is not None]
    for line in lines[:WEAKEST]:
        cells = [_bare(line.accuracy[table.systems[s]]) for s in systems]
        if len(table.systems) > 1:
            cells.append(points(line.gain))
        resource = "" if line.resource is None else str(line.resource)
        grid.add_row(Text(label(line.language)), resource, *cells, str(line.best), _bare(line.mexa))
    return grid


def _systems(table: Table) -> list[int]:
    """The systems that 80 columns hold: the first and the last few."""
    count = len(table.systems)
    return list(range(count)) if count <= 4 else [0, *range(count - 3, count)]


def _left_out(table: Table, systems: list[int]) -> str:
    missing = len(table.systems) - len(systems)
    return f" ({missing} systems more in report.html)" if missing else ""
