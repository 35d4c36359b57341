"""Task scores meet the alignment of the same system and language, and nothing else."""

import csv
import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from jaxalign.errors import UserError
from jaxalign.evaluate.comparable import System
from jaxalign.evaluate.compare import compare
from jaxalign.evaluate.measure import Measure, Scored, share
from jaxalign.evaluate.report import write as write_evaluation
from jaxalign.probe.page import page
from jaxalign.probe.reading import groups_of
from jaxalign.probe.report import show, write
from jaxalign.probe.tasks import Names, read_scores, relations, sentence
from tests.probe.tables import invented, small

SCORES = {"de": 60.0, "cy": 12.5, "sw": 20.0, "en": 90.0, "tlh": 5.0}


def stored(tmp_path, content):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_each_layer_is_correlated_over_the_languages_that_both_have(tmp_path):
    table = invented()
    (relation,) = relations(table, read_scores(stored(tmp_path, {"aligned": SCORES}), table))
    assert (relation.system, relation.measure) == ("aligned", "score")
    assert relation.languages == ("cy", "de", "sw") and relation.score == (12.5, 60.0, 20.0)
    pivot = table.languages.index("en")
    for layer in (0, 16, 32):
        values = table.pairs["margin"][1, 0, layer]
        both = [
            (values[pivot, g] + values[g, pivot]) / 2
            for g in map(table.languages.index, relation.languages)
        ]
        np.testing.assert_allclose(relation.alignment[layer], both, rtol=1e-12)
        found = relation.by_layer[layer]
        assert found.pearson == pytest.approx(stats.pearsonr(both, relation.score)[0], abs=1e-12)
        assert found.spearman == pytest.approx(stats.spearmanr(both, relation.score)[0], abs=1e-12)
        assert found.number == 3


def test_codes_of_another_standard_and_systems_by_name(tmp_path):
    table = invented()
    flores = {"deu_Latn": 60, "cym_Latn": 12.5, "swh_Latn": 20}
    found = read_scores(stored(tmp_path, {"base": flores, "elsewhere": flores}), table)
    assert found == {"base": {"score": {"cy": 12.5, "de": 60.0, "sw": 20.0}}}


def test_scores_of_varieties_and_directions_are_not_those_of_a_language(tmp_path):
    table = Names(("base",), ("da", "de", "en", "it", "zh"), "en")
    own = {"da": 50.0, "de": 60.0, "it": 40.0, "zh": 30.0}
    others = {"de-st": 9.0, "de-it": 7.0, "it-en": 1.0, "zh-TW": 5.0}
    for content in (own | others, others | own):
        assert read_scores(stored(tmp_path, content), table) == {"base": {"score": own}}
    with pytest.raises(UserError, match=r"of these only 0 were probed"):
        read_scores(stored(tmp_path, {"de-en": 1.0, "it-en": 2.0, "da-en": 3.0}), table)
    two = {"da": 50.0, "de": 60.0, "it": 40.0, "zh-TW": 5.0, "zho_Hans": 6.0}
    with pytest.raises(UserError, match=r"scores of zh-TW and of zho_Hans, but only zh was probed"):
        read_scores(stored(tmp_path, two), table)


def test_the_report_of_an_evaluation(tmp_path):
    def scored(right):
        parts = np.stack([np.arange(40) < right, np.ones(40)], axis=1).astype(float)
        return Scored((Measure("exact_match", parts, share),), (None,) * 40, {})

    def run(more):
        return [{lang: scored(n + more) for lang, n in (("de", 20), ("cy", 4), ("sw", 9))}]

    report = compare([System("base", run(0)), System("aligned", run(5))], {})
    write_evaluation(report, tmp_path, "title")
    found = read_scores(str(tmp_path / "report.json"), invented())
    assert found["base"]["exact_match"] == {"cy": 10.0, "de": 50.0, "sw": 22.5}
    assert found["aligned"]["exact_match"] == {"cy": 22.5, "de": 62.5, "sw": 35.0}


def test_page_terminal_and_files_say_the_same(tmp_path):
    table = invented()
    related = relations(table, read_scores(stored(tmp_path, {"base": SCORES}), table))
    written = {path.name for path in write(table, tmp_path / "report", related=related)}
    assert {"correlations.csv", "tasks.png"} <= written
    with (tmp_path / "report" / "correlations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["layer"]) for row in rows] == list(range(33))
    assert float(rows[16]["pearson"]) == pytest.approx(related[0].by_layer[16].pearson, rel=1e-5)
    console = Console(width=200, record=True, file=(tmp_path / "terminal").open("w"))
    show(table, console, related)
    words = sentence(related[0], 15)
    assert "base: score and retrieval with the pivot at layer" in console.export_text()
    assert f"Pearson {related[0].by_layer[15].pearson:.2f}" in words and "3 languages" in words
    html = page(table, groups_of(table), related)
    assert "Task scores" in html and "Task scores" not in page(table, groups_of(table))


def test_scores_that_do_not_vary_have_no_correlation(tmp_path):
    table = invented()
    content = {"aligned": {"de": 50, "cy": 50, "sw": 50}}
    (relation,) = relations(table, read_scores(stored(tmp_path, content), table))
    assert relation.by_layer[3].pearson is None
    assert "does not vary" in sentence(relation, 3)
    write(table, tmp_path / "report", related=[relation])


@pytest.mark.parametrize(
    "content, words",
    [
        ({"other": SCORES}, "scores of other, .*base, aligned"),
        ({"base": {"de": 1, "cy": 2, "tlh": 3, "en": 4}}, "only 2 .*'en'"),
        ({"de": "high", "cy": 2, "sw": 3}, "json: 'high'"),
        ({"de": True, "cy": 2, "sw": 3}, "json: True"),
    ],
)
def test_scores_that_do_not_fit(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        read_scores(stored(tmp_path, content), invented())


def test_scores_say_whose_they_are_where_several_systems_are_probed(tmp_path):
    file = stored(tmp_path, SCORES)
    says = r"which system .* base, aligned; write \{\"aligned\": \{\"de\": 61.2, ...\}\}, or give"
    with pytest.raises(UserError, match=says):
        read_scores(file, invented())
    only = Names(("base",), ("cy", "de", "en", "sw"), "en")
    assert read_scores(file, only) == {"base": {"score": {"cy": 12.5, "de": 60.0, "sw": 20.0}}}


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_scores(str(tmp_path / "none.json"), small())
