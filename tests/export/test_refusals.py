"""What cannot be exported is told in one sentence, and nothing half written is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.checksums import SUMS, seal
from jaxalign.errors import UserError
from jaxalign.export.request import Request
from jaxalign.export.run import export
from jaxalign.export.source import open_source
from jaxalign.folders import whole_folder
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import save_peft

REPO = Path(__file__).resolve().parents[2]


def edit(file, **changes):
    (Path(file).parent / SUMS).unlink(missing_ok=True)
    content = json.loads(Path(file).read_text()) | changes
    Path(file).write_text(json.dumps(content))


def respoil(file, change):
    (Path(file).parent / SUMS).unlink(missing_ok=True)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def moved(base, tmp_path):
    """A copy of the base, to spoil."""
    shutil.copytree(base, tmp_path / "moved")
    return tmp_path / "moved"


def left(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- the run ------------------------------------------------------------------------------------


def test_nothing_to_export(tmp_path, told, base):
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in told("export", tmp_path / "empty")
    assert "no such folder" in told("export", tmp_path / "absent")
    assert "holds no checkpoint" in told("export", base)
    assert left(tmp_path / "empty") == []  # looking does not make folders


def test_words(run, told):
    out, _ = run()
    assert "--max-shard-size lots: " in told("export", out, "--max-shard-size", "lots")
    assert "--max-shard-size 0: " in told("export", out, "--max-shard-size", "0")
    error = told("export", out, "--format", "merged", "--dtype", "int8")
    assert "--dtype int8: choose among float32, float16, bfloat16" in error
    assert "always float32" in told("export", out, "--dtype", "bfloat16")
    for form in ("peft", "orbax"):  # one file, and Orbax's own
        error = told("export", out, "--format", form, "--max-shard-size", "5GB")
        assert f"--max-shard-size: {form} is not written in shards" in error
        assert "--format merged" in error
    assert "no further words" in told("export", out, "lora.r=8")
    assert "--private is for --push" in told("export", out, "--private")
    assert "name a local folder" in told("export", "gs://bucket/run")
    assert left(out) == ["best", "checkpoints", "config.yaml"]


def test_a_checkpoint_that_is_broken(run, told):
    out, _ = run()
    data = [p for p in Path(out, "checkpoints", "4", "state").rglob("*") if p.is_file()]
    largest = max(data, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    error = told("export", out)
    assert f"{out}: checkpoint checkpoints/4 " in error and "--step" in error


def test_not_a_number(run, told):
    def spoil(**how):
        return run("lora.targets=[q]", **how)

    out, trained = spoil()
    trained["blocks"]["attention"]["q"]["b"][1, 0, 0, 0] = np.nan
    spoil(step=6, trained=trained)
    error = told("export", out, "--step", "6")
    assert "blocks/attention/q/b of checkpoint 6 " in error
    assert "earlier step" in error
    assert not Path(out, "export").exists()
    export(Request(out, step="4"))


# --- the base -----------------------------------------------------------------------------------


def test_another_base(run, moved, told):
    out, _ = run()
    # The same shapes, other weights.
    respoil(moved / "model.safetensors", lambda t: t["model.norm.weight"].__imul__(2))
    error = told("export", out, "--base", moved)
    assert f"was trained on another base than {moved}" in error and "with other weights" in error
    # Other shapes are named, as is the base it was.
    edit(moved / "config.json", num_hidden_layers=2)
    (moved / "model.safetensors").unlink()
    error = told("export", out, "--base", moved)
    assert "blocks/attention/k/a of checkpoint 4 is [3, 32, 4]" in error
    assert f"{moved} asks for [2, 32, 4]" in error and "trained on another base (" in error


def test_an_adapter_of_another_base(run, base, moved, tmp_path, told):
    out, trained = run()
    save_peft(tmp_path / "a", trained, load_spec(base), open_source(out).adapter,
              base_name="some/other-model")  # fmt: skip
    edit(moved / "config.json", hidden_size=64)
    error = told("export", tmp_path / "a", "--base", moved)
    assert "has shape [4, 32]" in error and "[4, 64]" in error and ".q_proj.lora_A.weight" in error
    assert f"some/other-model as its base, not {moved}" in error
    assert "the base of" in told("export", tmp_path / "a")  # some/other-model is nowhere


def test_an_adapter_s_base_with_other_weights(run, moved, told, done, tmp_path):
    """Of an adapter folder, the record of its run knows the weights; else only a name is known."""
    out, trained = run(f"model.path={moved}")
    source = open_source(out)
    adapter = Path(out, "adapter")
    save_peft(adapter, trained, source.spec, source.adapter, base_name=str(moved))
    content = {"inputs": {"model.path": source.opened.fingerprint}}
    Path(out, "result.json").write_text(json.dumps(seal(content)))
    words = ("export", adapter, "--format", "merged", "--out")
    shutil.copytree(moved, tmp_path / "same")
    assert "warning" not in done(*words, tmp_path / "1", "--base", tmp_path / "same")
    respoil(moved / "model.safetensors", lambda t: t["model.norm.weight"].__imul__(2))
    error = told(*words, tmp_path / "2")  # replaced in place
    assert f"{adapter} was trained on another base than {moved}" in error and "--base" in error
    shutil.copytree(adapter, tmp_path / "adapter")  # no record beside it
    words = ("export", tmp_path / "adapter", "--format", "merged", "--out")
    told_so = " ".join(done(*words, tmp_path / "3", "--base", tmp_path / "same").split())
    assert f"names {moved} as its base, not {tmp_path / 'same'}; the shapes agree" in told_so
    assert "warning" not in done(*words, tmp_path / "4")


def test_a_base_that_is_gone_or_incomplete(run, llama_base, tmp_path, told):
    shutil.copytree(llama_base, tmp_path / "b")
    out, _ = run(f"model.path={tmp_path / 'b'}")
    (tmp_path / "b" / SUMS).unlink()
    shard = sorted((tmp_path / "b").glob("*.safetensors"))[1]
    shard.rename(tmp_path / "kept")
    error = told("export", out, "--format", "merged")
    assert f"{shard}: missing" in error
    (tmp_path / "kept").rename(shard)
    shard.write_bytes(shard.read_bytes()[:-7])
    assert "cut short" in told("export", out, "--format", "merged")
    (tmp_path / "b").rename(tmp_path / "c")
    error = told("export", out)
    assert "no such folder" in error and "--base MODEL" in error
    assert not Path(out, "export").exists()


def test_weights_of_the_base_that_are_not_finite(run, moved, told):
    # Where the fingerprint does not look.
    out, _ = run(f"model.path={moved}")
    name = "model.layers.1.mlp.up_proj.weight"
    respoil(moved / "model.safetensors", lambda t: t[name].__setitem__((11, 7), np.inf))
    error = told("export", out, "--format", "merged")
    assert f"tensor {name} holds NaN" in error
    assert left(Path(out, "export")) == []


def test_numbers_that_the_dtype_cannot_hold(run, told):
    out, trained = run("lora.targets=[q]")
    trained["blocks"]["attention"]["q"]["b"][:] = 1e6
    run("lora.targets=[q]", step=5, trained=trained)
    error = told("export", out, "--format", "merged", "--dtype", "float16", "--step", "5")
    assert "q_proj.weight holds NaN" in error and "--dtype" in error


def test_an_unknown_module(run, base, tmp_path, told):
    out, trained = run()
    save_peft(tmp_path / "a", trained, load_spec(base), open_source(out).adapter, base_name=base)
    name = "base_model.model.lm_head.lora_A.weight"
    respoil(tmp_path / "a" / "adapter_model.safetensors",
            lambda t: t.update({name: np.ones((4, 32), np.float32)}))  # fmt: skip
    assert f"tensor {name} " in told("export", tmp_path / "a")


# --- the folder ---------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty(run, tmp_path, told, done):
    out, _ = run()
    target = tmp_path / "out"
    target.mkdir()
    done("export", out, "--out", target)  # an empty one is no obstacle
    (target / "old.txt").write_text("old")
    assert f"{target}: is not empty" in told("export", out, "--out", target)
    assert (target / "old.txt").exists()
    done("export", out, "--out", target, "--format", "merged", "--force")
    assert not (target / "old.txt").exists()
    assert not (target / "adapter_config.json").exists()
    assert (target / "config.json").exists()
    assert left(tmp_path) == ["out", "run"]
    (tmp_path / "file").write_text("x")
    assert "file: is a file" in told("export", out, "--out", tmp_path / "file", "--force")


def test_force_does_not_take_what_it_needs(run, base, tmp_path, told, monkeypatch):
    out, trained = run()
    before = left(tmp_path)
    assert "--force would remove" in told("export", out, "--out", tmp_path, "--force")
    assert "--force would remove" in told("export", out, "--out", out, "--force")
    assert "--force would remove" in told("export", out, "--out", base, "--force")
    save_peft(tmp_path / "a", trained, load_spec(base), open_source(out).adapter, base_name=base)
    assert "would remove" in told("export", tmp_path / "a", "--out", tmp_path / "a", "--force")
    monkeypatch.chdir(tmp_path / "a")
    assert "would remove" in told("export", out, "--out", tmp_path / "a", "--force")
    assert left(tmp_path) == sorted([*before, "a"])
    assert Path(base, "model.safetensors").exists()


def test_a_failure_changes_nothing(run, tmp_path, monkeypatch):
    out, _ = run()
    target = tmp_path / "out"
    export(Request(out, out=str(target)))
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(*args, **how):
        raise failure

    monkeypatch.setattr("jaxalign.export.run.model_card", fail)
    for failure in (KeyboardInterrupt(), RuntimeError("bug")):
        with pytest.raises(type(failure)):
            export(Request(out, out=str(target), force=True))
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert left(tmp_path) == ["out", "run"]
    failure = OSError(28, "No space left on device")
    with pytest.raises(UserError, match=r"\(No space left on device\)"):
        export(Request(out, out=str(target), force=True))
    assert left(tmp_path) == ["out", "run"]


def test_two_at_a_time(tmp_path):
    refused = pytest.raises(UserError, match="another process")
    with whole_folder(tmp_path / "out", "refuse") as folder:
        with refused, whole_folder(tmp_path / "out", "refuse"):
            pass
        assert folder.exists()
    assert left(tmp_path) == ["out"]


def test_a_death_between_two_moves_is_mended(tmp_path):
    """The old folder had been moved away and the new one was not yet in its place."""
    work = tmp_path / ".out.abc.partial"
    (work / "old").mkdir(parents=True)
    (work / "old" / "kept.txt").write_text("old")
    refused = pytest.raises(UserError, match="is not empty")
    with refused, whole_folder(tmp_path / "out", "refuse"):
        pass
    assert (tmp_path / "out" / "kept.txt").read_text() == "old"
    with whole_folder(tmp_path / "out", "replace"):
        pass
    assert left(tmp_path) == ["out"]
    assert left(tmp_path / "out") == ["SHA256SUMS"]


SLOW = """
import sys, time
import jaxalign.hf.stream as stream
made = stream._made
def slowly(tensor):
    if tensor.name.endswith('layers.1.mlp.up_proj.weight'):
        print('half', flush=True)
        time.sleep(60)
    return made(tensor)
stream._made = slowly
from jaxalign.cli import main
main(['export', sys.argv[1], '--format', 'merged', '--out', sys.argv[2], *sys.argv[3:]])
"""


@pytest.mark.parametrize(
    "before", ["nothing", pytest.param("an older export", marks=pytest.mark.slow)]
)
def test_a_kill_leaves_no_half_folder(run, tmp_path, before, done):
    out, _ = run()
    target = tmp_path / "out"
    words = []
    if before == "an older export":
        export(Request(out, out=str(target)))
        words = ["--force"]
    held = left(target) if target.exists() else None
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, out, str(target), *words],
        cwd=REPO, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    partial = [name for name in left(tmp_path) if name not in ("run", "out")]
    assert len(partial) == 1 and partial[0].startswith(".out.") and partial[0].endswith(".partial")
    assert (left(target) if target.exists() else None) == held
    started = time.monotonic()
    done("export", out, "--format", "merged", "--out", target, *words)
    assert time.monotonic() - started < 30
    assert left(tmp_path) == ["out", "run"]
    assert (target / "model.safetensors").exists() and not (target / "adapter_config.json").exists()
