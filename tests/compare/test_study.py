"""The file of a comparison: what becomes of its systems, and every mistake named."""

import re
import shutil
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.compare import study as reader
from jaxalign.compare.measure import asked
from jaxalign.compare.run import check_data
from jaxalign.compare.study import Choice, Mixture, read_study, words_of
from jaxalign.compare.trial import Trial, configs, mix, outcome
from jaxalign.errors import UserError
from jaxalign.merge.methods import Recipe

TREE = Path(__file__).resolve().parents[2]
SHIPPED = TREE / "configs" / "compare_methods.yaml"
PLAIN = """
base: base.yaml
output: out
seeds: [1, 2]
systems:
  sft: {align.weight: 0}
  aligned: {align: {layer: 3, temperature: 0.2}}
  other: {extends: methods/other.yaml, seed: 9}
  stages:
    - {task.weight: 0}
    - {align.weight: 0}
  merged: {merge: [sft, aligned], weights: [0.6, 0.4], method: svd, rank: 4}
"""
BOTH = "base: base.yaml\nsystems: {a: {}, b: {}, c: {merge: [a, b], %s}}"


@pytest.fixture
def write(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "base.yaml").write_text("align: {layer: 2}\nevaluate: {groups: {a: [en]}}")
    (tmp_path / "methods" / "other.yaml").write_text("extends: ../base.yaml\ntrain: {steps: 7}")

    def write(text: str):
        path = tmp_path / "study.yaml"
        path.write_text(text, "utf-8")
        return path

    return write


def test_the_shipped_comparison_loads():
    study = read_study(SHIPPED)
    assert study.names[0] == "sft"
    check_data(study)
    # Each configuration of a method takes part.
    used = {stage.file.name for stages in study.systems.values() for stage in stages}
    methods = {path.name for path in (SHIPPED.parent / "methods").glob("*.yaml")}
    assert methods <= used


@pytest.mark.parametrize(
    "page",
    [(TREE / "docs" / "compare.md").read_text("utf-8"), reader.__doc__],
    ids=["docs", "code"],
)
def test_the_comparison_that_is_shown_is_one(page, tmp_path, monkeypatch):
    """Next to `demo.yaml`, and run where its rows are."""
    shown = re.search(r"^base: .*?^probe: [^\n]*$", page, re.M | re.S)[0]
    folder = shutil.copytree(SHIPPED.parent, tmp_path / "configs")
    (folder / "study.yaml").write_text(shown, "utf-8")
    monkeypatch.chdir(TREE / "jaxalign" / "demo" / "assets" / "data")
    study = read_study(folder / "study.yaml")
    assert [len(stages) for stages in study.systems.values()].count(2) == 1
    assert set(study.mixtures) == {"merged"}
    check_data(study)


def test_jaxalign_config_prints_the_systems_of_a_comparison(capsys):
    assert main(["config", str(SHIPPED), "train.steps=3"]) == 0
    out = capsys.readouterr().out
    assert "shuffled" in out and "align.control" in out and "xsgd_task.yaml" in out
    assert "train.steps=3" in out


def test_systems_are_settings_over_the_base(write):
    study = read_study(write(PLAIN), ["optim.eps=1e-6"], "elsewhere")
    assert study.names == ["sft", "aligned", "other", "stages", "merged"]
    assert (study.output, study.seeds) == ("elsewhere", (1, 2))
    sft, aligned, other = (study.systems[name][0].config() for name in study.names[:3])
    assert (sft.align.weight, sft.align.layer) == (0, 2)
    assert (aligned.align.layer, aligned.align.temperature, aligned.align.weight) == (3, 0.2, 1)
    assert (other.train.steps, other.align.layer, other.seed) == (7, 2, 9)
    assert {sft.optim.eps, aligned.optim.eps, other.optim.eps} == {1e-6}
    assert study.mixtures == {"merged": Mixture(("sft", "aligned"), (0.6, 0.4), Recipe("svd", 4))}


def test_a_stage_goes_on_from_the_one_before_it(write):
    study = read_study(write(PLAIN))
    first, second = configs(study, Trial("stages", 2))
    assert (first.output, first.adapter.start) == ("out/runs/stages/seed_2/stage_1", None)
    assert second.output == "out/runs/stages/seed_2/stage_2"
    assert second.adapter.start == "out/runs/stages/seed_2/stage_1/adapter"
    assert (first.task.weight, second.task.weight, second.align.weight) == (0, 1, 0)
    assert first.seed == second.seed == 2


def test_a_stage_reads_the_file_that_is_prepared_for_it(write, tmp_path):
    text = PLAIN + "  lens: {prepare: {subspace: {parallel: a.jsonl}}, align.objective: lens}\n"
    study = read_study(write(text), out=str(tmp_path / "else"))
    (stage,) = study.systems["lens"]
    assert stage.subspace.file.parent == tmp_path / "else" / "prepared"
    assert stage.config().align.options == {"subspace": {"file": str(stage.subspace.file)}}
    assert study.systems["sft"][0].subspace is None
    other = read_study(write(text.replace("a.jsonl", "b.jsonl")), out=str(tmp_path / "else"))
    assert other.systems["lens"][0].subspace.file != stage.subspace.file


def test_paths_may_begin_at_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = PLAIN.replace("output: out", "output: ~/out") + (
        "  lens: {prepare: {subspace: {parallel: ~/a.jsonl}}, align.objective: lens}\n"
        "probe: {parallel: ~/b.jsonl}\n"
    )
    study = read_study(write(text))
    assert study.output == f"{tmp_path}/out"
    assert study.systems["lens"][0].subspace.options["parallel"] == f"{tmp_path}/a.jsonl"
    assert study.texts.parallel == f"{tmp_path}/b.jsonl"
    assert configs(study, Trial("sft", 1))[0].output.startswith(f"{tmp_path}/out/")


def test_a_grid_is_every_combination(write):
    grid = "choose: {grid: {lora.r: [4, 8], optim.learning_rate: [1.0e-3]}, evaluate.rows: 5}"
    study = read_study(write(PLAIN + grid))
    assert study.choice == Choice(
        (("lora.r=4", "optim.learning_rate=0.001"), ("lora.r=8", "optim.learning_rate=0.001")),
        ("evaluate.groups={}", "evaluate.rows=5"),
    )
    trial = Trial("sft", 1, study.choice.candidates[1])
    (config,) = configs(study, trial)
    assert (config.lora.r, config.optim.learning_rate) == (8, 1e-3)
    assert config.output == "out/runs/sft/lora.r=8,optim.learning_rate=0.001/seed_1"


def test_a_candidate_is_asked_as_it_was_trained(write, monkeypatch):
    """Prompts, weights and decoding of the grid, below what an evaluation sets."""
    grid = """choose:
  grid:
    prompt.system: ["", "Name the intent."]
    task.kind: [intent]
    model.quantize: [int4]
    generate.max_new_tokens: [9]
    evaluate.rows: [7]
evaluations: {few: {evaluate.rows: 3}}
"""
    study = read_study(write(PLAIN + grid))
    monkeypatch.setattr("jaxalign.compare.trial.merge", lambda *_, **__: None)
    for candidate in study.choice.candidates:
        parts = [outcome(study, Trial(name, 1, candidate)) for name in ("sft", "aligned")]
        for one in (
            *parts,
            outcome(study, Trial("stages", 1, candidate)),
            mix(study, "merged", parts),
        ):
            config = asked(study, one, study.evaluations["few"])
            for group in ("model", "prompt", "task", "generate", "lora", "align"):
                assert getattr(config, group) == getattr(one.config, group), (one.trial, group)
            assert (config.generate.max_new_tokens, config.evaluate.rows) == (9, 3)
            assert config.output == one.config.output


def test_a_system_may_empty_a_mapping_of_the_base(write, tmp_path):
    text = "base: base.yaml\nsystems: {mended: {}, paper: {evaluate.options: {}}}"
    study = read_study(write(text))
    (tmp_path / "base.yaml").write_text("evaluate: {options: {rules: mended}}")
    found = [study.systems[name][0].config().evaluate.options for name in study.names]
    assert found == [{"rules": "mended"}, {}]


def test_words_of_the_command_are_not_lost(write):
    """They are over what the file says, and refused where the file alone decides."""
    file = write("base: base.yaml\nsystems: {a: {}, b: {}}\n"
                 "evaluations: {t: {generate.max_new_tokens: 16, evaluate.rows: 50}}\n"
                 "choose: {grid: {lora.r: [4, 8]}}")  # fmt: skip
    study = read_study(file, ["evaluate.rows=5", "train.steps=3"])
    asked = study.base.config(study.evaluations["t"])
    assert (asked.evaluate.rows, asked.generate.max_new_tokens, asked.train.steps) == (5, 16, 3)
    for word, place in (("seed=7", "seeds"), ("output=x", "output"), ("lora.r=2", "choose.grid")):
        with pytest.raises(UserError, match=rf"is set for each run by {place} of .*; change it"):
            read_study(file, [word])


def test_words_of_nested_and_dotted_settings():
    given = {"align": {"layer": 2, "options": {"a": [1]}}, "evaluate.groups": {"x": ["no"]}}
    assert words_of(given) == (
        "align.layer=2",
        'align.options={"a": [1]}',
        'evaluate.groups={"x": ["no"]}',
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "should be a mapping of names to values"),
        ("base: [", "study.yaml: not valid YAML"),
        ("systems: {a: {}}", "study.yaml: base: None should be a str"),
        ("base: no.yaml\nsystems: {a: {}}", "systems.a: "),
        ("base: base.yaml\nsystem: {a: {}}", "unknown key 'system'; did you mean 'systems'?"),
        ("base: base.yaml\nsystems: {}", "systems: no system is trained"),
        ("base: base.yaml\nsystems: {a: []}", "systems.a: a list of stages is empty"),
        ("base: base.yaml\noutput: 2026_11\nsystems: {a: {}}", ":2: output: YAML reads 2026_11"),
        ("base: base.yaml\nsystems: {a: {align.layer: 010}}", ":2: systems.a.align.layer: YAML"),
        ("base: base.yaml\nsystems: {a: 3}", "systems.a: 3 should be a mapping"),
        ("base: base.yaml\nsystems: {a/b: {}}", "'a/b' cannot name a system"),
        ("base: base.yaml\nsystems: {a: {align.leyer: 1}}", "did you mean 'align.layer'?"),
        ("base: base.yaml\nsystems: {a: {extends: [x]}}", "extends: ['x'] should be the name"),
        ("base: base.yaml\nsystems: {a: {prepare: 1}}", "systems.a: prepare: 1 should be a mapp"),
        (
            "base: base.yaml\nsystems: {a: {prepare: {clusters: {}}}}",
            "unknown key 'prepare.clusters'; did you mean 'subspace'?",
        ),
        (
            "base: base.yaml\nsystems: {a: {prepare: {subspace: {}}}}",
            "prepare.subspace: parallel: None should be a str",
        ),
        ("base: base.yaml\nsystems: {a: {trainable: full}}", "share one base; compare adapters"),
        ("base: base.yaml\nseeds: [1, 1]\nsystems: {a: {}}", "seeds: [1, 1] should be a list"),
        ("base: base.yaml\nseeds: 3\nsystems: {a: {}}", "seeds: 3 should be a list"),
        ("base: base.yaml\nsystems: {a: {}, b: {merge: [a]}}", "should be a list of two systems"),
        ("base: base.yaml\nsystems: {a: {}, b: {merge: [a, c]}}", "'c' is not a system that is"),
        (
            "base: base.yaml\nsystems: {a: {}, b: {merge: [a, a], weights: [1]}}",
            "should have a number for each system",
        ),
        (BOTH % "weights: [1, b]", "systems.c: weights: [1, 'b'] should have a number for each"),
        (BOTH % "weights: [0, 0]", "systems.c: weights: all are 0"),
        (BOTH % "weights: [1, .nan]", "systems.c: weights: nan for b is not a number"),
        (BOTH % "method: tise", "systems.c: method: 'tise' is unknown; choose among delta"),
        (BOTH % "method: ties", "systems.c: density is missing"),
        (BOTH % "method: ties, density: 2", "systems.c: density: 2.0 is not a share"),
        (BOTH % "rank: 4", "systems.c: rank: delta has no use for it"),
        (BOTH % "method: svd, rank: x", "systems.c: rank: 'x' should be an int"),
        (BOTH % "method: layer_swap", "systems.c: blocks is missing"),
        (
            "base: base.yaml\nsystems: {a: {}, b: {}, c: {merge: [a, b, a], method: layer_swap, "
            "blocks: 1..2}}",
            "systems.c: method layer_swap takes two adapters",
        ),
        ("base: base.yaml\nsystems: {a: {}, b: {merge: [a, [a]]}}", "['a'] is not a system that"),
        ("base: base.yaml\nsystems: {a: {}}\nchoose: {grid: {lora.r: 4}}", "lora.r: 4 should be"),
        (
            "base: base.yaml\nsystems: {a: {}}\nchoose: {grid: {lora.q: [4]}}",
            "did you mean 'lora.r'?",
        ),
        ("base: base.yaml\nsystems: {a: {}}\nprobe: {rows: 3}", "probe: parallel: None should be"),
        (
            "base: base.yaml\nsystems: {a: {}}\nevaluations: {x: {evaluate.kin: y}}",
            "evaluations.x: ",
        ),
    ],
)
def test_mistakes_are_named(write, text, says):
    with pytest.raises(UserError) as error:
        read_study(write(text))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
