"""A comparison of methods written down: one line a system, in Markdown, CSV, JSON and LaTeX.

rows = lines(found)                          # [Line(system='sft', ...), ...]
write(found, Path('runs/compare'))           # report.md, report.csv, report.json, report.tex
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.checksums import summed
from jaxalign.evaluate.compare import Comparison
from jaxalign.evaluate.report import (
    FILES,
    PLUS_MINUS,
    label,
    mark,
    markdown_table,
    notes,
    signed,
    tex,
)
from jaxalign.paths import whole_file

TRANSFER = "transfer"  # the group of all languages but those of the first group
PICTURE = "transfer.png"


@dataclass(frozen=True)
class Facts:
    """What one trial says besides its scores."""

    seed: int
    candidate: tuple[str, ...]
    flops: float | None  # at least, of all updates
    seconds: float | None  # of updates alone
    wall_seconds: float | None
    gradient_cosine: float | None
    parameters: int  # trained ones
    layer: int | None  # that was aligned
    layers: dict[str, list[float]]  # score -> [L+1]


@dataclass(frozen=True)
class Found:
    """All that a report needs."""

    title: str
    comparisons: dict[str, Comparison]  # evaluation -> scores, the baseline's first
    facts: dict[str, list[Facts]]  # system -> one for each seed
    chosen: dict[str, dict[str, float]]  # system -> candidate of the grid -> its score
    base: dict[str, list[float]]  # the bare base's layers
    layer: int | None  # which is read of systems that align none
    notes: list[str] = field(default_factory=list)

    def at(self, one: Facts, score: str, where: str) -> float | None:
        """A score of the states at the `middle` layer, or at the `aligned` one."""
        values = one.layers.get(score)
        if not values:
            return None
        layer = one.layer if one.layer is not None else self.layer
        layer = (len(values) - 1) // 2 if where == "middle" or layer is None else layer
        return values[layer]

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Column:
    """A column next to the scores: its head, the number of a trial, and how it is written."""

    head: str
    of: Callable[[Found, Facts], float | None]
    form: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


COLUMNS = (
    Column("found in the middle, raw, %", lambda f, x: f.at(x, "csls", "middle"), _percent),
    Column("standardised, %", lambda f, x: f.at(x, "standardised_csls", "middle"), _percent),
    Column("found at the aligned layer, raw, %", lambda f, x: f.at(x, "csls", "aligned"), _percent),
    Column(
        "standardised there, %", lambda f, x: f.at(x, "standardised_csls", "aligned"), _percent
    ),
    Column("dimensions there", lambda f, x: f.at(x, "dimension", "aligned"), "{:.1f}".format),
    Column("cos of gradients", lambda f, x: x.gradient_cosine, "{:.3f}".format),
    Column("FLOPs", lambda f, x: x.flops, "{:.2e}".format),
    Column("seconds", lambda f, x: x.seconds, "{:,.0f}".format),
    Column("trained parameters", lambda f, x: x.parameters, "{:,.0f}".format),
)  # fmt: skip


def groups_of(groups: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The groups, and `transfer`: all languages of the groups but the first."""
    first, *others = groups.values() or [[]]
    rest = [language for inside in others for language in inside if language not in first]
    if not rest or TRANSFER in groups:
        return dict(groups)
    return {**groups, TRANSFER: list(dict.fromkeys(rest))}


def tables(found: Found) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title -> head and rows: scores by group, with deviation and gain; states and cost."""
    chose = any(x.candidate for many in found.facts.values() for x in many)
    head = ["system", "seeds", *(["chosen"] if chose else [])]
    for name, comparison in found.comparisons.items():
        main = next(iter(comparison.measures))
        where = f"{name}: " if len(found.comparisons) > 1 else ""
        head += [f"{where}{label(main)}: {group}" for group in comparison.groups]
    columns = [
        one
        for one in COLUMNS
        if any(one.of(found, x) is not None for many in found.facts.values() for x in many)
    ]
    scores, costs = [], []
    for system, many in found.facts.items():
        row = [system, str(len(many))]
        if chose:
            row.append(", ".join(_last(word) for word in many[0].candidate))
        for comparison in found.comparisons.values():
            row += _scores(comparison, system)
        scores.append(row)
        costs.append([system, *(_mean(found, many, one) for one in columns)])
    return {
        "scores": (head, scores),
        "states and cost": (["system", *(one.head for one in columns)], costs),
    }


def _last(word: str) -> str:
    """`learning_rate=0.001` of `optim.learning_rate=0.001`."""
    key, _, value = word.partition("=")
    return f"{key.rpartition('.')[2]}={value}"


def _scores(comparison: Comparison, system: str) -> list[str]:
    main = next(iter(comparison.measures.values()))
    cells = []
    for group in comparison.groups:
        score = main.groups[system][group]
        text = f"{score.mean:.1f}"
        if score.std is not None:
            text += f" {PLUS_MINUS} {score.std:.1f}"
        if gain := main.group_gains.get(system, {}).get(group):
            text += f" ({signed(gain.gain)}{mark(gain.p)})"
        cells.append(text)
    return cells


def _mean(found: Found, many: list[Facts], column: Column) -> str:
    values = [value for x in many if (value := column.of(found, x)) is not None]
    return column.form(float(np.mean(values))) if values else "-"


def write(found: Found, folder: Path, draw: Callable[[Found, Path], None] | None) -> list[Path]:
    """The files written, each whole or not at all: report.json, .md, .tex, .csv and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "report.json": json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(found) + "\n",
        "report.tex": latex(found) + "\n",
        "report.csv": _csv(found),
    }
    pictures = [PICTURE] if draw else []
    (folder / PICTURE).unlink(missing_ok=True)  # of an earlier report
    with summed(folder, [*texts, *pictures]):
        for name in FILES:
            with whole_file(folder / name) as new:
                new.write_bytes(texts[name].encode("utf-8", "backslashreplace"))
        if draw:
            with whole_file(folder / PICTURE) as new:
                draw(found, new)
    return [folder / name for name in (*FILES, *pictures)]


def sentences(found: Found) -> list[str]:
    """What a reader of the table needs to know."""
    first = next(iter(found.comparisons.values()))
    lines = [*notes(first), *found.notes]
    if found.chosen:
        lines.append(
            "chosen: by the mean over all languages of the validation rows, with the first seed: "
            + "; ".join(
                f"{system}: " + ", ".join(f"{name} {score:.1f}" for name, score in scores.items())
                for system, scores in found.chosen.items()
            )
        )
    lines.append(
        "found: sentences whose translation is the nearest of all (CSLS), mean over all "
        "directions. dimensions: effective ones, few where states have collapsed. FLOPs: the "
        "least that the updates take. seconds: of updates, without compilation, validation and "
        "saves."
    )
    return lines


def markdown(found: Found) -> str:
    """The report as Markdown."""
    parts = [f"# {found.title}"]
    for head, rows in tables(found).values():
        parts.append(markdown_table(head, rows, left=1))
    return "\n\n".join([*parts, *sentences(found)])


def latex(found: Found) -> str:
    """The report as LaTeX tables; needs booktabs and nothing else."""
    text = r"% \usepackage{booktabs}"
    for title, (head, rows) in tables(found).items():
        caption = tex(f"{found.title}: {title}. {' '.join(sentences(found))}")
        body = [" & ".join(tex(cell) for cell in row) + r" \\" for row in rows]
        lines = [
            r"\begin{table}", r"\centering\small",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule",
            " & ".join(tex(cell) for cell in head) + r" \\", r"\midrule", *body, r"\bottomrule",
            r"\end{tabular}", rf"\caption{{{caption}}}",
            r"\end{table}",
        ]  # fmt: skip
        text += "\n\n" + "\n".join(lines)
    return text


def _csv(found: Found) -> str:
    """Long form: a line for each number of each system and seed."""
    text = io.StringIO(newline="")
    to = csv.writer(text)
    to.writerow(["system", "seed", "evaluation", "measure", "name", "value"])
    for name, comparison in found.comparisons.items():
        for measure, values in comparison.measures.items():
            for level in (values.languages, values.groups):
                for system, scores in level.items():
                    for where, score in scores.items():
                        for one, value in zip(found.facts[system], score.seeds, strict=True):
                            to.writerow([system, one.seed, name, measure, where, value])
    for system, many in found.facts.items():
        for one in many:
            for column in COLUMNS:
                if (number := column.of(found, one)) is not None:
                    to.writerow([system, one.seed, "", "", column.head, number])
    return text.getvalue()
