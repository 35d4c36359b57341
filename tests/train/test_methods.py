"""Every configuration of configs/methods, on the tiny model: resumed, and on many devices.

A file that is put there is proved here; one that goes on from another run's adapter gets that run.
"""

from pathlib import Path

import pytest

from jaxalign.config import load
from jaxalign.train.loop import train
from tests.tiny import ASSETS
from tests.train.test_lens import measured
from tests.train.test_loop import Killed, assert_equal, kill_after, lines, use_devices, weights
from tests.train.test_meshes import MESHES, assert_close, gradients, warm_adapters

__all__ = ["measured"]

FOLDER = Path(__file__).parents[2] / "configs" / "methods"
FILES = ",".join(f"{ASSETS}/dev.{language}.jsonl" for language in ("en", "da", "de", "id", "nl"))
SPLITS = "splits: [train, valid]"
CHOICES = f"{{name: choices, options: {{answer: intent, number: 4}}, {SPLITS}}}"
DRAWN = {  # transforms that draw and are in no file: settings over `linguamap`
    "mixup": ("choice", f"{CHOICES}, {{name: mixup, {SPLITS}}}"),
    "cross_lingual_answer": ("intent", f"{{name: cross_lingual_answer, {SPLITS}}}"),
}
METHODS = [*sorted(file.stem for file in FOLDER.glob("*.yaml")), *DRAWN]
FIRST = {"alignx_2": "alignx_1", "xsgd_task": "xsgd_align"}  # stages that go on from another
TINY = ("model.remat=none", "batch.size=16", "batch.pairs=16", "train.steps=4",
        "train.eval_every=2", "train.eval_batches=1", "train.log_every=1", "checkpoint.every=2",
        "train.cosine_every=0", "optim.warmup_steps=0", "mesh.data=1", "mesh.fsdp=-1",
        "log.progress=none")  # fmt: skip


@pytest.fixture
def method(base, tmp_path, measured):
    """The settings of a method's run of four updates; what it starts from is trained."""

    def build(name, *words):
        words = (*TINY, f"model.path={base}", f"output={tmp_path / name}", *words)
        if name in DRAWN:
            kind, transforms = DRAWN[name]
            words += (
                f"task.kind={kind}", f"task.transforms=[{transforms}]", f"task.train=[{FILES}]",
                f"task.valid=[{FILES}]", "batch.buckets=[128]", "batch.max_length=128",
            )  # fmt: skip
            name = "linguamap"
        if name == "lens":
            words += (
                f"align.options={{subspace: {{file: {measured}}}}}",
                "align.languages=[en,da,de]",
            )
        if "3..4" in (FOLDER / f"{name}.yaml").read_text("utf-8"):
            words += ("lora.layers=2..3",)  # the last two here, too
        if name in FIRST:
            start = build(FIRST[name], f"output={tmp_path / 'first'}")
            if not Path(start.output).exists():
                train(start)
            words += (f"adapter.start={start.output}/adapter",)
        return load(FOLDER / f"{name}.yaml", words).config

    return build


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_resuming_is_bitwise_exact(method, tmp_path, monkeypatch, name):
    use_devices(monkeypatch, 1)
    whole = method(name)
    train(whole)
    parted = method(name, f"output={tmp_path / 'parted'}")
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(Killed):
            train(parted)
    assert train(parted).step == 4
    assert_equal(weights(whole), weights(parted))
    losses = [
        [{key: value for key, value in row.items() if "loss" in key} for row in lines(one, event)]
        for one in (whole, parted)
        for event in ("train", "eval")
    ]
    assert losses[:2] == losses[2:]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_meshes_agree_with_one_device(method, monkeypatch, name):
    warm_adapters(monkeypatch)
    use_devices(monkeypatch, 1)
    config = method(name)
    alone = gradients(config, (1, 1, 1, 1), monkeypatch)
    for mesh in ("2x2x2", "8x1"):
        assert_close(gradients(config, MESHES[mesh], monkeypatch), alone)
