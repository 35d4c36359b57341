"""The experiments can be repeated: their settings load, their rows are made, their tables drawn."""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxalign.compare.study import read_study
from jaxalign.config import load
from tests.tiny import ASSETS, base

__all__ = ["base"]
HERE = Path(__file__).resolve().parents[1] / "experiments" / "standardised"


def script(file):
    """A script of the experiments as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def experiment():
    return script(HERE / "run.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory, experiment):
    """Commands and pairs where the experiment looks for them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("xsid", "tatoeba"):
        (folder / name).mkdir()
    commands = (ASSETS / "train.en.jsonl").read_text("utf-8")
    (folder / "xsid" / "train.en.jsonl").write_text(commands, "utf-8")
    for language in experiment.LANGUAGES:
        lines = [f"{language} {number}\t{number} in {language}" for number in range(60)]
        (folder / "tatoeba" / f"{language}-en.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def test_rows_are_the_same_each_time_and_held_out(experiment, data, tmp_path):
    words = experiment.prepare(data, tmp_path)
    config = load(HERE / "joint.yaml", [*words, "output=x", "model.path=x"]).config
    texts = {file.stem: file.read_text("utf-8") for file in tmp_path.iterdir()}
    assert config.align.valid == [str(tmp_path / "held_out.jsonl")]
    rows = {name: list(map(json.loads, text.splitlines())) for name, text in texts.items()}
    english = {name: {row["text1"] for row in rows[name]} for name in ("pairs", "held_out")}
    assert len(english["pairs"]) == experiment.PAIRS * len(experiment.LANGUAGES)
    assert not english["pairs"] & english["held_out"]
    experiment.prepare(data, tmp_path)
    assert {file.stem: file.read_text("utf-8") for file in tmp_path.iterdir()} == texts


def test_the_committed_numbers_are_those_of_the_page(experiment):
    results = json.loads((HERE / "results.json").read_text("utf-8"))
    assert {"date", "hardware", "versions", "data"} <= results.keys()
    page = (HERE.parents[1] / "docs" / "concepts.md").read_text("utf-8")
    for line in experiment.table(results["runs"]).splitlines():
        assert line in page


@pytest.mark.slow
def test_a_run_and_its_repetition(experiment, data, base, tmp_path, monkeypatch, capsys):
    words = ["run.py", "--data", str(data), "--gemma", base, "--only", "gemma*", "--out"]
    words += [str(tmp_path), "align.layer=2", "train.steps=2", "train.eval_every=1"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # of these tests: eight devices
    experiment.main()
    first = (tmp_path / "results.json").read_text("utf-8")
    for run in json.loads(first)["runs"].values():
        assert run["before"].keys() == run["after"].keys() == {"raw", "standardised"}
    shown = capsys.readouterr().out.splitlines()[-4:]
    experiment.main()
    assert (tmp_path / "results.json").read_text("utf-8") == first
    assert capsys.readouterr().out.splitlines() == shown


TABLES = (
    "gpu",
    "transfer",
    "controls",
    "merged",
    "translation_gpu",
    "translation_cpu",
    "sweep",
    "sweep_32",
    "slots",
    "merged_cpu",
    "merged_seeds_cpu",
    "seeds_cpu",
    "slots_seeds",
    "ner_cpu",
    "ner_seeds_cpu",
    "ner_gpu",
    "ner_gpu_seeds",
    "slots_gpu",
    "slots_gpu_seeds",
    "merged_gpu",
    "neighbours_more",
    "neighbours_cpu",
    "sweep_gpu",
    "long_gpu",
    "states_cpu",
)
QWEN = ("qwen_gpu", "qwen_gpu_layers", "qwen_gpu_h100")


@pytest.mark.parametrize("name", [*QWEN, *(f"gemma_{name}" for name in TABLES)])
def test_the_tables_of_real_models_are_those_of_the_page(name, tmp_path):
    folder = HERE.parent / "real_llm"
    report = json.loads((folder / "results" / f"{name}.json").read_text("utf-8"))
    page = (HERE.parents[1] / "docs" / "results.md").read_text("utf-8")
    made = script(folder / "table.py")
    tables = [made.table(report)]
    more = {
        "gemma_slots": ("type_f1", "copied"),
        "gemma_slots_seeds": ("type_f1",),
        "gemma_slots_gpu": ("type_f1", "copied"),
        "gemma_slots_gpu_seeds": ("type_f1",),
    }
    tables += [made.table(report, measure) for measure in more.get(name, ())]
    for line in "\n".join(tables).splitlines():
        assert line in page
    if name == "gemma_gpu":
        script(folder / "draw.py").draw(report, tmp_path / "gains.png")
        assert (tmp_path / "gains.png").stat().st_size > 10_000


def test_the_curves_of_real_models_are_those_of_the_page():
    curves = script(HERE.parent / "real_llm" / "curves.py")
    page = (HERE.parents[1] / "docs" / "results.md").read_text("utf-8")
    made = [curves.table(), curves.measures(), curves.table(36), curves.classes()]
    made += [curves.table(36, 50), curves.classes(50)]
    assert len(curves.known(36, 50)) == 2
    assert all(line in page for line in "\n".join(made).splitlines())


def test_the_study_of_real_models_loads_and_its_rows_are_held_out(data, tmp_path):
    folder = HERE.parent / "real_llm"
    studies = [file for file in folder.glob("*.yaml") if "\nsystems:" in file.read_text("utf-8")]
    assert len(studies) > 10
    for file in studies:
        first, second = read_study(file, ["model.path=x"]).names[:2]
        assert first == "sft" and second in ("aligned", "block_12")
    rows = script(folder / "data.py")
    tatoeba = tmp_path / "de-en.tsv"
    long = "x" * (rows.LONGEST + 1)
    tatoeba.write_text(f"ja\tYes\njawohl\tyes\n{long}\tlong\nnein\tno\n", "utf-8")
    found = [json.loads(line) for line in rows.pairs(tatoeba, "de", {"no"})]
    # No English sentence twice, none that was seen, none that is long.
    assert [(one["text0"], one["text1"], one["lang0"]) for one in found] == [("ja", "Yes", "de")]
