"""A comparison from its file to its report: nothing is trained twice, and it may move."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from jaxalign.cli import main
from jaxalign.compare import run
from jaxalign.compare.draw import apart
from jaxalign.compare.measure import shape
from jaxalign.compare.run import compare
from jaxalign.compare.share import claim, each
from jaxalign.compare.study import read_study
from jaxalign.compare.trial import (
    Bases,
    Diverged,
    Trial,
    check_prepared,
    configs,
    cost,
    finished,
    outcome,
    prepare,
    train,
)
from jaxalign.errors import UserError
from jaxalign.hf.peft import load_peft
from jaxalign.train import loop, setup
from jaxalign.train.finish import Result
from tests.conftest import open_on_one_device
from tests.tiny import ASSETS, base, lower_case, rows

__all__ = ["base", "rows"]
SYSTEMS = """
systems:
  sft: {align.weight: 0}
  aligned: {}
  stages: [{task.weight: 0}, {align.weight: 0}]
  merged: {merge: [sft, aligned], weights: [0.5, 0.5]}
"""


@pytest.fixture(scope="module", autouse=True)
def one_device_for_all():
    with pytest.MonkeyPatch.context() as patch:
        open_on_one_device(patch)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory, base, rows):
    """A folder with the base's settings and the comparison; its data is beside them."""
    folder = tmp_path_factory.mktemp("study")
    for language in ("en", "de", "da"):
        lines = (ASSETS / f"dev.{language}.jsonl").read_text("utf-8").splitlines()[:6]
        (folder / f"dev.{language}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "base.yaml").write_text(f"""
model: {{path: {base}, dtype: float32, remat: none}}
prompt: {{system: ""}}
lora: {{r: 4, dropout: 0.0}}
task: {{kind: intent, train: [{rows}/task.jsonl]}}
align: {{layer: 2, every: joint, train: [{rows}/pairs.jsonl]}}
batch: {{size: 4, pairs: 4, accumulate: 1, max_length: 64, pair_max_length: 32, buckets: [32, 64]}}
train: {{steps: 2, log_every: 1}}
generate: {{max_new_tokens: 2, batch: 8}}
log: {{progress: none}}
evaluate:
  data: ["{folder}/dev.*.jsonl"]
  draws: 20
  groups: {{supervised: [en], aligned: [de], unseen: [da]}}
""")
    (folder / "study.yaml").write_text(f"""
base: base.yaml
output: {folder}/out
seeds: [1, 2]
{SYSTEMS}
evaluations: {{intents: {{}}}}
probe: {{parallel: "{folder}/dev.*.jsonl", rows: 5}}
""")
    return folder


@pytest.fixture(scope="module")
def found(files):
    """The comparison, done once."""
    compare(read_study(files / "study.yaml"))
    return json.loads((files / "out" / "report.json").read_text("utf-8"))


class TestDone:
    """What a finished comparison holds."""

    def test_every_system_is_there_with_all_that_was_measured(self, found, files):
        comparison = found["comparisons"]["intents"]
        assert comparison["systems"] == ["sft", "aligned", "stages", "merged"]
        assert comparison["groups"]["transfer"] == ["de", "da"]
        assert set(comparison["seeds"].values()) == {2}
        facts = {name: many[0] for name, many in found["facts"].items()}
        assert [facts[name]["layer"] for name in facts] == [None, 2, 2, 2]
        assert all(len(one["layers"]["csls"]) == 4 for one in facts.values())  # L + 1
        assert facts["sft"]["flops"] < facts["aligned"]["flops"]
        # Two updates of each phase, one after the other or together.
        assert facts["stages"]["flops"] == pytest.approx(facts["aligned"]["flops"], rel=1e-6)
        merged = facts["sft"]["flops"] + facts["aligned"]["flops"]
        assert facts["merged"]["flops"] == pytest.approx(merged)
        assert facts["sft"]["gradient_cosine"] is None
        assert facts["aligned"]["gradient_cosine"] is not None
        assert facts["merged"]["parameters"] == 2 * facts["sft"]["parameters"]  # ranks add up
        for name in ("report.md", "report.tex", "report.csv", "transfer.png"):
            assert (files / "out" / name).stat().st_size > 500

    def test_a_second_time_nothing_is_trained_or_answered(self, found, files, monkeypatch):
        def train(config, **_):
            result = old(config, **_)
            assert result.repeated
            return result

        import jaxalign

        old = jaxalign.train
        monkeypatch.setattr(jaxalign, "train", train)
        monkeypatch.setattr("jaxalign.base.System.chunks", None)  # who answers
        monkeypatch.setattr("jaxalign.compare.measure.measure_corpora", None)
        again = compare(read_study(files / "study.yaml"))
        assert json.loads(json.dumps(again.as_json())) == found

    def test_it_may_move_to_another_folder(self, found, files, tmp_path):
        shutil.copytree(files / "out", tmp_path / "moved")
        study = read_study(files / "study.yaml", out=str(tmp_path / "moved"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_train", None)  # who would train
            again = compare(study)
        assert json.loads(json.dumps(again.as_json())) == found

    def test_a_mixture_follows_the_last_of_its_parts(self, found, files, tmp_path, monkeypatch):
        """A comparison that is stopped while it trains the second seed has those of the first."""
        shutil.copytree(files / "out", tmp_path / "out")
        for kept in ("runs", "answers/intents", "states"):
            shutil.rmtree(tmp_path / "out" / kept / "merged", ignore_errors=True)

        def train(study, trial, bases):
            if trial.seed == 2:
                raise SystemExit(130)
            return outcome(study, trial)

        monkeypatch.setattr(run, "train", train)
        with pytest.raises(SystemExit):
            compare(read_study(files / "study.yaml", out=str(tmp_path / "out")))
        answers = [*(tmp_path / "out" / "answers").rglob("predictions.jsonl")]
        assert {file.parts[-3] for file in answers if "merged" in file.parts} == {"seed_1"}

    @pytest.mark.parametrize(
        ("recipe", "says"),
        [
            ("weights: [0.5, 0.25]", r"weights=\[0.5, 0.5\], now it is \[0.5, 0.25\]; give the"),
            ("weights: [0.5, 0.5], method: svd", "method=delta, now it is svd"),
        ],
    )
    def test_an_edited_mixture_is_not_taken_for_the_one_that_is_there(
        self, found, files, monkeypatch, recipe, says
    ):
        text = (files / "study.yaml").read_text().replace("weights: [0.5, 0.5]", recipe)
        (files / "edited.yaml").write_text(text)
        monkeypatch.setattr("jaxalign.train", None)  # found before
        with pytest.raises(UserError, match=says):
            compare(read_study(files / "edited.yaml"))

    def test_a_mixture_of_other_adapters_is_not_taken_for_the_one_that_is_there(
        self, found, files, tmp_path
    ):
        shutil.copytree(files / "out", tmp_path / "out")
        runs = tmp_path / "out" / "runs"
        shutil.rmtree(runs / "sft" / "seed_1" / "adapter")
        shutil.copytree(runs / "sft" / "seed_2" / "adapter", runs / "sft" / "seed_1" / "adapter")
        with pytest.raises(UserError, match="merged/seed_1/adapter was merged with adapters="):
            compare(read_study(files / "study.yaml", out=str(tmp_path / "out")), missing="skip")

    def test_a_mixture_alone_brings_its_parts_and_the_baseline(self, found, files):
        again = compare(read_study(files / "study.yaml"), missing="skip", only=["merged"])
        assert [*again.facts] == ["sft", "aligned", "merged"]

    def test_a_picture_goes_with_its_report(self, found, files, tmp_path):
        shutil.copytree(files / "out", tmp_path / "out")
        study = read_study(files / "study.yaml", out=str(tmp_path / "out"))
        assert (tmp_path / "out" / "transfer.png").exists()
        compare(study, missing="skip", only=["sft"])
        assert not (tmp_path / "out" / "transfer.png").exists()

    def test_another_setting_is_refused_where_a_run_is(self, found, files):
        with pytest.raises(UserError, match=r"optim\.eps"):
            compare(read_study(files / "study.yaml", ["optim.eps=1e-3"]))

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            ("optim.eps=1e-3", r"optim\.eps=1e-08, now it is 0\.001"),
            ("task.transforms=[swap]", r"task\.transforms=\[\], now it is \['swap'\]"),
        ],
    )
    def test_an_edited_system_is_not_reported_by_what_it_was(self, found, files, word, says):
        with pytest.raises(UserError, match=says):
            compare(read_study(files / "study.yaml", [word]), missing="skip")

    @pytest.mark.parametrize("missing", ["train", "skip"])
    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["train.steps=4"], r"train\.steps=2, but now train\.steps=4 is asked for; set that"),
            (["train.steps=1"], r"train\.steps=2, but now train\.steps=1"),
            (["train.steps=0", "train.epochs=3"], r"train\.epochs=5\.0, but now .*epochs=3\.0"),
            (["train.patience=1"], r"train\.patience=5, but now train\.patience=1"),
        ],
        ids=["longer", "shorter", "epochs", "patience"],
    )
    def test_runs_of_another_length_are_refused(
        self, found, files, monkeypatch, missing, words, says
    ):
        """They are not trained on, which would leave answers of adapters that are gone."""
        monkeypatch.setattr("jaxalign.train", None)  # found before
        with pytest.raises(UserError, match=f"seed_1 holds a run with .*{says}"):
            compare(read_study(files / "study.yaml", words), missing=missing)

    @pytest.mark.parametrize("missing", ["train", "skip"])
    def test_one_system_of_another_length_does_not_drop_out(
        self, found, files, monkeypatch, missing
    ):
        text = (
            (files / "study.yaml").read_text().replace("aligned: {}", "aligned: {train.steps: 4}")
        )
        (files / "longer.yaml").write_text(text)
        monkeypatch.setattr("jaxalign.train", None)
        with pytest.raises(UserError, match=r"aligned/seed_1 holds a run with train\.steps=2"):
            compare(read_study(files / "longer.yaml"), missing=missing)

    def test_a_run_that_was_stopped_keeps_its_length(self, found, files, tmp_path, monkeypatch):
        """It is known by its checkpoints, before anything else is trained."""
        shutil.copytree(files / "out", tmp_path / "out")
        runs = tmp_path / "out" / "runs" / "sft"
        shutil.rmtree(runs / "seed_1")
        (runs / "seed_2" / "result.json").unlink()
        shutil.rmtree(runs / "seed_2" / "adapter")
        out = str(tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr("jaxalign.train", None)
            with pytest.raises(UserError, match="sft/seed_2 holds a run with"):
                compare(read_study(files / "study.yaml", ["train.steps=4"], out), only=["sft"])
        study = read_study(files / "study.yaml", out=out)
        assert not finished(study, Trial("sft", 2))
        train(study, Trial("sft", 2), Bases())
        assert finished(study, Trial("sft", 2))

    def test_another_process_may_have_trained_with_another_length(self, found, files, monkeypatch):
        monkeypatch.setattr("jaxalign.train", None)
        study = read_study(files / "study.yaml", ["train.steps=4"])
        assert not finished(study, Trial("sft", 1))
        with pytest.raises(UserError, match="sft/seed_1 holds a run with"):
            train(study, Trial("sft", 1), Bases())

    def test_a_report_names_systems_that_it_does_not_have(self, found, files, tmp_path):
        shutil.copytree(files / "out", tmp_path / "out")
        shutil.rmtree(tmp_path / "out" / "runs" / "aligned")
        study = read_study(files / "study.yaml", out=str(tmp_path / "out"))
        said = compare(study, missing="skip")
        assert [*said.facts] == ["sft", "stages"]
        assert said.notes == [
            "aligned: left out, as no seed of it is finished yet.",
            "merged: left out, as no seed of it is finished yet.",
        ]
        assert compare(study, missing="skip", only=["stages"]).notes == []


@pytest.mark.usefixtures("found")
def test_states_of_a_merged_adapter_are_measured_again(files, monkeypatch):
    monkeypatch.setattr("jaxalign.compare.measure.measure_corpora", None)
    for words in ([], ["generate.adapter=merged"]):
        study = read_study(files / "study.yaml", words)
        assert shape(study, None, Bases())  # the base has no adapter
        done = outcome(study, Trial("sft", 1))
        with pytest.raises(TypeError) if words else contextlib.nullcontext():
            assert shape(study, done, Bases())


def test_heads_count_among_the_trained_parameters(files, tmp_path):
    """As the run itself says; the adapter that it hands over does not have them."""
    text = (files / "study.yaml").read_text("utf-8").replace(
        SYSTEMS, """
systems:
  headed: {align.weight: 0, objectives: [{objective: language_matching, options: {width: 3}}]}
"""
    )  # fmt: skip
    (files / "headed.yaml").write_text(text, "utf-8")
    study, bases = read_study(files / "headed.yaml", out=str(tmp_path)), Bases()
    done = train(study, Trial("headed", 1), bases)
    spec = bases.under(done.config).spec
    head = 2 * 2 * spec.dim * 3 + 3 * 2  # gate, up and down
    expected = load_peft(done.adapter, spec)[1].count(spec) + head
    assert run._facts(done, {}, bases).parameters == expected


def test_a_stop_leaves_with_the_code_of_the_run(files, tmp_path, monkeypatch):
    stopped = Result("x/adapter", step=1, best_step=None, stopped="interrupt")
    monkeypatch.setattr("jaxalign.train", lambda *_, **__: stopped)
    with pytest.raises(SystemExit) as left:
        compare(read_study(files / "study.yaml", out=str(tmp_path / "out")))
    assert left.value.code == 130
    with pytest.raises(UserError, match="no system is trained yet"):
        compare(read_study(files / "study.yaml", out=str(tmp_path / "out")), missing="skip")


def test_data_is_read_before_anything_is_trained(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxalign.train", None)
    text = (files / "study.yaml").read_text().replace("dev.*", "nothing.*")
    (files / "odd.yaml").write_text(text)
    assert main(["compare", str(files / "odd.yaml"), "--out", str(tmp_path)]) == 2
    assert "nothing.*" in capsys.readouterr().err
    assert main(["compare", str(files / "study.yaml"), "--only", "lens"]) == 2
    assert "--only: 'lens' is not a system" in capsys.readouterr().err


def test_other_rows_are_found_before_anything_is_trained(files, tmp_path, monkeypatch, capsys):
    """Ids and numbers of rows agree: what the rows say does not."""
    monkeypatch.setattr("jaxalign.train", None)
    lines = (ASSETS / "dev.de.jsonl").read_text("utf-8").splitlines()[:12]
    rows = [{name: value for name, value in json.loads(line).items() if name != "id"}
            for line in lines]  # fmt: skip
    for name, some in {"a": rows[:6], "b": rows[6:], "copy": rows[:6]}.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text, "utf-8")
    study = tmp_path / "study.yaml"

    def write(one: str, two: str) -> None:
        study.write_text(f"""
base: {files}/base.yaml
output: {tmp_path}/out
systems:
  one: {{evaluate: {{data: ["{tmp_path}/{one}.jsonl"], groups: {{}}}}}}
  two: {{evaluate: {{data: ["{tmp_path}/{two}.jsonl"], groups: {{}}}}}}
""")

    write("a", "b")
    assert main(["compare", str(study)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "evaluations.task: two: the rows of de are not those of one; evaluate all" in told
    write("a", "copy")  # files may have other names
    run.check_data(read_study(study))
    write("a", "b")
    run.check_data(read_study(study), only=["one"])


def test_what_a_system_reads_is_measured_once(files, tmp_path, monkeypatch):
    text = (files / "study.yaml").read_text()
    given = f'{{subspace: {{parallel: "{files}/dev.*.jsonl"}}}}'
    lens = f"  lens: {{prepare: {given}, align.objective: lens, align.languages: [en, da]}}\n"
    (files / "lens.yaml").write_text(text.replace("  merged:", f"{lens}  merged:"))
    study, bases = read_study(files / "lens.yaml", out=str(tmp_path)), Bases()
    prepare(study, "lens", bases)
    (config,) = configs(study, Trial("lens", 1))
    assert setup.prepare(config, base=bases.under(config)).phases["align"].terms[0].name == "lens"
    measured = []
    monkeypatch.setattr(
        "jaxalign.compare.trial.subspace", lambda *_, out, **__: measured.append(out)
    )
    prepare(study, "lens", bases)
    prepare(study, "sft", bases)
    check_prepared(study, "lens", bases)
    assert not measured
    # The same name, other sentences in the file.
    rows = (files / "dev.da.jsonl").read_text("utf-8")
    try:
        (files / "dev.da.jsonl").write_text(rows.replace("Hvor", "Hvorfor"), "utf-8")
        with pytest.raises(UserError, match=r"lens: .*npz was measured on other sentences than"):
            check_prepared(study, "lens", bases)
        prepare(study, "lens", bases)
    finally:
        (files / "dev.da.jsonl").write_text(rows, "utf-8")
    file = study.systems["lens"][0].subspace.file
    assert measured == [str(file)]
    with np.load(file) as content:
        arrays = {name: content[name] for name in content if name != "tokens"}
    np.savez(file, **arrays)  # one that does not say
    prepare(study, "lens", bases)
    assert measured == [str(file)] * 2


def test_a_report_looks_at_prepared_files(files, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(run, "check_prepared", lambda study, name, bases: looked.append(name))
    study = read_study(files / "study.yaml", out=str(tmp_path))
    with pytest.raises(UserError, match="no system is trained yet"):
        compare(study, missing="skip")
    assert looked == [*study.systems]


def test_states_of_another_tokenizer_are_measured_again(files, base, tmp_path, monkeypatch):
    copy = shutil.copytree(base, tmp_path / "base")
    study = read_study(files / "study.yaml", [f"model.path={copy}"], out=str(tmp_path / "out"))
    before = shape(study, None, Bases())
    with monkeypatch.context() as patch:
        patch.setattr("jaxalign.compare.measure.measure_corpora", None)
        assert shape(study, None, Bases()) == before
    lower_case(copy)
    assert shape(study, None, Bases()) != before


def test_the_grid_chooses_by_validation_rows(files, tmp_path, monkeypatch):
    text = (files / "study.yaml").read_text()
    (files / "grid.yaml").write_text(text + "choose: {grid: {lora.r: [2, 4]}}\n")
    study = read_study(files / "grid.yaml", out=str(tmp_path))
    scores = {"lora.r=2": 10.0, "lora.r=4": 30.0}

    class Score:
        def __init__(self, value):
            self.measures = [self]
            self.value = value

    monkeypatch.setattr(run, "train", lambda study, trial, bases: trial)
    monkeypatch.setattr(
        run, "answers", lambda study, trial, *_, **__: {"en": Score(scores[trial.candidate[0]])}
    )
    monkeypatch.setattr("jaxalign.compare.share.finished", lambda *_: False)
    best, found = run._choose(study, ["sft"], run.Bases(), "train")
    assert (best, found) == ({"sft": ("lora.r=4",)}, {"sft": scores})

    def train(study, trial, bases):
        if trial.candidate == ("lora.r=4",):
            raise Diverged(f"{trial}: diverged")
        return trial

    monkeypatch.setattr(run, "train", train)
    best, found = run._choose(study, ["sft"], run.Bases(), "train")
    assert (best, found) == ({"sft": ("lora.r=2",)}, {"sft": {"lora.r=2": 10.0}})


def test_the_grid_is_chosen_on_languages_of_its_own(files, tmp_path):
    """Fewer than the groups of the evaluation have, as development rows often are."""
    text = (files / "study.yaml").read_text()
    choose = f"choose: {{grid: {{lora.r: [2, 4]}}, evaluate.data: [{files}/dev.en.jsonl]}}\n"
    (files / "few.yaml").write_text(text + choose)
    run.check_data(read_study(files / "few.yaml", out=str(tmp_path)))


def test_processes_share_the_trials(files, tmp_path, monkeypatch):
    """One that another process holds comes last, and then it is read."""
    study = read_study(files / "study.yaml", out=str(tmp_path))
    trials = [Trial("sft", 1), Trial("aligned", 1)]
    done, order = [], []
    monkeypatch.setattr("jaxalign.compare.share.finished", lambda _, trial: trial in done)
    other = claim(study, "sft/seed_1", wait=False)
    assert other.__enter__()

    def do(trial):
        with claim(study, trial.place("").as_posix(), wait=False) as free:
            assert not free  # it is held meanwhile
        order.append(trial)
        if trial.system == "aligned":
            other.__exit__(None, None, None)
        return trial.seed

    assert each(study, trials, do) == dict.fromkeys(trials, 1)
    assert order == trials[::-1]


def test_only_seeds_that_all_systems_have_are_compared():
    """One seed beside three would gain or lose by the luck of the other two."""

    def outcomes(**seeds):
        return {
            name: [SimpleNamespace(trial=Trial(name, seed)) for seed in own]
            for name, own in seeds.items()
        }

    kept, sentences = run.common(outcomes(sft=[1, 2, 3], raw=[2]))
    assert [[one.trial.seed for one in many] for many in kept.values()] == [[2], [2]]
    assert sentences == ["sft: seeds 1, 3 are left out, as others do not have them yet."]
    assert run.common(outcomes(sft=[1, 2], raw=[1, 2]))[1] == []
    with pytest.raises(UserError, match="no seed in common"):
        run.common(outcomes(sft=[1], raw=[2]))


def test_time_of_several_processes_adds_up(tmp_path):
    def spent(step, time, seconds, share):
        values = {"goodput/seconds": seconds, "goodput/step": share}
        return {"step": step, "event": "goodput", "time": time, **values}

    rows = [
        {"step": 4, "event": "train", "flops_per_step": 2.0, "gradient_cosine": 0.5},
        spent(4, 110.0, 10.0, 0.5),
        spent(5, 120.0, 20.0, 0.5),  # the same process
        {"step": 6, "event": "train", "flops_per_step": 4.0, "gradient_cosine": None},
        spent(6, 200.0, 8.0, 0.25),
        spent(7, 320.0, 100.0, 0.5),  # one that takes longer than the one before it
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cost((tmp_path,)) == {
        "flops": 4 * 2.0 + 2 * 4.0,
        "seconds": 62.0,
        "wall_seconds": 128.0,
        "gradient_cosine": 0.5,
    }
    (tmp_path / "old").mkdir()
    assert set(cost((tmp_path / "old",)).values()) == {None}


def test_names_in_the_picture_do_not_cover_one_another():
    points = {"a": (1.0, 5.0), "b": (1.1, 4.9), "c": (1.1, 4.2), "far": (3.0, 5.0)}
    found = apart(points, width=0.5, height=1.0)
    assert found == pytest.approx({"a": 5.0, "b": 4.0, "c": 3.0, "far": 5.0})


def test_places_of_trials():
    assert str(Trial("lens", 2).place("runs")) == "runs/lens/seed_2"
    assert str(Trial("a", 1, ("lora.r=4",)).place("x")) == "x/a/lora.r=4/seed_1"


def test_places_of_long_values_and_of_paths(files, tmp_path):
    """A name in a file system has 255 bytes and no slash; other values have other places."""
    study = read_study(files / "study.yaml", out=str(tmp_path))
    paths = [f"/data/pairs/of/a/language/pairs.{number}.jsonl" for number in range(14)]
    words = [f"align.train={json.dumps(some)}" for some in (paths, paths[:-1], ["a/b"], ["a_b"])]
    words += ["prompt.system=" + "å" * 100, "prompt.system=" + "å" * 121]  # 214 and 256 bytes
    places = [Trial("sft", 1, (word,)).place("") for word in words]
    assert len(set(places)) == len(places)
    for place in places:
        with claim(study, place.as_posix(), wait=False) as mine:
            assert mine
    assert places[0].parts[1].startswith('align.train=["_data_pairs_of')
    assert [place.parts[1] for place in places[3:5]] == words[3:5]  # as they are
