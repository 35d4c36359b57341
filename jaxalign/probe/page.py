"""A probe's report as one HTML file that needs nothing else: text, charts, numbers, downloads.

Path('report.html').write_text(page(table, groups_of(table)), 'utf-8')

Text and the table of languages are plain HTML; the charts are drawn by the script in `page.js`
from numbers that lie in the page: retrieval as two letters each (thousandths, see `pack`), 36
languages, 33 layers, 3 scores, 2 systems and 2 poolings in about 1 MB.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from itertools import product
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

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
STEPS = 1000  # parts of 1 that are told apart
NOTHING = 4095  # NaN: '__'
WARNINGS = 40  # shown for a system; the JSON file has all

# What is measured -> how, and where it comes from.
METHODS = {
    "Retrieval": "The hidden states of a sentence's tokens after a block are pooled to one vector. "
    "For each ordered pair of languages, the share of sentences whose best-scoring candidate in "
    "the other language is their translation (or says the same). The embeddings are layer 0.",
    "Cosine": "Candidates are ranked by cos(x, y).",
    "CSLS": "2 cos(x, y) \N{MINUS SIGN} r(x) \N{MINUS SIGN} r(y), with r the mean cosine to the 10 "
    "nearest sentences of the other language: it lowers candidates that are near to everything. "
    "Conneau et al. 2018, arXiv 1710.04087.",
    "Margin": "cos(x, y) divided by the mean of r(x) and r(y), with 4 neighbours. Artetxe & "
    "Schwenk 2019, arXiv 1811.01136; used to choose the layer by Liu & Niehues 2025.",
    "MEXA": "Share of sentences that are closer to their translation in the pivot language than "
    "any other sentence is, in both directions. Kargaran et al. 2025, arXiv 2410.05873.",
    "Raw and standardised states": "A few dimensions of an LLM can be hundreds of times larger "
    "than the rest in every sentence (massive activations: Sun et al. 2024, arXiv 2402.17762), so "
    "that cosines of raw states compare hardly anything else. Standardised: every dimension minus "
    "its mean over all sentences of all languages of that layer, divided by its standard "
    "deviation. All but the top: minus the mean, and without the D / 100 main directions (Mu & "
    "Viswanath 2018, arXiv 1702.01417).",
    "CKA": "Linear centred kernel alignment of a language with the pivot: do sentences lie alike, "
    "up to rotation and scale? With fewer sentences than dimensions it is biased towards 1. "
    "Kornblith et al. 2019, arXiv 1905.00414.",
    "Shared neighbours": "Share of a sentence's 10 nearest sentences within its own language that "
    "the pivot language agrees on. Huh et al. 2024, arXiv 2405.07987.",
    "NASCA, NAVCA": "MEXA's rule on the feed-forward neurons, pooled with later tokens weighing "
    "more: which of them fire, and how strongly whatever the sign. Huang et al. 2025, "
    "arXiv 2507.14900.",
    "DALI": "Share of task items of which every answer option, with its premise, is nearer to its "
    "own translation than any two that do not belong together (strong: also than different options "
    "within a language); last token. Ravisankar et al. 2025, arXiv 2504.09378.",
    "Control": "The same retrieval with shuffled pairs; more than chance (1 / number of sentences) "
    "means a mistake in the pairing.",
    "Health": "A cosine can rise because states shrink or fall into few directions. Spread: "
    "1 \N{MINUS SIGN} |mean|² / mean |x|². Cosine of different sentences: anisotropy, "
    "Ethayarajh 2019, arXiv 1909.00512; where those cosines hardly spread, nothing can be told "
    "from them. Energy in one dimension: its share of the mean squared length. Effective "
    "dimensions: participation ratio of the "
    "covariance's eigenvalues. Isoscore: Rudman et al. 2022, arXiv 2108.07344. Variance that is "
    "the sentence's: its share in a two-way analysis of variance over languages and sentences.",
    "Resource class": "Joshi et al. 2020, The State and Fate of Linguistic Diversity and Inclusion "
    "in the NLP World: 5 has the most data, 1 the least that has any; low-resource is 0 to 2 here.",
    "Averages": "A language's retrieval is the mean over all directions from and to it, a group's "
    "the mean of its languages'. Nothing is averaged where nothing was measured.",
}


def page(table: Table, groups: Groups, related: Sequence[Relation] = ()) -> str:
    """The HTML document.

    Args:
      table: systems x poolings x layers x languages.
      groups: of `groups_of`.
      related: of `relations`: task scores against alignment.
    """
    layer = choose_layer(table).layer
    here = Path(__file__)
    parts = {
        "title": escape(f"Language alignment in {_short(table.model)}"),
        "style": here.with_suffix(".css").read_text("utf-8"),
        "script": here.with_suffix(".js").read_text("utf-8"),
        "data": _json(_data(table, groups, layer)),
        "summary": escape(" ".join(summary(table, layer))),
        "facts": _facts(table, layer),
        "languages": _languages(table, layer),
        "layer": str(layer),
        "last": escape(table.systems[-1]),
        "pivot": escape(language_name(table.pivot)),
        "forms": _forms(table),
        "tasks": _tasks(table, related, layer),
        "warnings": _warnings(table),
        "methods": "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in METHODS.items()
        ),
        "notes": "".join(f"<p>{escape(note)}</p>" for note in table.notes),
    }
    return Template(here.with_suffix(".html").read_text("utf-8")).substitute(parts)


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


def _json(value: Any) -> str:
    """JSON that no text in it can end the script element with."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1] or model


def _facts(table: Table, layer: int) -> str:
    """The numbers of the head: layer, what each system finds there, the weakest language."""
    last = table.systems[-1]
    lines = [line for line in lines_of(table, layer) if not np.isnan(line.accuracy[last])]
    facts = [
        (
            "chosen block" if len(table.forms) == 1 else "best block, raw states",
            f"{layer} of {table.layers}",
            f"{percent(layer / table.layers, 0)} of the depth",
        )
    ]
    first = curve_of(table, MAIN, 0, 0)[layer]
    for s, system in enumerate(table.systems):
        value = curve_of(table, MAIN, s, 0)[layer]
        under = f"{points(value - first)} points" if s else "margin score, mean"
        facts.append((system, percent(value), under))
    for form, row in list(bests(table, 0, 0).items())[1:]:
        block, value = row[MAIN]
        facts.append(
            (f"{table.systems[0]}, {FORM_TITLES[form]}", percent(value), f"best in block {block}")
        )
    if lines and len(table.languages) > 2:
        facts.append((f"weakest in {last}", lines[0].name, percent(lines[0].accuracy[last])))
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(under)}</small></dd></div>"
        for name, value, under in facts
    )


def _languages(table: Table, layer: int) -> str:
    """The table's head and body; each cell carries the number it is sorted by."""
    several = len(table.systems) > 1
    columns = [("Language", "text"), ("Class", "")]
    columns += [(f"{system}, %", "") for system in table.systems]
    columns += [("Gain", "")] * several
    columns += [("Best layer", ""), ("MEXA, %", ""), ("CKA", "")]
    columns += [(f"{FORM_TITLES[form].capitalize()}, %", "") for form in table.forms[1:]]
    first = 1 + len(table.systems)  # sorted by the last system when it comes
    head = "".join(
        f'<th scope="col" class="{kind or "number"}"'
        + (' aria-sort="ascending"' if place == first else "")
        + f'><button type="button">{escape(name)}</button></th>'
        for place, (name, kind) in enumerate(columns)
    )
    rows = "".join(_row(table, line) for line in lines_of(table, layer))
    return f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"


def _row(table: Table, line: Line) -> str:
    code = f" <code>{escape(line.language)}</code>" if line.name != line.language else ""
    cells = [_cell(line.resource, "" if line.resource is None else str(line.resource))]
    for system in table.systems:
        value = line.accuracy[system]
        if np.isnan(value):
            cells.append(_cell(None, ""))
        else:
            cells.append(
                f'<td data-value="{value:.6f}" class="bar" style="--share:{value:.3f}">'
                f"{100 * value:.1f}</td>"
            )
    if len(table.systems) > 1:
        cells.append(_cell(line.gain, points(line.gain)))
    cells.append(_cell(line.best, "" if line.best is None else str(line.best)))
    cells.append(_cell(line.mexa, f"{100 * line.mexa:.1f}"))
    cells.append(_cell(line.cka, f"{line.cka:.2f}"))
    cells += [_cell(value, f"{100 * value:.1f}") for value in line.forms.values()]
    name = f'<th scope="row" data-value="{escape(line.name)}" data-code="{escape(line.language)}">'
    name += f"{escape(line.name)}{code}</th>"
    return f"<tr>{name}{''.join(cells)}</tr>"


def _cell(value: float | None, text: str) -> str:
    if value is None or np.isnan(value):
        return '<td data-value=""></td>'
    return f'<td data-value="{value:.6f}">{escape(text)}</td>'


def _forms(table: Table) -> str:
    """The best block by each measure and form of the states, or nothing where raw is the only."""
    if len(table.forms) < 2:
        return ""
    head = "".join(
        f'<th scope="col">{escape(system)}, {escape(FORM_TITLES[form])}</th>'
        for system in table.systems
        for form in table.forms
    )
    rows = []
    for place, score in product(range(len(table.poolings)), (MAIN, "csls", "cosine", "mexa")):
        found = [bests(table, s, place) for s in range(len(table.systems))]
        cells = [by.get(form, {}).get(score) for by in found for form in table.forms]
        pooling = f", {table.poolings[place]} pooling" if len(table.poolings) > 1 else ""
        rows.append(
            f'<tr><th scope="row">{escape(TITLES[score] + pooling)}</th>'
            + "".join(
                f"<td>{MISSING}</td>"
                if cell is None
                else f"<td>block {cell[0]}: {escape(percent(cell[1]))}</td>"
                for cell in cells
            )
            + "</tr>"
        )
    return (
        '<section aria-labelledby="forms-title">'
        '<h2 id="forms-title">Best block by each measure</h2>'
        '<p class="note">And what it finds there. A few dimensions may dominate raw states; '
        "standardised states compare all of them.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="forms-title">'
        f'<table class="values"><thead><tr><th scope="col">Measure</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _tasks(table: Table, related: Sequence[Relation], layer: int) -> str:
    """The section of task scores, or nothing where none were given."""
    if not related:
        return ""
    head = ("System", "Score", "Languages", "Pearson", "p", "Spearman", "p", "Highest Pearson")
    rows = []
    for relation in related:
        found = relation.by_layer[layer]
        course = [one.pearson for one in relation.by_layer]
        known = [value for value in course if value is not None]
        best = f"{max(known):.2f}, layer {course.index(max(known))}" if known else MISSING
        numbers = (found.pearson, found.pearson_p, found.spearman, found.spearman_p)
        words = [MISSING if value is None else f"{value:.2g}" for value in numbers]
        cells = [relation.measure, str(found.number), *words, best]
        rows.append(
            f'<tr><th scope="row">{escape(relation.system)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        '<section aria-labelledby="tasks-title"><h2 id="tasks-title">Task scores</h2>'
        f'<p class="note">Do languages that find {escape(language_name(table.pivot))} better at '
        f"layer {layer} also do better? Correlation over languages; the highest of all layers is "
        "picked after the fact.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="tasks-title">'
        f'<table class="values"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "</section>"
    )


def _warnings(table: Table) -> str:
    found = []
    for system, warnings in table.warnings.items():
        if warnings:
            items = "".join(f"<li>{escape(text)}</li>" for text in warnings[:WARNINGS])
            more = len(warnings) - WARNINGS
            items += f"<li>and {more} more: see report.json</li>" if more > 0 else ""
            found.append(f"<h3>{escape(system)} ({len(warnings)})</h3><ul>{items}</ul>")
    return "".join(found) or "<p>None: no layer's states have collapsed.</p>"
