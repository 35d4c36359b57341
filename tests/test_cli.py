"""What a user can get wrong is told in one sentence, with exit code 2, before any training."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxalign.cli import main, options_of
from jaxalign.config import to_yaml
from tests.tiny import base, configure, rows

__all__ = ["base", "configure", "rows"]


@pytest.fixture
def told(capsys, tmp_path, configure):
    """words -> what `jaxalign train` says of a run with these settings."""

    def run(*words):
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(configure()), "utf-8")
        assert main(["train", str(file), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("jaxalign: ") and error.count("\n") == 1
        assert "Traceback" not in error
        return error

    return run


def write(folder, name, *lines):
    path = folder / name
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, "utf-8")
    return path


def test_rows_that_cannot_be_trained(told, tmp_path):
    good = {"prefix": "a", "text": "b"}
    rows = write(tmp_path, "rows.jsonl", good, {"prefix": "a"})
    error = told("task.kind=rows", f"task.train=[{rows}]")
    assert f"{rows}:2" in error and "'text'" in error
    broken = write(tmp_path, "broken.jsonl", good, '{"prefix": "a", "text')
    assert f"{broken}:2" in told("task.kind=rows", f"task.train=[{broken}]")
    empty = write(tmp_path, "empty.jsonl", good, {"prefix": "a", "text": ""})
    error = told("task.kind=rows", f"task.train=[{empty}]")
    assert f"{empty}:2" in error and "no token of this row would be trained" in error


def test_pairs_that_cannot_be_aligned(told, tmp_path):
    pair = {"text0": "ja", "text1": "yes", "lang0": "de", "lang1": "en"}
    pairs = write(tmp_path, "pairs.jsonl", pair, pair | {"text1": " "})
    error = told(f"align.train=[{pairs}]")
    assert f"{pairs}:2" in error and "empty" in error


def test_settings_that_do_not_fit_the_model(told):
    error = told("align.layer=9")
    assert "align.layer" in error and "9" in error and "3" in error
    error = told("lora.targets=[q,query]")
    assert "lora.targets: query matches no projection" in error and "gate" in error
    assert "did you mean 'align.temperature'" in told("align.temprature=1")
    assert "task.train is empty" in told("task.train=[]")
    assert "both 0" in told("task.weight=0", "align.weight=0")
    assert "batch.size: 6 rows cannot be divided" in told("batch.size=6")
    assert "mesh: data 3" in told("mesh.data=3", "mesh.fsdp=1")
    assert "pip install 'jaxalign[log]'" in told("log.wandb=project")
    assert "did you mean joint" in told("align.every=jont")
    assert "task.options: language_model takes no option 'gamma'" in told("task.options.gamma=2")
    assert "did you mean 'temperature'" in told("align.options.temprature=2")
    extra = "objectives=[{objective: contrastive, phase: align, options: {tau: 2}}]"
    assert "objectives[0].options: contrastive takes no option 'tau'" in told(extra)
    assert "'no_such' is not measured" in told("train.metric=no_such", "train.steps=1")


def test_checkpoints_that_cannot_be_read(told, tmp_path, base):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "SHA256SUMS").unlink()
    facts = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(facts | {"model_type": "gpt2"}))
    error = told(f"model.path={other}")
    assert "model_type 'gpt2' is not supported" in error and "llama, qwen2" in error
    (other / "config.json").write_text(json.dumps(facts))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error = told(f"model.path={other}")
    assert "model.safetensors" in error and str(other) in error
    error = told("model.path=no/such/model")
    assert "no/such/model" in error
    (other / "config.json").write_text(json.dumps(facts | {"vocab_size": 100}))
    assert "do not belong together" in told(f"model.path={other}")


def test_debug_shows_where(tmp_path):
    from jaxalign.errors import UserError

    with pytest.raises(UserError, match="no such configuration file"):
        main(["train", str(tmp_path / "missing.yaml"), "--debug"])


def test_config_and_data_show_print(capsys, tmp_path, configure):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(configure()), "utf-8")
    assert main(["config", str(file), "align.layer=1"]) == 0
    assert "align.layer" in capsys.readouterr().out
    assert main(["data", "show", str(file), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "SearchCreativeWork" in shown and "64 rows" in shown


def test_values_are_not_markup(capsys, tmp_path):
    """Rich reads [ab] as a style and [/nope] as the end of one."""
    file = tmp_path / "config.yaml"
    file.write_text("output: 'runs/[ab]'\nprompt: {system: '[/nope] \\x1b[2J'}\n", "utf-8")
    assert main(["config", str(file), "model.path=[/red]"]) == 2  # a list
    capsys.readouterr()
    assert main(["config", str(file), "model.path='[/red]'"]) == 0
    shown = capsys.readouterr().out
    assert "runs/[ab]" in shown and "[/nope]" in shown and "[/red]" in shown
    assert main(["config", str(file), 'prompt.system="\\x1b[2J"']) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"\x1b[2J" in shown


def test_a_probe_does_not_pass_over_an_output(capsys):
    """`output=` would be read by nothing, and the report would be elsewhere."""
    assert main(["probe", "m", "output=runs/mine", "--parallel", "p"]) == 2
    assert "name that of the report with --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("data", "show", "a.yaml", "--rows", "-3"),
        ("data", "show", "a.yaml", "--rows", "3.5"),
        ("probe", "m", "--parallel", "p", "--rows", "-3"),
        ("probe", "m", "--parallel", "p", "--neurons", "-1"),
        ("probe", "m", "--parallel", "p", "--width", "0"),
        ("merge", "a", "--out", "o", "--rank", "0"),
        ("plan", "a.yaml", "--topology", "v5e:2x2", "--price", "-1"),
        ("plan", "a.yaml", "--topology", "v5e:2x2", "--tries", "0"),
        ("plan", "a.yaml", "--topology", "v5e:2x2", "--slices", "x"),
        ("demo", "--seeds", "0"),
        ("demo", "--seeds", "9" * 20),
    ],
    ids=" ".join,
)
def test_numbers_of_options_have_bounds(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert f"argument {words[-2]}: " in (error := capsys.readouterr().err)
    assert "should be a" in error


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (("--align.layer=8",), "align.layer=8"),
        (("--align.layer", "8"), "align.layer=VALUE"),
        (("-seed=2",), "seed=2"),
        (("--prompt.system=",), "prompt.system="),
        (("--task.columns.text=a=b",), "task.columns.text=a=b"),
    ],
    ids=str,
)
def test_a_setting_with_dashes_is_told_without(given, meant, capsys):
    assert main(["train", "own.yaml", *given]) == 2
    assert capsys.readouterr().err == f"jaxalign: {given[0]} is a setting; write {meant}\n"


@pytest.mark.parametrize(
    "words",
    [
        ("train", "own.yaml", "--align.leyer=8"),
        ("train", "own.yaml", "--align=8"),
        ("import", "a", "--base", "b", "--out", "o", "--align.layer=8"),  # takes no settings
    ],
    ids=str,
)
def test_an_option_that_is_not_known(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert f"unrecognized option {words[-1]}" in capsys.readouterr().err


def test_words_that_are_not_text(capsys):
    assert main(["config", "output=\udcff"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxalign: command line: ") and "half of a character" in error


def test_a_folder_that_cannot_be_written_is_one_sentence(capsys, tmp_path, monkeypatch):
    def fail(self):
        (tmp_path / "file").write_text("")
        (tmp_path / "file" / "below").write_text("")

    monkeypatch.setattr(options_of("config"), "run", fail)
    assert main(["config"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "file" / "below") in error
    with pytest.raises(NotADirectoryError):
        main(["config", "--debug"])


def test_transformers_does_not_warn_where_there_is_no_pytorch(tmp_path, configure):
    """Its `PyTorch was not found. Models won't be available` is not true of ours."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(configure()), "utf-8")
    code = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
        "from jaxalign.cli import main\n"
        "sys.exit(main(['data', 'show', sys.argv[1]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens, " in done.stdout


def test_help_needs_no_jax():
    """`--help` is instant: nothing heavy is imported for it."""
    code = (
        "import sys; from jaxalign.cli import COMMANDS, main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'transformers', 'orbax'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.parametrize(("stopped", "code"), [("finished", 0), ("patience", 0), ("signal", 143)])
def test_a_run_that_was_stopped_is_none_that_ended(monkeypatch, tmp_path, configure, stopped, code):
    """A cluster starts again what ended with 128 + SIGTERM, and takes 0 for done."""
    from jaxalign.train import loop

    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(configure()), "utf-8")
    result = loop.Result("runs/adapter", step=3, best_step=None, stopped=stopped)
    monkeypatch.setattr(loop, "train", lambda *given: result)
    assert main(["train", str(file)]) == code
