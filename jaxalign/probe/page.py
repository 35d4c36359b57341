"""A probe's report as one HTML file that needs nothing else: text, charts, numbers, downloads.

Path('report.html').write_text(page(table, groups_of(table)), 'utf-8')

`page.html` is the template of the text and the tables; the charts are drawn by the script in
`page.js` from numbers that the page contains: retrieval as two letters each (thousandths, see
`pack`), 36 languages, 33 layers, 3 scores, 2 systems and 2 poolings in about 1 MB.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jaxalign.data.languages import language_name, resource_class
from jaxalign.probe.choice import bests, choose_layer
from jaxalign.probe.draw import HEALTH
from jaxalign.probe.reading import (
    FORM_TITLES,
    MISSING,
    TITLES,
    Groups,
    Line,
    curve_of,
    lines_of,
    order_of,
    percent,
    points,
    summary,
)
from jaxalign.probe.table import MAIN, SCORES, Table
from jaxalign.probe.tasks import Relation

LETTERS = np.frombuffer(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8
)
STEPS = 1000  # parts of 1 that are distinguished
NOTHING = 4095  # NaN: '__'
WARNINGS = 40  # shown for a system; the JSON file has all
Grid = dict[str, list[list[str]] | list[str]]  # head and rows


def page(table: Table, groups: Groups, related: Sequence[Relation] = ()) -> str:
    """The HTML document.

    Args:
      table: systems x poolings x layers x languages.
      groups: of `groups_of`.
      related: of `relations`: task scores against alignment.
    """
    layer = choose_layer(table).layer
    here = Path(__file__)
    house = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return house.from_string(here.with_suffix(".html").read_text("utf-8")).render(
        title=f"Language alignment in {_short(table.model)}",
        style=Markup(here.with_suffix(".css").read_text("utf-8")),
        script=Markup(here.with_suffix(".js").read_text("utf-8")),
        data=_json(_data(table, groups, layer)),
        summary=" ".join(summary(table, layer)),
        facts=_facts(table, layer),
        languages=_languages(table, layer),
        layer=layer,
        last=table.systems[-1],
        pivot=language_name(table.pivot),
        forms=_forms(table),
        tasks=_tasks(related, layer),
        warnings=table.warnings,
        most=WARNINGS,
        notes=table.notes,
    )


def pack(values: np.ndarray) -> str:
    """Two letters for each number in 0..1, in C order: thousandths to base 64; NaN is `__`."""
    whole = np.nan_to_num(np.rint(np.clip(values, 0, 1) * STEPS), nan=NOTHING).astype(np.uint16)
    return np.stack([LETTERS[whole >> 6], LETTERS[whole & 63]], -1).tobytes().decode("ascii")


def unpack(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of `pack`, as the script reads them."""
    value = np.argsort(LETTERS)[
        np.searchsorted(np.sort(LETTERS), np.frombuffer(text.encode("ascii"), np.uint8))
    ].reshape(-1, 2)
    whole = value[:, 0] * 64 + value[:, 1]
    return np.where(whole == NOTHING, np.nan, whole / STEPS).reshape(shape)


def _data(table: Table, groups: Groups, layer: int) -> dict[str, Any]:
    """What the script draws."""
    at = {name: place for place, name in enumerate(table.languages)}
    return {
        "model": table.model,
        "corpus": table.corpus,
        "systems": table.systems,
        "poolings": table.poolings,
        "codes": table.languages,
        "names": [language_name(name) for name in table.languages],
        "classes": [resource_class(name) for name in table.languages],
        "pivot": at[table.pivot],
        "layers": table.layers,
        "chosen": layer,
        "order": order_of(table, 0, layer),
        "groups": {group: [at[name] for name in names] for group, names in groups.items()},
        "titles": {
            score: title
            for score, title in sorted(TITLES.items(), key=lambda item: item[0] != MAIN)
            if score in table.pairs or score in table.pivoted
        },
        "forms": {form: FORM_TITLES[form] for form in table.forms},
        "scores": SCORES,
        "pairs": {score: pack(values) for score, values in table.pairs.items()},
        "pivoted": {name: _plain(values, 3) for name, values in table.pivoted.items()},
        "health": {name: _plain(values, 5) for name, values in table.health.items()},
        "panels": HEALTH,
        "sentences": table.sentences,
        "warnings": table.warnings,
    }


def _plain(values: np.ndarray, digits: int) -> list:
    """Nested lists with this many decimals (digits, for large numbers); NaN as None."""
    rounded = np.vectorize(lambda x: float(f"{x:.{digits}g}"), otypes=[float])(values)
    rounded = np.where(np.abs(values) < 1, np.round(values, digits), rounded)
    return np.where(np.isnan(rounded), np.array(None), rounded).tolist()


def _json(value: Any) -> Markup:
    """JSON that no text in it can end the script element with."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1] or model


def _facts(table: Table, layer: int) -> list[tuple[str, str, str]]:
    """The numbers of the head: layer, what each system finds there, the weakest language."""
    last = table.systems[-1]
    lines = [line for line in lines_of(table, layer) if not np.isnan(line.accuracy[last])]
    chosen = "chosen block" if len(table.forms) == 1 else "best block, raw states"
    depth = f"{percent(layer / table.layers, 0)} of the depth"
    facts = [(chosen, f"{layer} of {table.layers}", depth)]
    first = curve_of(table, MAIN, 0, 0)[layer]
    for s, system in enumerate(table.systems):
        value = curve_of(table, MAIN, s, 0)[layer]
        under = f"{points(value - first)} points" if s else "margin score, mean"
        facts.append((system, percent(value), under))
    for form, row in list(bests(table, 0, 0).items())[1:]:
        name = f"{table.systems[0]}, {FORM_TITLES[form]}"
        facts.append((name, percent(row[MAIN][1]), f"best in block {row[MAIN][0]}"))
    if lines and len(table.languages) > 2:
        facts.append((f"weakest in {last}", lines[0].name, percent(lines[0].accuracy[last])))
    return facts


def _languages(table: Table, layer: int) -> dict[str, list[tuple]]:
    """Columns (name, class, whether sorted by it), and a row for each language, weakest first."""
    several = len(table.systems) > 1
    numbers = [
        "Class", *(f"{system}, %" for system in table.systems), *["Gain"] * several, "Best layer",
        "MEXA, %", "CKA", *(f"{FORM_TITLES[form].capitalize()}, %" for form in table.forms[1:]),
    ]  # fmt: skip
    head = [("Language", "text", False)]
    head += [(name, "number", at == len(table.systems)) for at, name in enumerate(numbers)]
    rows = [(line.name, line.language, _cells(line, several)) for line in lines_of(table, layer)]
    return {"head": head, "rows": rows}


def _cells(line: Line, several: bool) -> list[tuple[str, str, str]]:
    """A language's numbers: what the column is sorted by, the text, the length of a bar."""

    def cell(value: float | None, text: str, bar: bool = False) -> tuple[str, str, str]:
        if value is None or np.isnan(value):
            return "", "", ""
        return f"{value:.6f}", text, f"{value:.3f}" if bar else ""

    return [
        cell(line.resource, f"{line.resource}"),
        *(cell(value, f"{100 * value:.1f}", bar=True) for value in line.accuracy.values()),
        *[cell(line.gain, points(line.gain))] * several,
        cell(line.best, f"{line.best}"),
        cell(line.mexa, f"{100 * line.mexa:.1f}"),
        cell(line.cka, f"{line.cka:.2f}"),
        *(cell(value, f"{100 * value:.1f}") for value in line.forms.values()),
    ]


def _forms(table: Table) -> Grid:
    """The best block by each measure and form of the states; no rows where raw is the only."""
    columns = list(product(range(len(table.systems)), table.forms))
    head = [f"{table.systems[s]}, {FORM_TITLES[form]}" for s, form in columns]
    rows = []
    for place, score in product(range(len(table.poolings)), (MAIN, "csls", "cosine", "mexa")):
        found = [bests(table, s, place) for s in range(len(table.systems))]
        cells = [found[s].get(form, {}).get(score) for s, form in columns]
        pooling = f", {table.poolings[place]} pooling" if len(table.poolings) > 1 else ""
        words = [f"block {cell[0]}: {percent(cell[1])}" if cell else MISSING for cell in cells]
        rows.append([TITLES[score] + pooling, *words])
    return {"head": ["Measure", *head], "rows": rows if len(table.forms) > 1 else []}


def _tasks(related: Sequence[Relation], layer: int) -> Grid:
    """Correlations with task scores; no rows where none were given."""
    rows = []
    for relation in related:
        found = relation.by_layer[layer]
        course = [one.pearson for one in relation.by_layer]
        known = [value for value in course if value is not None]
        best = f"{max(known):.2f}, layer {course.index(max(known))}" if known else MISSING
        numbers = (found.pearson, found.pearson_p, found.spearman, found.spearman_p)
        words = [MISSING if value is None else f"{value:.2g}" for value in numbers]
        rows.append([relation.system, relation.measure, f"{found.number}", *words, best])
    head = ["System", "Score", "Languages", "Pearson", "p", "Spearman", "p", "Highest Pearson"]
    return {"head": head, "rows": rows}
