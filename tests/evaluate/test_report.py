"""The files and tables hold the numbers of the comparison, whatever the names look like."""

import csv
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from jaxalign.evaluate.comparable import System
from jaxalign.evaluate.compare import compare
from jaxalign.evaluate.draw import draw, ordered
from jaxalign.evaluate.measure import Measure, Scored, share
from jaxalign.evaluate.report import by_group, label, latex, mark, markdown, tex, write
from jaxalign.evaluate.show import show

GROUPS = {"super_vised": ["en"], "transfer": ["cy", "sw"]}
NAMES = ("base", "a|b_1 & 50%", "other")


def scored(right: int, rows: int = 40) -> Scored:
    parts = np.stack([np.arange(rows) < right, np.ones(rows)], axis=1).astype(float)
    bleu = Measure("bleu", parts, lambda sums: 30 * sums[..., 0] / sums[..., 1])
    return Scored((Measure("exact_match", parts, share), bleu), (None,) * rows, {"ill_formed": 1})


def comparison(names=NAMES, seeds=2, languages=("sw", "en", "cy", "de-st")):
    """System n gets 10 n more rows right than the baseline's 10; a seed adds 2."""

    def runs(n):
        return [{lang: scored(10 + 10 * n + 2 * s) for lang in languages} for s in range(seeds)]

    systems = [System(name, runs(n)) for n, name in enumerate(names)]
    return compare(systems, GROUPS, draws=200)


FOUND = comparison()


def printed(found, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    show(found, console)
    return console.file.getvalue()


def cells(line):
    """The cells of a Markdown line, as shown."""
    inner = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in inner]


def tables(text):
    """Markdown tables as lists of rows of cells."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(cells(line))
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_labels():
    assert label("slot_f1") == "slot F1, %"
    assert label("bleu") == "BLEU"
    assert label("intent_accuracy") == "intent accuracy, %"
    assert (mark(0.009), mark(0.01), mark(0.049), mark(0.05)) == ("**", "*", "*", "")


def test_languages_stand_once_in_the_order_of_the_groups():
    shown = {"super_vised": ["en"], "transfer": ["cy", "sw"], "other": ["de-st"]}
    assert by_group(FOUND) == shown
    assert by_group(comparison(languages=("de", "nl"))) == {"all": ["de", "nl"]}


def test_markdown_tables_parse():
    text = markdown(FOUND, "Slots | 4_languages")
    assert text.startswith("# Slots \\| 4\\_languages\n")
    main, tallies, bleu, _, counts = tables(text)
    for table in (main, tallies, bleu, counts):
        assert {len(row) for row in table} == {len(table[0])}
    assert main[0][3:8] == ["base", "a|b_1 & 50%", "gain", "95 %", "p"]
    english = main[2]
    assert english[:5] == ["en", "super_vised", "40", "27.5 ± 3.5", "52.5 ± 3.5"]
    assert english[5] == "+25.0**"
    assert [row[0] for row in main[2:6]] == ["en", "cy", "sw", "de-st"]
    assert main[-1][0] == "**mean of all (4)**"
    assert tallies[2] == ["a|b_1 & 50%", "languages", "4", "0", "0", "0.125"]
    assert tallies[3][:5] == ["a|b_1 & 50%", "rows", "48", "0", "112"]
    # Parts of answers, not rows of the data.
    assert "## Counts (mean over seeds)" in text and counts[0][0] == "in 160 rows"
    assert counts[2] == ["ill formed", "4", "4", "4"]
    assert bleu[2][3] == "8.2 ± 1.1"
    assert "macro means" in text
    assert "200 draws" in text


def test_latex_escapes():
    assert tex(r"a_b & 5% $x$ #1 {y} ~ ^ \ <>|") == (
        r"a\_b \& 5\% \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{} "
        r"\textless{}\textgreater{}\textbar{}"
    )


def test_latex_tables_are_whole():
    text = latex(FOUND, "Slots & more")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"a\textbar{}b\_1 \& 50\%" in text
    assert r"Slots \& more" in text
    columns = len(re.search(r"\{(lr+)\}", text).group(1))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 2 * (1 + 4 + 4)
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns} == {6}
    english = next(row for row in rows if row.startswith("en "))
    assert english == (
        r"en & 27.5 $\pm$ 3.5 & 52.5 $\pm$ 3.5 & $+25.0^{**}$ & \textbf{77.5} $\pm$ 3.5 & "
        r"$+50.0^{**}$ \\"
    )
    bare = re.sub(r"\\[&%$#_{}\\]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "%" not in bare.split("\n", 1)[1]


def test_files_hold_every_number(tmp_path):
    paths = write(FOUND, tmp_path / "new" / "folder", "Title")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.tex", "report.csv"]
    found = json.loads(paths[0].read_text("utf-8"))
    assert found["title"] == "Title"
    gain = FOUND.measures["bleu"].group_gains["other"]["transfer"]
    assert found["measures"]["bleu"]["group_gains"]["other"]["transfer"]["low"] == gain.low
    with paths[3].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (4 + 4) * 3  # measures, languages and groups, systems
    row = next(
        row
        for row in rows
        if (row["measure"], row["level"], row["name"], row["system"])
        == ("bleu", "group", "transfer", "other")
    )
    numbers = [float(row[key]) for key in ("gain", "low", "high", "p")]
    assert numbers == [gain.gain, gain.low, gain.high, gain.p]
    assert (row["seeds"], row["rows"], row["language_wins"]) == ("2", "80", "2")
    assert row["row_wins"] == ""
    exact = next(row for row in rows if row["name"] == "cy" and row["system"] == "other")
    assert (exact["measure"], exact["row_wins"], exact["row_losses"]) == ("exact_match", "22", "0")
    base = next(row for row in rows if row["system"] == "base")
    assert base["gain"] == base["p"] == ""
    assert not any(None in row or None in row.values() for row in rows)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_cuts_nothing(width):
    names = ("fine-tuned", "fine-tuned + aligned", "llama3_8b_slots_align_layer16", "d", "e")
    text = printed(comparison(names), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    english = [line.split() for line in text.splitlines() if line.split()[:1] == ["en"]]
    # Whole numbers of every system, the baseline again in each table.
    assert {line[1] for line in english} == {"27.5±3.5"}
    assert [cell for line in english for cell in line[2:]] == [
        "52.5±3.5", "+25.0**", "77.5±3.5", "+50.0**",
        "100.0±0.0", "+72.5**", "100.0±0.0", "+72.5**",
    ]  # fmt: skip
    for word in ("transfer (2)", "won-lost-tied", "4-0-0", "BLEU", "ill formed", "** p < 0.01"):
        assert word in text


def test_the_terminal_shows_a_single_system():
    text = printed(comparison(("alone",), seeds=1), 80)
    assert re.search(r"^ +en +25\.0 *$", text, re.M)
    assert "gain" not in text.lower()
    assert "±" not in text


def test_names_are_not_markup():
    assert "[red]x" in printed(comparison(("[red]x",)), 80)


def test_the_poorest_languages_come_first():
    assert ordered(comparison(languages=("en", "nl", "da", "sw", "cy", "de-st"))) == [
        "de-st", "cy", "sw", "da", "nl", "en",
    ]  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a comparison and returns the figure, which was saved as a PNG."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw_it(found):
        draw(found, tmp_path / "gain.png")
        assert (tmp_path / "gain.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        return saved[-1]

    return draw_it


def test_the_picture_has_a_panel_for_each_system(drawn):
    panels = [axes for axes in drawn(comparison(tuple("abcdefg"))).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == list("bcdefg")


def test_the_picture_shows_gains_intervals_and_significance(drawn):
    figure = drawn(FOUND)
    axes = figure.axes[0]
    words = [tick.get_text() for tick in axes.get_yticklabels()]
    assert words == ["de-st", "Welsh cy", "Swahili sw", "English en", "mean of transfer",
                     "mean of all"]  # fmt: skip
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([25] * 4)
    gain = FOUND.measures["exact_match"].language_gains[NAMES[1]]["cy"]
    line = next(line for line in axes.lines if list(line.get_ydata()) == [1, 1])
    assert list(line.get_xdata()) == [gain.low, gain.high]
    assert "percentage points" in figure.get_supxlabel()
    same = drawn(compare([System(name, [{"en": scored(9)}]) for name in "ab"], {}, draws=9)).axes[0]
    marker = next(line for line in same.lines if line.get_marker() == "o")
    assert marker.get_markerfacecolor() == "white"
    marker = next(line for line in axes.lines if line.get_marker() == "o")
    assert marker.get_markerfacecolor() != "white"


def test_the_picture_of_a_single_system_shows_its_scores(drawn):
    axes = drawn(comparison(("alone",))).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([27.5] * 4)
