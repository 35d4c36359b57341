"""A probe's report: page, JSON, CSV and pictures say what the table says."""

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from jaxalign.data.languages import resource_class
from jaxalign.errors import UserError
from jaxalign.probe.page import page, unpack
from jaxalign.probe.reading import curve_of, groups_of, lines_of, order_of, percent, points
from jaxalign.probe.report import show, write
from jaxalign.probe.run import choose_layer
from jaxalign.probe.table import PIVOTED, SCORES, keyed
from tests.probe.tables import bilingual, in_forms, invented, small

VOID = {"meta", "link", "input", "br", "hr", "img"}
TABLES = {"small": small, "bilingual": bilingual, "many": invented, "forms": in_forms}


class Reader(HTMLParser):
    """Elements that are open, every attribute, the words, and the texts of scripts."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.words, self.scripts = [], [], [], []
        self.ids = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.words).append(data)


def read(table, groups=None):
    text = page(table, groups_of(table, groups))
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    assert len(set(reader.ids)) == len(reader.ids)
    return text, reader


def data_of(reader):
    return json.loads(reader.scripts[0])


@pytest.mark.parametrize("name", TABLES)
def test_page_is_whole_and_alone(name):
    text, reader = read(TABLES[name]())
    loads = [
        (tag, attribute, value)
        for tag, attribute, value in reader.attributes
        if attribute in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert loads == [("link", "href", "data:,")]
    # The one address is a name: SVG's elements have it, and nothing is fetched from there.
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|import\(", text)
    assert "default-src 'none'" in text
    # What the script looks for is there.
    asked = set(re.findall(r"\$\(\"([\w-]+)\"\)", text))
    assert asked
    assert asked <= set(reader.ids)
    assert not re.search(r"\$(title|data|summary|languages)\b", text)


@pytest.mark.parametrize("name", TABLES)
def test_page_holds_the_numbers(name):
    table = TABLES[name]()
    text, reader = read(table)
    data = data_of(reader)
    assert data["pairs"].keys() == table.pairs.keys()
    assert list(data["forms"]) == list(table.forms)
    for score, values in table.pairs.items():
        found = unpack(data["pairs"][score], values.shape)
        np.testing.assert_allclose(found, values, atol=0.0005001)
    for kind, names in (("pivoted", PIVOTED), ("health", table.health)):
        for one in names:
            found = np.array(data[kind][one], float)
            np.testing.assert_allclose(found, getattr(table, kind)[one], rtol=1e-3, atol=0.0005001)
    assert data["chosen"] == choose_layer(table).layer
    assert sorted(data["order"]) == list(range(len(table.languages)))
    assert data["codes"] == list(table.languages)
    assert len(text) < 3e6


def test_page_of_many_says_what_is_weak():
    table = invented()
    _, reader = read(table)
    layer, words = choose_layer(table).layer, "".join(reader.words)
    lines = lines_of(table, layer)
    accuracy = [line.accuracy["aligned"] for line in lines]
    assert accuracy == sorted(accuracy)
    assert f"is {layer} of 32" in words
    best = percent(table.curve("margin", 0, 0)[layer])
    assert best in words
    for line in lines[:3]:
        assert f"{line.name} ({percent(line.accuracy['aligned'])})" in words


def test_names_are_escaped():
    evil = '</script><b x="&">'
    table = dataclasses.replace(
        small(),
        model=evil,
        corpus=evil,
        systems=(evil,),
        warnings={evil: [evil]},
        notes=(evil,),
        languages=("<i>", "de", "en"),
        sentences={"<i>": 3, "de": 3, "en": 3},
    )
    text, reader = read(table, {evil: ("<i>",)})
    assert data_of(reader)["systems"] == [evil]
    assert list(data_of(reader)["groups"]) == ["all", evil]
    assert evil not in text
    assert "<i>" not in "".join(re.findall(r"<table.*?</table>", text, re.S))
    assert not [value for tag, _, value in reader.attributes if tag == "b"]
    assert "".join(reader.words).count(evil) >= 5


def test_what_was_not_measured_stays_blank():
    table = bilingual()
    _, reader = read(table)
    assert "nan" not in "".join(reader.words).lower()
    assert "NaN" not in reader.scripts[0]
    lines = {line.language: line for line in lines_of(table, 3)}
    assert np.isnan(lines["qq"].accuracy["base"])
    assert lines["qq"].best is None
    assert [line.language for line in lines_of(table, 3)][-2:] == ["qq", "sw"]
    assert percent(np.nan) == points(np.nan) == "\u2013"


# Readings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_a_group_s_curve_is_the_mean_of_its_languages(score):
    table = invented()
    by = np.stack([table.by_language(score, 1, 1, layer) for layer in range(table.layers + 1)])
    low = tuple(n for n in table.languages if (resource_class(n) or 9) <= 2)
    for languages in (table.languages, low, ("cy",)):
        inside = [table.languages.index(name) for name in languages]
        expected = by[:, inside].mean(axis=1)
        np.testing.assert_allclose(curve_of(table, score, 1, 1, languages), expected)
    np.testing.assert_allclose(curve_of(table, score, 1, 1), by.mean(axis=1))


def test_lines_are_the_tables():
    table = invented()
    by = table.by_language("margin", 1, 0, 9)
    for line in lines_of(table, 9):
        place = table.languages.index(line.language)
        assert line.accuracy["aligned"] == pytest.approx(by[place])
        assert line.gain == pytest.approx(by[place] - table.by_language("margin", 0, 0, 9)[place])
        courses = [table.by_language("margin", 1, 0, layer)[place] for layer in range(33)]
        assert line.best == np.argmax(courses)
        assert line.resource == resource_class(line.language)


def test_groups_by_default():
    found = groups_of(invented())
    assert list(found) == ["all", "low-resource", "high-resource"]
    assert {"cy", "sw"} <= set(found["low-resource"])
    assert "de" in found["high-resource"]
    assert "en" not in found["high-resource"]  # the pivot
    alike = dataclasses.replace(small(), languages=("de", "fr", "en"))
    assert list(groups_of(alike)) == ["all"]


@pytest.mark.parametrize(
    ("names", "words"), [(["xx"], "'xx'"), (["en"], "no language"), ([], "no")]
)
def test_groups_of_strangers(names, words):
    with pytest.raises(UserError, match=words):
        groups_of(small(), {"mine": names})


def test_order_puts_alike_languages_together():
    strength = np.array([0.9, 0.1, 0.88, 0.12, 0.92, 0.11])
    table = invented(("base",), ("mean",), 3, ["cy", "de", "en", "fr", "sw", "zu"])
    table.pairs["margin"][0, 0, 2] = np.where(np.eye(6, dtype=bool), np.nan, strength[:, None] / 1)
    table.pairs["margin"][0, 0, 2] *= np.where(np.eye(6, dtype=bool), np.nan, strength[None])
    order = order_of(table, 0, 2)
    assert {*order[:3]} in ({0, 2, 4}, {1, 3, 5})


# Files ------------------------------------------------------------------------------------------


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["small", "bilingual", "forms"])
@pytest.mark.filterwarnings("error")
def test_files(tmp_path, name):
    table = TABLES[name]()
    found = write(table, tmp_path / "new" / "report")
    assert all(path.is_file() for path in found)
    names = {path.name for path in found}
    several = {"heatmap-aligned.png", "difference.png"} if name != "small" else set()
    several |= {"states.png"} if name == "forms" else set()
    assert names == several | {
        "report.html", "report.json", "pairs.csv", "languages.csv", "curves.png", "health.png",
        "heatmap-base.png",
    }  # fmt: skip
    for path in found:
        if path.suffix == ".png":
            picture = imread(path)[..., :3]
            assert min(picture.shape[:2]) > 300
            assert picture.std() > 0.02

    folder = tmp_path / "new" / "report"
    saved = json.loads((folder / "report.json").read_text("utf-8"))
    np.testing.assert_allclose(
        np.array(saved["pairs"]["csls"], float), table.pairs["csls"], atol=1e-6
    )

    scores = list(table.pairs)
    again = {score: np.full(table.pairs[score].shape, np.nan) for score in scores}
    rows = rows_of(folder / "pairs.csv")
    for row in rows:
        place = (
            table.systems.index(row["system"]), table.poolings.index(row["pooling"]),
            int(row["layer"]), table.languages.index(row["source"]),
            table.languages.index(row["target"]),
        )  # fmt: skip
        for score in scores:
            again[score][place] = float(row[score])
    for score in scores:
        np.testing.assert_allclose(again[score], table.pairs[score], rtol=1e-5, atol=1e-6)
    assert len(rows) == (~np.isnan(table.pairs["margin"])).sum()

    layer = choose_layer(table).layer
    for row, line in zip(rows_of(folder / "languages.csv"), lines_of(table, layer), strict=True):
        assert row["language"] == line.language
        for system, value in line.accuracy.items():
            cell = row[f"accuracy {system}"]
            assert cell == "" if np.isnan(value) else float(cell) == pytest.approx(value, rel=1e-5)


def test_system_names_become_file_names(tmp_path):
    table = dataclasses.replace(small(), systems=("runs/a b",), warnings={})
    assert "heatmap-runs_a_b.png" in {path.name for path in write(table, tmp_path)}


def test_heatmaps_show_the_numbers(tmp_path):
    from jaxalign.probe.draw import heatmap

    table = small()
    dark, light = dataclasses.replace(table), dataclasses.replace(table, pairs=dict(table.pairs))
    there = np.where(np.isnan(table.pairs["margin"]), np.nan, 1.0)
    dark.pairs["margin"], light.pairs["margin"] = 0.05 * there, 0.95 * there
    for one, name in ((dark, "dark"), (light, "light")):
        heatmap(one, tmp_path / f"{name}.png", 0, 2)
    first, second = (imread(tmp_path / f"{name}.png")[..., :3] for name in ("dark", "light"))
    # Six of nine cells turn from the map's blue to its yellow.
    share = (np.abs(first - second).max(axis=-1) > 0.5).mean()
    assert 0.1 < share < 0.5


def test_a_picture_of_a_difference_needs_two(tmp_path):
    from jaxalign.probe.draw import difference

    with pytest.raises(UserError, match="two systems"):
        difference(small(), tmp_path / "difference.png", 2)


# Terminal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "systems", [("base",), ("base", "aligned"), ("base", "b", "c", "d", "e", "f")]
)
def test_show_fits_80_columns(systems):
    table = invented(systems, ("mean",))
    console = Console(width=80, record=True, file=io.StringIO())
    show(table, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    layer = choose_layer(table).layer
    assert re.search(rf"> {layer} +\d+%", text)
    curve = table.curve("margin", 0, 0)
    assert re.search(rf"> {layer} .*\b{100 * curve[layer]:.1f}\b", text)
    weakest = lines_of(table, layer)
    assert all(f" {line.language} " in text for line in weakest[:10])
    assert f"{weakest[0].name} " in text
    assert "! base: layer 0, cy" in text


def test_the_best_block_by_each_form_of_the_states_is_everywhere(tmp_path):
    table = in_forms()
    console = Console(width=80, record=True, file=io.StringIO())
    show(table, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    write(table, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text("utf-8"))["best"]
    page_text = " ".join((tmp_path / "report.html").read_text("utf-8").split())
    for s, system in enumerate(table.systems):
        for form in table.forms:
            for score in SCORES:
                curve = curve_of(table, keyed(score, form), s, 0)
                best = 1 + int(np.argmax(curve[1:]))
                found = saved[system]["mean"][form][score]
                assert found == {"layer": best, "value": pytest.approx(curve[best], abs=1e-6)}
                assert f"{best}: {100 * curve[best]:.1f}" in text
                share = percent(curve[best]).replace("\u00a0", " ")
                assert f"<td>block {best}: {share}</td>" in page_text
    words = " ".join(text.split())
    best = saved["base"]["mean"]["standardised"]["margin"]
    assert f"standardised states the best block is {best['layer']}" in words
    assert "in 4 of 6 blocks" in words
    assert "align.states=standardised" in words
    quiet = dataclasses.replace(table, health={**table.health, "largest": table.health["norm"] * 0})
    assert "of 6 blocks" not in " ".join(page(quiet, groups_of(quiet)).split())


def test_a_picture_of_forms_needs_two(tmp_path):
    from jaxalign.probe.draw import forms

    with pytest.raises(UserError, match="raw ones only"):
        forms(small(), tmp_path / "states.png")


def test_show_shortens_warnings():
    table = dataclasses.replace(small(), warnings={"base": [f"layer {n}" for n in range(9)]})
    console = Console(width=80, record=True, file=io.StringIO())
    show(table, console)
    assert "and 4 more" in console.export_text()
