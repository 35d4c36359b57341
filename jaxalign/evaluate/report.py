"""A comparison written down: JSON, Markdown, LaTeX and CSV in a folder, tables in the terminal.

JSON and CSV hold every number in full; the tables round to one decimal. Significance marks come
from the paired bootstrap: * p < 0.05, ** p < 0.01.

    found = compare(systems, groups)
    write(found, Path("runs/own/report"), "Slots, 52 languages")   # [report.json, report.md, ...]
    show(found, Console())
"""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxalign.evaluate.compare import ALL, Comparison, Gain, Score, Tally

if TYPE_CHECKING:
    from rich.console import Console

WORDS = {"f1": "F1", "bleu": "BLEU", "chrf": "chrF", "comet": "COMET", "ner": "NER"}
POINTS = ("bleu", "chrf", "comet")  # scores that are not percent
MARKS = ((0.01, "**"), (0.05, "*"))
PLUS_MINUS = "±"
HEAD = 12  # letters of a system's name before it is folded


# Words --------------------------------------------------------------------------------------------


def label(name: str) -> str:
    """'slot F1, %' of slot_f1; 'BLEU' of bleu, which is no percentage."""
    words = " ".join(WORDS.get(word.lower(), word) for word in name.split("_"))
    return words if name.lower().startswith(POINTS) else f"{words}, %"


def mark(p: float) -> str:
    """The stars of a p value."""
    return next((stars for bound, stars in MARKS if p < bound), "")


def by_group(comparison: Comparison) -> dict[str, list[str]]:
    """Groups with their languages; each language once, under the first group that has it."""
    seen: set[str] = set()
    found = {}
    for group, languages in comparison.groups.items():
        found[group] = [language for language in languages if language not in seen]
        seen.update(languages)
    return {group: languages for group, languages in found.items() if languages}


def notes(comparison: Comparison) -> list[str]:
    """Sentences that a reader of the tables needs."""
    found = []
    if any(seeds > 1 for seeds in comparison.seeds.values()):
        found.append(f"{PLUS_MINUS}: standard deviation over seeds.")
    found.append("Means over languages are macro means of corpus scores.")
    if len(comparison.systems) > 1:
        found.append(
            f"Gains are over {comparison.systems[0]}; * p < 0.05, ** p < 0.01: two-sided paired "
            f"bootstrap over rows (Koehn 2004), {comparison.draws:,} draws, seed "
            f"{comparison.seed}; each line for itself, not corrected for their number."
        )
    for group, languages in comparison.absent.items():
        found.append(f"{group} is without {', '.join(languages)}: not measured.")
    return [*found, *comparison.signatures]


def _score(score: Score, between: str = f" {PLUS_MINUS} ") -> str:
    return f"{score.mean:.1f}" + ("" if score.std is None else f"{between}{score.std:.1f}")


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def _interval(gain: Gain) -> str:
    return f"{_signed(gain.low)} to {_signed(gain.high)}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"


def _tally(tally: Tally) -> str:
    return f"{tally.wins}-{tally.losses}-{tally.ties}"


# Lines --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of a table: a language or a group under one measure."""

    measure: str
    level: str  # language | group
    name: str
    group: str  # of a language: the group it is printed under
    scores: dict[str, Score]  # by system
    gains: dict[str, Gain]  # by system; none for the baseline


def lines(comparison: Comparison, measure: str) -> Iterator[Line]:
    """Languages in the order of the groups, then the groups."""
    found = comparison.measures[measure]
    rows = [
        ("language", language, group)
        for group, languages in by_group(comparison).items()
        for language in languages
    ] + [("group", group, group) for group in comparison.groups]
    for level, name, group in rows:
        scores, gains = (
            (found.languages, found.language_gains)
            if level == "language"
            else (found.groups, found.group_gains)
        )
        yield Line(
            measure, level, name, group,
            {system: scores[system][name] for system in scores},
            {system: gains[system][name] for system in gains},
        )  # fmt: skip


def _group_name(comparison: Comparison, group: str) -> str:
    return f"{group} ({len(comparison.groups[group])})"


# Files --------------------------------------------------------------------------------------------


def write(comparison: Comparison, folder: Path, title: str) -> list[Path]:
    """The files written: report.json, report.md, report.tex, report.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for ending, text in (
        (
            "json",
            json.dumps({"title": title, **comparison.as_json()}, indent=1, ensure_ascii=False),
        ),
        ("md", markdown(comparison, title)),
        ("tex", latex(comparison, title)),
    ):
        path = folder / f"report.{ending}"
        path.write_text(text + "\n", encoding="utf-8")
        found.append(path)
    path = folder / "report.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(_csv_rows(comparison))
    return [*found, path]


def _csv_rows(comparison: Comparison) -> Iterator[list]:
    """A line for each measure, language or group, and system."""
    tally = ("wins", "losses", "ties", "p")
    yield [
        "measure", "level", "name", "group", "system", "mean", "std", "seeds", "rows",
        "gain", "low", "high", "p",
        *(f"row_{part}" for part in tally), *(f"language_{part}" for part in tally),
    ]  # fmt: skip
    for measure in comparison.measures:
        for line in lines(comparison, measure):
            for system, score in line.scores.items():
                std = "" if score.std is None else score.std
                row = [measure, line.level, line.name, line.group, system, score.mean, std]
                row += [len(score.seeds), score.rows]
                gain = line.gains.get(system)
                if gain is None:
                    yield row + [""] * 12
                    continue
                row += [gain.gain, gain.low, gain.high, gain.p]
                for found in (gain.rows, gain.languages):
                    row += [getattr(found, part) if found else "" for part in tally]
                yield row


def markdown(comparison: Comparison, title: str) -> str:
    """The report as Markdown: a table for each measure, then counts and notes."""
    parts = [f"# {_cell(title)}"]
    others = comparison.systems[1:]
    for measure in comparison.measures:
        head = [label(measure), "group", "rows", comparison.systems[0]]
        for system in others:
            head += [system, "gain", f"{comparison.confidence} %", "p"]
        body = []
        for line in lines(comparison, measure):
            group = line.level == "group"
            row = [f"**mean of {_group_name(comparison, line.name)}**" if group else line.name]
            row += ["" if group else line.group, f"{line.scores[comparison.systems[0]].rows}"]
            for system, score in line.scores.items():
                row.append(_score(score))
                if gain := line.gains.get(system):
                    row += [_signed(gain.gain) + mark(gain.p), _interval(gain), _p(gain.p)]
            body.append(row)
        parts += [f"## {label(measure)}", _markdown_table(head, body, left=2)]
        if others:
            parts.append(_markdown_table(*_tallies(comparison, measure), left=2))
    if any(comparison.counts.values()):
        parts += ["## Counts (rows, mean over seeds)", _markdown_table(*_count_table(comparison))]
    return "\n\n".join([*parts, *(_cell(note) for note in notes(comparison))])


def _tallies(comparison: Comparison, measure: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows: wins, losses and ties of each system over languages and rows."""
    head = ["against " + comparison.systems[0], "of", "wins", "losses", "ties", "p (sign test)"]
    body = []
    for system, gains in comparison.measures[measure].group_gains.items():
        for what, tally in (("languages", gains[ALL].languages), ("rows", gains[ALL].rows)):
            if tally:
                numbers = (tally.wins, tally.losses, tally.ties)
                body.append([system, what, *map(str, numbers), _p(tally.p)])
    return head, body


def _count_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    names = dict.fromkeys(name for found in comparison.counts.values() for name in found)
    rows = f"of {sum(comparison.rows.values())} rows"
    return [rows, *comparison.systems], [
        [
            name.replace("_", " "),
            *(
                f"{comparison.counts[system].get(name, 0):.1f}".removesuffix(".0")
                for system in comparison.systems
            ),
        ]
        for name in names
    ]


def _cell(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "".join("\\" + letter if letter in "\\|*_`<" else letter for letter in text)


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def escaped(text: str) -> str:
        # The bold of a group's line is ours; what stands in it is not.
        bold = text.startswith("**") and text.endswith("**") and len(text) > 4
        return f"**{_cell(text[2:-2])}**" if bold else _cell(text)

    rule = ["---" if number < left else "---:" for number in range(len(head))]
    return "\n".join([row([_cell(cell) for cell in head]), row(rule)]
                     + [row([escaped(cell) for cell in cells]) for cells in body])  # fmt: skip


# LaTeX --------------------------------------------------------------------------------------------

TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", PLUS_MINUS: r"$\pm$",
}  # fmt: skip


def tex(text: str) -> str:
    """LaTeX that prints the text as it is."""
    return "".join(TEX.get(letter, letter) for letter in text)


def latex(comparison: Comparison, title: str) -> str:
    """The report as LaTeX tables, one for each measure; needs booktabs and nothing else.

    The best mean of a line is bold, ties included.
    """
    tables = [_latex_table(comparison, measure, title) for measure in comparison.measures]
    return "\n\n".join([r"% \usepackage{booktabs}", *tables])


def _latex_table(comparison: Comparison, measure: str, title: str) -> str:
    others = comparison.systems[1:]
    head = [label(measure), comparison.systems[0]]
    head += [cell for system in others for cell in (system, "gain")]
    body: list[str] = []
    last = ("", "")
    for line in lines(comparison, measure):
        if line.level != last[0]:
            body.append(r"\midrule")
        elif line.level == "language" and line.group != last[1]:
            body.append(r"\addlinespace")
        last = (line.level, line.group)
        means = [f"{score.mean:.1f}" for score in line.scores.values()]
        best = max(means, key=float) if others else ""
        cells = [tex(line.name if line.level == "language" else f"mean of {line.name}")]
        for mean, (system, score) in zip(means, line.scores.items(), strict=True):
            mean = rf"\textbf{{{mean}}}" if mean == best else mean
            cells.append(mean + ("" if score.std is None else rf" $\pm$ {score.std:.1f}"))
            if gain := line.gains.get(system):
                stars = mark(gain.p)
                cells.append(f"${_signed(gain.gain)}{f'^{{{stars}}}' if stars else ''}$")
        body.append(" & ".join(cells) + r" \\")
    caption = tex(f"{title}: {label(measure)}. " + " ".join(notes(comparison)))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(tex(cell) for cell in head) + r" \\",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{caption}}}",
            r"\end{table}",
        ]
    )


# Terminal -----------------------------------------------------------------------------------------


def show(comparison: Comparison, console: Console) -> None:
    """Prints the main measure by language, the others by group, and the counts.

    Systems that do not fit beside each other get tables of their own, each with the baseline.
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
        head, body = _count_table(comparison)
        _print(console, head, body)
    for note in notes(comparison):
        console.print(note, style="dim", markup=False, highlight=False)


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
        row = [line.name if level == "language" else _group_name(comparison, line.name)]
        for system in systems:
            row.append(_score(line.scores[system], PLUS_MINUS))
            if gain := line.gains.get(system):
                row.append(_signed(gain.gain) + mark(gain.p))
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
            cells = [cell for tally in found for cell in (_tally(tally) if tally else "", "")]
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
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for number, (name, width) in enumerate(_columns(head, rows)):
        table.add_column(
            Text(name), justify="right" if number else "left", min_width=width, no_wrap=True
        )
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if len(row) == 1 else None)
    console.print(table)
