"""A run from settings to a PEFT folder: resuming is exact, only the adapter moves, both lose."""

import dataclasses
import json
import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign.errors import UserError
from jaxalign.hf.load import load_params
from jaxalign.hf.peft import load_peft
from jaxalign.paths import Desk
from jaxalign.train import loop, same, setup
from jaxalign.train.loop import train
from jaxalign.train.resume import check_settings
from jaxalign.train.stop import Request
from jaxalign.train.watch import Watch
from tests.tiny import few


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs on the first of the eight devices unless a test asks for more."""
    use_devices(monkeypatch, 1)


def use_devices(monkeypatch, number):
    make = bases.make_mesh
    chosen = jax.devices()[:number]

    def limited(*axes):
        from jaxalign.sharding import make_mesh

        return make_mesh(*axes, devices=chosen)

    assert make is not None
    monkeypatch.setattr(bases, "make_mesh", limited)


def lines(config, event):
    text = Path(config.output, "log.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["event"] == event]


def weights(config):
    from jaxalign.hf.load import load_spec

    return load_peft(f"{config.output}/adapter", load_spec(config.model.path))[0]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_both_losses_fall_and_only_the_adapter_is_written(configure, base):
    before = {f.name: f.read_bytes() for f in Path(base).iterdir()}
    config = configure("train.steps=30", "train.eval_every=10", "lora.dropout=0.0")
    result = train(config)
    steps = lines(config, "train")
    assert [row["step"] for row in steps] == list(range(1, 31))
    assert steps[-1]["task/loss"] < steps[0]["task/loss"] - 0.05
    first, last = ([row["align/loss"] for row in part] for part in (steps[:5], steps[-5:]))
    assert np.mean(last) < np.mean(first)
    assert {"gradient_cosine", "align/contrastive/spread", "task/grad_norm"} <= steps[0].keys()
    assert -1 <= steps[0]["gradient_cosine"] <= 1
    assert result.step == 30 and result.best_step in (10, 20, 30)
    assert {f.name for f in Path(result.adapter).iterdir()} == {
        "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
    }  # fmt: skip
    assert {f.name: f.read_bytes() for f in Path(base).iterdir()} == before


@pytest.mark.parametrize("off", ["task", "align"])
def test_either_objective_alone(configure, off):
    config = configure(f"{off}.weight=0", f"{off}.train=[]", f"{off}.valid=[]")
    result = train(config)
    on = {"task": "align", "align": "task"}[off]
    row = lines(config, "train")[-1]
    assert f"{on}/loss" in row and f"{off}/loss" not in row and "gradient_cosine" not in row
    b = weights(config)["blocks"]["mlp"]["down"]["b"]
    assert b[:2].any()
    # Layer 2 is the tap: alignment alone never moves block 3.
    assert b[2].any() == (on == "task")
    assert result.metrics[f"eval/{on}_loss"] > 0


@pytest.mark.parametrize("every", few(("microbatch", "step", "joint"), "microbatch"))
def test_turns_decide_which_losses_are_logged(configure, every):
    config = configure(f"align.every={every}", "train.cosine_every=2", "train.steps=4")
    train(config)
    seen = [{name for name in ("task", "align") if f"{name}/loss" in row}
            for row in lines(config, "train")]  # fmt: skip
    both = {"task", "align"}
    assert seen == {"step": [{"task"}, {"align"}] * 2}.get(every, [both] * 4)
    assert len(lines(config, "gradients")) == 2


@pytest.mark.parametrize(
    "extra",
    [
        (),
        pytest.param(("batch.accumulate=1",), marks=pytest.mark.slow),
        pytest.param(("batch.pack=segments",), marks=pytest.mark.slow),
        pytest.param(
            ("adapter.kind=prefix", "batch.buckets=[]", "batch.max_length=256"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("adapter.kind=prompt", "adapter.num_virtual_tokens=3", "optim.missing=skip"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("adapter.kind=pool", "adapter.num_virtual_tokens=3", "adapter.pool_size=4"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resuming_is_bitwise_exact(configure, tmp_path, monkeypatch, extra):
    whole = configure(*extra)
    train(whole)
    parted = configure(*extra, f"output={tmp_path / 'parted'}")
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        train(parted)
    monkeypatch.undo()
    use_devices(monkeypatch, 1)
    result = train(parted)
    assert result.step == 6
    assert_equal(weights(whole), weights(parted))
    volatile = ("time", "tokens_per_second", "seconds_per_step", "mfu")
    strip = lambda rows: [{k: v for k, v in r.items() if not k.endswith(volatile)} for r in rows]  # noqa: E731
    assert strip(lines(whole, "train")) == strip(lines(parted, "train"))
    assert strip(lines(whole, "eval")) == strip(lines(parted, "eval"))


class Killed(BaseException):
    """As sudden as a signal: nothing of the package catches it."""


def kill_after(monkeypatch, steps):
    real = loop._batches

    def dying(run, start):
        for number, item in enumerate(real(run, start)):
            if start + number == steps:
                raise Killed
            yield item

    monkeypatch.setattr(loop, "_batches", dying)


def test_resuming_on_other_devices(configure, tmp_path, monkeypatch):
    """8 devices to 4: the restored state is the saved one, bit for bit, and goes on as well."""
    use_devices(monkeypatch, 8)
    whole = configure("lora.dropout=0.0")
    train(whole)
    parted = configure("lora.dropout=0.0", f"output={tmp_path / 'parted'}")
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        train(parted)
    monkeypatch.undo()
    use_devices(monkeypatch, 4)
    restored = {}
    real = loop.resume

    def spy(run, store):
        start = real(run, store)
        restored["state"], restored["run"] = jax.device_get(start.state), run
        return start

    monkeypatch.setattr(loop, "resume", spy)
    train(parted)
    assert restored["run"].mesh.size == 4
    assert int(restored["state"].step) == 3
    # The run on 8 devices keeps step 3 too: what came back on 4 equals it bit for bit.
    store = loop.Checkpoints(whole.output, 2)
    monkeypatch.undo()
    use_devices(monkeypatch, 8)
    kept = store._newest.restore(3)["state"]["trained"]
    assert_equal(kept, restored["state"].trained)
    store.close()
    for a, b in zip(jax.tree.leaves(weights(whole)), jax.tree.leaves(weights(parted)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=0)


def test_early_stopping_keeps_the_best(configure, monkeypatch):
    """Scripted losses decide when; the real validation runs, the exported weights are step 4's."""
    script = iter([3.0, 1.0, 2.0, 2.0, 0.5])
    real = loop.validate
    monkeypatch.setattr(
        loop, "validate", lambda run, state: real(run, state) | {"eval/loss": next(script)}
    )
    config = configure("train.steps=20", "train.eval_every=2", "train.patience=2")
    result = train(config)
    assert (result.stopped, result.step, result.best_step) == ("patience", 8, 4)
    assert result.metrics["eval/loss"] == 1.0
    assert [row["eval/loss"] for row in lines(config, "eval")] == [3.0, 1.0, 2.0, 2.0]
    store = loop.Checkpoints(config.output, 2)
    assert_equal(store._best.restore(4)["state"]["trained"], weights(config))
    store.close()


def test_a_signal_saves_and_stops(configure):
    config = configure("train.steps=500", "train.eval_every=0", "checkpoint.every=1000")
    done = threading.Event()

    def ask():
        while not done.is_set():
            log = Path(config.output, "log.jsonl")
            if log.exists() and log.read_text().count("\n") > 3:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            done.wait(0.05)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        result = train(config)
    finally:
        done.set()
        asker.join()
    assert result.stopped == "signal" and 3 < result.step < 500
    assert Path(config.output, "checkpoints", str(result.step)).is_dir()


@pytest.mark.parametrize(
    ("at", "words", "stopped"),
    [
        (3, ["train.eval_every=0"], "signal"),
        (6, ["train.eval_every=0"], "finished"),
        (2, ["train.eval_every=1", "train.patience=1"], "patience"),
    ],
)
def test_a_stop_counts_while_there_is_something_left(configure, monkeypatch, at, words, stopped):
    script = iter([1.0, 1.0])
    monkeypatch.setattr(loop, "validate", lambda *_: {"eval/loss": next(script)})

    class Asked(Request):
        def __call__(self, step):
            return step >= at

    monkeypatch.setattr(loop, "stop_signal", lambda: nullcontext(Asked()))
    result = train(configure("checkpoint.every=1000", *words))
    assert (result.stopped, result.step) == (stopped, at)


def test_full_fine_tuning_goes_through_the_same_step(configure, base):
    config = configure("trainable=full", "optim.learning_rate=0.001", "train.steps=8",
                       "train.eval_every=4")  # fmt: skip
    result = train(config)
    evals = lines(config, "eval")
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"]
    from jaxalign.hf.load import load_spec

    spec = load_spec(result.adapter)
    old, new = (load_params(path, spec, "float32") for path in (base, result.adapter))
    both = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in both)


def test_a_subset_of_layers_moves_alone(configure):
    config = configure("lora.layers=1..2")
    train(config)
    b = weights(config)["blocks"]["attention"]["q"]["b"]
    assert b[0].any() and b[1].any() and not b[2].any()
    facts = json.loads(Path(config.output, "adapter", "adapter_config.json").read_text())
    assert facts["layers_to_transform"] == [0, 1]


def test_no_recompilation_after_warm_up(configure):
    config = configure("train.steps=12", "train.eval_every=4", "train.log_every=4")
    run = setup.prepare(config)
    folder = config.output
    with Desk(folder) as desk, Watch(config, folder) as watch, jax.set_mesh(run.mesh):
        loop._train(run, "training", None, desk, watch)
    assert run.step.gradient._cache_size() == 2  # one task length, one pair length
    assert run.step.apply._cache_size() == 1
    assert all(step._cache_size() == 1 for step in run.evaluate.values())


def test_resume_with_other_settings_or_base_is_refused(configure, base, tmp_path):
    import shutil

    config = configure("train.steps=3")
    train(config)
    with pytest.raises(UserError, match=r"lora\.r=4, now it is 2"):
        train(configure("train.steps=6", "lora.r=2"))
    with pytest.raises(UserError, match=r"holds a run at step 3; choose another output"):
        train(configure("checkpoint.resume=never"))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "SHA256SUMS").unlink(missing_ok=True)  # changed on purpose
    from safetensors.numpy import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="was trained on another base model"):
        train(configure("train.steps=6", f"model.path={other}"))
    # More steps of the same run are fine.
    assert train(configure("train.steps=6")).step == 6


def test_the_adapter_that_a_run_began_from_may_move(configure, monkeypatch):
    """It is compared by content; where that is not known, by its name."""
    content = {"old": "a", "moved": "a", "other": "b", "gone": ""}
    monkeypatch.setattr(same, "began_from", lambda config: content[config.adapter.start])
    saved = {"config": dataclasses.asdict(configure("adapter.start=old")), "began_from": "a"}

    def check(start, saved=saved):
        check_settings(configure(f"adapter.start={start}"), saved, judged=True)

    check("moved")
    with pytest.raises(UserError, match="began from another adapter than other holds now"):
        check("other")
    check("old", {"config": saved["config"]})
    for start, known in (("gone", saved), ("moved", {"config": saved["config"]})):
        with pytest.raises(UserError, match=f"with adapter.start=old, now it is {start}"):
            check(start, known)


def test_a_setting_that_an_older_checkpoint_did_not_save(configure):
    """It was at its default then, so it must be now, where it may not change."""
    saved = dataclasses.asdict(configure("lora.r=4"))
    del saved["model"]["quantize"], saved["lora"]["variant"], saved["train"]["patience"]

    def check(*words):
        check_settings(configure(*words), {"config": saved}, judged=True)

    check("train.patience=3")  # no matter of the state
    with pytest.raises(UserError, match=r"was trained with model\.quantize=none, now it is nf4"):
        check("model.quantize=nf4")
    with pytest.raises(UserError, match=r"was trained with lora\.variant=lora, now it is dora"):
        check("lora.variant=dora")
    with pytest.raises(UserError, match=r"was trained with lora\.ranks\.q=nothing, now it is 2"):
        check("lora.ranks.q=2")
    saved["lora"]["forgotten"] = 7  # of a version that could do what this one cannot
    with pytest.raises(UserError, match=r"was trained with lora\.forgotten=7, now it is nothing"):
        check()


def test_a_full_disk_leaves_the_older_checkpoint(configure, monkeypatch):
    """Files may not grow past a limit, as on a full disk: step 3 survives and is gone on from."""
    import resource

    config = configure("train.eval_every=0", "task.valid=[]", "align.valid=[]")
    real = loop.Checkpoints.save
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def save(self, step, *rest, **options):
        if step == 6:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
        return real(self, step, *rest, **options)

    monkeypatch.setattr(loop.Checkpoints, "save", save)
    monkeypatch.setattr(loop.Log, "_write", lambda *_: None)
    try:
        with pytest.raises(UserError, match=r"could not be written.*step 3 is intact"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    monkeypatch.setattr(loop.Checkpoints, "save", real)
    run = setup.prepare(dataclasses.replace(config))
    with jax.set_mesh(run.mesh):
        store = loop.Checkpoints(config.output, 2)
        start = loop.resume(run, store).step
        store.close()
    assert start == 3
