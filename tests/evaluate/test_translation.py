"""Translation scores: sacreBLEU's own numbers, from Python and from its command; COMET's wiring."""

import io
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import sacrebleu
from rich.console import Console

from jaxalign.data.sources import Record
from jaxalign.data.tasks import render
from jaxalign.errors import UserError
from jaxalign.evaluate import comet as our_comet
from jaxalign.evaluate import translation
from jaxalign.evaluate.comparable import System
from jaxalign.evaluate.compare import compare
from jaxalign.evaluate.measure import Gold
from jaxalign.evaluate.report import write
from jaxalign.evaluate.scorers import rehearse
from jaxalign.evaluate.show import show
from jaxalign.evaluate.translation import score_translation, target_language

REFERENCES = [
    "The cat sat on the mat, didn't it?",
    "We shall meet again at nine o'clock tomorrow.",
    "No.",
    "Ich weiß nicht, was soll es bedeuten.",
]
ANSWERS = [
    "The cat sat on a mat, did it not?",
    "We will meet at nine o'clock\ntomorrow. ",
    "",
    "Ich weiß nicht, was es bedeuten soll.",
]
CHINESE = ["我们明天九点见面。", "这只猫坐在垫子上。"]


def golds_of(references, target="en"):
    rows = [
        {"src": f"source {n}", "tgt": text, "src_lang": "xx", "tgt_lang": target}
        for n, text in enumerate(references)
    ]
    examples = [render("translation", Record(row, "data.jsonl:1")) for row in rows]
    return [
        Gold(example, row, str(n), example.language)
        for n, (example, row) in enumerate(zip(examples, rows, strict=True))
    ]


def flat(texts):
    return [" ".join(text.splitlines()).strip() for text in texts]


def test_the_same_as_sacrebleu():
    found = score_translation(golds_of(REFERENCES), ANSWERS)
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    assert found["bleu"].value == bleu.corpus_score(flat(ANSWERS), [REFERENCES]).score
    assert found["chrf"].value == chrf.corpus_score(flat(ANSWERS), [REFERENCES]).score
    assert 10 < found["bleu"].value < found["chrf"].value < 90
    assert found.details["bleu_signature"] == str(bleu.get_signature())
    assert found.details["chrf_signature"] == str(chrf.get_signature())
    assert found.counts == {"empty": 1}
    assert [measure.name for measure in found.measures] == ["bleu", "chrf"]
    assert json.dumps(found.read)


def test_a_resample_is_the_score_of_those_rows():
    found = score_translation(golds_of(REFERENCES), ANSWERS)
    picks = np.array([[0, 0, 1, 3], [3, 1, 1, 1], [2, 2, 2, 2]])
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        scores = found[name].formula(found[name].parts[picks].sum(axis=1))
        for line, score in zip(picks, scores, strict=True):
            said, wanted = [flat(ANSWERS)[i] for i in line], [REFERENCES[i] for i in line]
            assert score == metric.corpus_score(said, [wanted]).score


@pytest.mark.parametrize("target, tokenizer", [("en", "13a"), ("zh-TW", "zh"), ("cs", "13a")])
def test_the_same_as_the_command(tmp_path, target, tokenizer):
    references, answers = REFERENCES + CHINESE, [*ANSWERS, "我们九点见面。", "猫坐在垫子上。"]
    (tmp_path / "ref").write_text("".join(f"{text}\n" for text in references), "utf-8")
    (tmp_path / "out").write_text("".join(f"{text}\n" for text in flat(answers)), "utf-8")
    words = ["ref", "-i", "out", "-m", "bleu", "chrf", "-w", "10", "-tok", tokenizer]
    done = subprocess.run(
        [sys.executable, "-m", "sacrebleu", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = {score["name"]: score for score in json.loads(done.stdout)}
    found = score_translation(golds_of(references, target), answers)
    assert round(found["bleu"].value, 10) == said["BLEU"]["score"]
    assert round(found["chrf"].value, 10) == said["chrF2"]["score"]
    assert found.details["bleu_signature"] == said["BLEU"]["signature"]
    assert found.details["chrf_signature"] == said["chrF2"]["signature"]


@pytest.mark.parametrize(
    "language, fields, wanted",
    [
        ("de-en", {}, "en"),
        ("en-zh-TW", {}, "zh"),
        ("de-st-en", {}, "en"),
        ("en-ja", {"tgt_lang": "ja_JP"}, "ja"),
        ("qq", {}, ""),
    ],
)
def test_target_language(language, fields, wanted):
    assert target_language(Gold(None, fields, "0", language)) == wanted


@pytest.mark.parametrize("row, wanted", [
    ({"translation": {"en": "a", "zho_Hans": "b"}}, "zh"),
    ({"src": "a", "tgt": "b", "src_lang": "ja", "tgt_lang": "por_Latn"}, "pt"),
])  # fmt: skip
def test_target_language_of_the_row_s_own_sides(row, wanted):
    example = render("translation", Record(row, "data.jsonl:1"))
    assert target_language(Gold(example, row, "0", example.language)) == wanted


@pytest.mark.parametrize("code", ["zh", "zho", "zho_Hans", "cmn", "cmn_Hant", "zh-CN", "ZH", "yue"])
def test_chinese_by_any_code_is_compared_as_chinese(code):
    found = score_translation(golds_of(CHINESE, code), ["我们明天九点见。", CHINESE[1]])
    assert "tok:zh" in found.details["bleu_signature"]
    assert found["bleu"].value > 70  # by words, as if blanks were between them, it is 0
    assert "tokenizer_note" not in found.details


@pytest.mark.parametrize("code, wanted", [("jpn_Jpan", "ja-mecab"), ("jpn", "ja-mecab"),
                                          ("kor_Hang", "ko-mecab")])  # fmt: skip
def test_japanese_and_korean_by_any_code(monkeypatch, code, wanted):
    asked = []
    real = sacrebleu.BLEU.__init__

    def notes(self, *args, tokenize=None, **kwargs):
        asked.append(tokenize)
        real(self, *args, tokenize="char", **kwargs)

    monkeypatch.setattr(sacrebleu.BLEU, "__init__", notes)
    score_translation(golds_of(CHINESE, code), CHINESE)
    assert asked == [wanted]


@pytest.mark.parametrize("code, texts", [("th", ["สวัสดีชาวโลก ยินดีต้อนรับ"]), ("Chinese", CHINESE)])
def test_words_that_no_blank_separates_are_noted(code, texts):
    found = score_translation(golds_of(texts, code), texts)
    assert "evaluate.options.tokenize" in found.details["tokenizer_note"]
    assert "tokenizer_note" not in score_translation(
        golds_of(texts, code), texts, tokenize="char"
    ).details  # fmt: skip


@pytest.mark.parametrize("language, tokenizer", [("ja", "ja-mecab"), ("ko", "ko-mecab")])
def test_without_mecab_characters_are_compared_and_it_is_said(monkeypatch, language, tokenizer):
    real = sacrebleu.BLEU.__init__

    def bare(self, *args, tokenize=None, **kwargs):
        if tokenize == tokenizer:
            raise RuntimeError("\n  pip install it\n")
        real(self, *args, tokenize=tokenize, **kwargs)

    monkeypatch.setattr(sacrebleu.BLEU, "__init__", bare)
    golds = golds_of(CHINESE, language)
    found = score_translation(golds, CHINESE)
    assert found["bleu"].value == pytest.approx(100)
    assert "tok:char" in found.details["bleu_signature"]
    assert tokenizer in found.details["tokenizer_note"]
    assert "jaxalign[mecab]" in found.details["tokenizer_note"]
    with pytest.raises(UserError, match=rf"{tokenizer} is not installed \(pip install it\)"):
        score_translation(golds, CHINESE, tokenize=tokenizer)


def test_tokenizer_of_ones_own():
    found = score_translation(golds_of(CHINESE, "zh"), CHINESE, tokenize="char")
    assert "tok:char" in found.details["bleu_signature"]
    assert "tokenizer_note" not in found.details
    with pytest.raises(UserError, match=r"no tokenizer '13b'; sacreBLEU has .*13a"):
        score_translation(golds_of(CHINESE), CHINESE, tokenize="13b")


@pytest.mark.parametrize("answer", ["", " ", "\n\n", "\x00", "\u2028a\x85b", "a " * 3000, "!!!"])
def test_strange_answers_are_judged_too(answer):
    found = score_translation(golds_of(REFERENCES[:2]), [REFERENCES[0], answer])
    assert all(0 <= measure.value <= 100 for measure in found.measures)
    assert len(found["bleu"].parts) == 2


def fake_comet(monkeypatch, **more):
    """A module with COMET's interface whose scores tell what it was given."""
    calls = SimpleNamespace(paths=[], samples=[], gpus=[])

    class Model:
        def predict(self, samples, batch_size=16, gpus=1, progress_bar=True):
            calls.samples.append(samples)
            calls.gpus.append(gpus)
            scores = [0.5 + 0.1 * (one["mt"] == one["ref"]) for one in samples]
            return SimpleNamespace(scores=scores, system_score=sum(scores) / len(scores))

    def load(path):
        calls.paths.append(str(path))
        return Model()

    module = ModuleType("comet")
    module.download_model = lambda name: f"/hub/{name}/model.ckpt"
    module.load_from_checkpoint = load
    for name, value in more.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "comet", module)
    return calls


def test_comet_by_its_package(monkeypatch, tmp_path):
    calls = fake_comet(monkeypatch)
    golds = golds_of(REFERENCES)
    answers = [REFERENCES[0], *ANSWERS[1:]]
    found = score_translation(golds, answers, comet="Unbabel/wmt22-comet-da", comet_gpus=1)
    assert found["comet"].value == pytest.approx(52.5)
    picked = found["comet"].parts[[0, 0, 0, 1]].sum(axis=0)
    assert found["comet"].formula(picked) == pytest.approx(57.5)
    assert found.measures[0].name == "bleu"
    assert found.details["comet_model"] == "Unbabel/wmt22-comet-da"
    assert calls.paths == ["/hub/Unbabel/wmt22-comet-da/model.ckpt"] and calls.gpus == [1]
    assert calls.samples[0][1] == {
        "src": "source 1",
        "mt": "We will meet at nine o'clock tomorrow.",
        "ref": REFERENCES[1],
    }
    local = tmp_path / "model.ckpt"
    local.touch()
    score_translation(golds, answers, comet=str(local))
    assert calls.paths[1] == str(local) and calls.gpus[1] == 0


def test_comet_that_cannot_be_loaded(monkeypatch):
    def download(name):
        raise KeyError(f"Model '{name}' not supported by COMET.")

    fake_comet(monkeypatch, download_model=download)
    with pytest.raises(UserError, match=r"COMET cannot load 'x/y' .*not supported"):
        score_translation(golds_of(REFERENCES), ANSWERS, comet="x/y")


def test_fidelity_is_of_rows_whose_reference_is_recognised(monkeypatch):
    said = {**dict.fromkeys(REFERENCES[:3], ("en", 1.0)), REFERENCES[3]: ("de", 1.0)}
    detect = lambda text: said.get(text, ("de" if "nicht" in text else "en", 0.5))  # noqa: E731
    monkeypatch.setitem(sys.modules, "py3langid", SimpleNamespace(classify=detect))
    answers = [ANSWERS[0], "Das weiß ich nicht.", "", ANSWERS[3]]
    found = score_translation(golds_of(REFERENCES), answers, fidelity=True)
    # The second answer is German and the third empty; the fourth reference is not English.
    assert found["fidelity"].parts.tolist() == [[1, 1], [0, 1], [0, 1], [0, 0]]
    assert found["fidelity"].value == pytest.approx(100 / 3)
    german = score_translation(golds_of(REFERENCES[3:], "deu_Latn"), answers[3:], fidelity=True)
    assert german["fidelity"].value == 100
    assert "fidelity" not in [
        one.name for one in score_translation(golds_of(CHINESE), CHINESE).measures
    ]


def test_fidelity_is_missing_where_no_reference_is_recognised(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "py3langid", SimpleNamespace(classify=lambda _: ("en", 1.0)))
    run = {
        code: score_translation(golds_of(REFERENCES, code), ANSWERS, fidelity=True)
        for code in ("eng_Latn", "lug_Latn")
    }
    assert [one.name for one in run["lug_Latn"].measures] == ["bleu", "chrf"]
    groups = {"one": ["eng_Latn"], "other one": ["lug_Latn"]}
    found = compare([System("a", [run]), System("b", [run])], groups, draws=3)
    fidelity = found.measures["fidelity"]
    assert list(fidelity.languages["a"]) == list(fidelity.language_gains["b"]) == ["eng_Latn"]
    assert list(fidelity.groups["a"]) == list(fidelity.group_gains["b"]) == ["one", "all"]
    assert fidelity.groups["a"]["all"].mean == 75 == run["eng_Latn"]["fidelity"].value
    assert list(found.measures["bleu"].groups["a"]) == ["one", "other one", "all"]
    assert "NaN" not in json.dumps(found.as_json())
    write(found, tmp_path, "title")
    show(found, Console(file=io.StringIO()))
    report = (tmp_path / "report.md").read_text("utf-8")
    assert "missing in lg, which py3langid recognises in no reference" in report
    # In every language: then there is no such measure.
    alone = compare([System("a", [{"lug_Latn": run["lug_Latn"]}])], {}, draws=3)
    assert list(alone.measures) == ["bleu", "chrf"]


def test_fidelity_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(UserError, match=r"py3langid is missing; .*'jaxalign\[language\]'"):
        rehearse("translation", {"xx-en": golds_of(REFERENCES)}, {"fidelity": True})
    with pytest.raises(UserError, match=r"options\.fidelity: 'yes' should be true or false"):
        rehearse("translation", {}, {"fidelity": "yes"})


def test_comet_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "comet", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"COMET is missing.*pipx install unbabel-comet"):
        score_translation(golds_of(REFERENCES), ANSWERS, comet="x/y")


COMMAND = """#!{python}
import argparse, json, sys
parser = argparse.ArgumentParser()
for flag in ("-s", "-t", "-r", "--model", "--to_json"):
    parser.add_argument(flag)
for flag in ("--gpus", "--batch_size"):
    parser.add_argument(flag, type=int)
for flag in ("--quiet", "--only_system"):
    parser.add_argument(flag, action="store_true")
cfg = parser.parse_args()
if cfg.model == "x/none":
    sys.exit("KeyError: Model 'x/none' not supported by COMET.")
columns = [open(name, encoding="utf-8").read().split("\\n")[:-1] for name in (cfg.s, cfg.t, cfg.r)]
rows = [
    dict(src=s, mt=t, ref=r, COMET=0.5 + 0.1 * (t == r) + cfg.gpus) for s, t, r in zip(*columns)
]
json.dump({{cfg.t: rows}}, open(cfg.to_json, "w"))
"""


def test_comet_by_its_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "comet", None)
    command = tmp_path / our_comet.COMMAND
    command.write_text(COMMAND.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    answers = [REFERENCES[0], *ANSWERS[1:]]
    found = score_translation(golds_of(REFERENCES), answers, comet="some/model")
    assert found["comet"].parts[:, 0].tolist() == [0.6, 0.5, 0.5, 0.5]
    with pytest.raises(UserError, match=r"COMET cannot load 'x/none' .*not supported by COMET"):
        score_translation(golds_of(REFERENCES), answers, comet="x/none")


def test_without_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'jaxalign\[eval\]'"):
        translation.score_translation(golds_of(REFERENCES), ANSWERS)
