"""A comparison written down: JSON, Markdown, LaTeX and CSV in a folder.

JSON and CSV hold every number in full; the tables round to one decimal. Significance marks come
from the paired bootstrap: * p < 0.05, ** p < 0.01.

    found = compare(systems, groups)
    write(found, Path("runs/own/report"), "Slots, 52 languages")   # [report.json, report.md, ...]
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign.checksums import SUMS, summed
from jaxalign.evaluate.comparable import ALL
from jaxalign.evaluate.compare import Comparison, Gain, Score, Tally
from jaxalign.paths import whole_file
from jaxalign.terminal import visible

WORDS = {"f1": "F1", "bleu": "BLEU", "chrf": "chrF", "comet": "COMET", "ner": "NER"}
POINTS = ("bleu", "chrf", "comet")  # scores that are not percent
MARKS = ((0.01, "**"), (0.05, "*"))
PLUS_MINUS = "±"
FILES = ("report.json", "report.md", "report.tex", "report.csv")
PICTURE = "gains.png"


# Words --------------------------------------------------------------------------------------------


def label(name: str) -> str:
    """'slot F1, %' of slot_f1; 'BLEU' of bleu, which is not a percentage."""
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
            f"{comparison.seed}; each line by itself, not corrected for multiple comparisons."
        )
    for group, languages in comparison.absent.items():
        found.append(f"{group} is without {', '.join(languages)}: not measured.")
    return [*found, *comparison.signatures, *comparison.notes]


def score_text(score: Score, between: str = f" {PLUS_MINUS} ") -> str:
    """'41.3', or '41.3 ± 0.8' over seeds."""
    return f"{score.mean:.1f}" + ("" if score.std is None else f"{between}{score.std:.1f}")


def signed(value: float) -> str:
    """'+1.2', '-0.3'; '0.0' has no sign."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def _interval(gain: Gain) -> str:
    return f"{signed(gain.low)} to {signed(gain.high)}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"


def tally_text(tally: Tally) -> str:
    """'12-3-40': won, lost, tied."""
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
        if name not in scores[comparison.systems[0]]:  # the measure is missing there
            continue
        yield Line(
            measure, level, name, group,
            {system: scores[system][name] for system in scores},
            {system: gains[system][name] for system in gains},
        )  # fmt: skip


def group_name(comparison: Comparison, group: str) -> str:
    """A group with its number of languages: 'transfer (6)'."""
    return f"{group} ({len(comparison.groups[group])})"


# Files --------------------------------------------------------------------------------------------


def write(
    comparison: Comparison,
    folder: Path,
    title: str,
    pictures: Mapping[str, Callable[[Path], None]] | None = None,
    made_by: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> list[Path]:
    """The files written, each whole or not at all: report.json, report.md, report.tex, report.csv.

    Args:
      comparison: what is reported.
      folder: of the files, and of the list of their checksums.
      title: of the report.
      pictures: name -> what writes that picture to a path.
      made_by: system -> what the answers of each of its runs were made with, where it is known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"title": title, "made_by": dict(made_by or {}), **comparison.as_json()}
    texts = (
        json.dumps(everything, indent=1, ensure_ascii=False) + "\n",
        markdown(comparison, title) + "\n",
        latex(comparison, title) + "\n",
        _csv(comparison),
    )
    found = [folder / name for name in FILES]
    pictures = pictures or {}
    (folder / PICTURE).unlink(missing_ok=True)  # of an earlier comparison
    with summed(folder, [*FILES, *pictures]):
        for path, text in zip(found, texts, strict=True):
            with whole_file(path) as new:
                new.write_bytes(text.encode("utf-8", "backslashreplace"))
        for name, draw in pictures.items():
            with whole_file(folder / name) as new:
                draw(new)
    return [*found, *(folder / name for name in pictures)]


def withdraw(folder: Path) -> None:
    """Removes the report of a folder whose answers are about to change."""
    for name in (SUMS, *FILES, PICTURE):
        (folder / name).unlink(missing_ok=True)


def _csv(comparison: Comparison) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(_csv_rows(comparison))
    return text.getvalue()


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
            row = [f"**mean of {group_name(comparison, line.name)}**" if group else line.name]
            row += ["" if group else line.group, f"{line.scores[comparison.systems[0]].rows}"]
            for system, score in line.scores.items():
                row.append(score_text(score))
                if gain := line.gains.get(system):
                    row += [signed(gain.gain) + mark(gain.p), _interval(gain), _p(gain.p)]
            body.append(row)
        parts += [f"## {label(measure)}", markdown_table(head, body, left=2)]
        if others:
            parts.append(markdown_table(*_tallies(comparison, measure), left=2))
    if any(comparison.counts.values()):
        parts += ["## Counts (mean over seeds)", markdown_table(*count_table(comparison))]
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


def count_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of how many answers were empty, how many parts of them ill-formed, ..."""
    names = dict.fromkeys(name for found in comparison.counts.values() for name in found)
    rows = f"in {sum(comparison.rows.values())} rows"
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
    return "".join("\\" + letter if letter in "\\|*_`<" else letter for letter in visible(text))


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are words, the others numbers."""

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
    return "".join(TEX.get(letter, letter) for letter in visible(text))


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
                cells.append(f"${signed(gain.gain)}{f'^{{{stars}}}' if stars else ''}$")
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
