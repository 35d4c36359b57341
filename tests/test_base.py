"""One opener: each part of a base is read when it is needed, once, for a probe and a training."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import jaxalign
from jaxalign import base as bases
from jaxalign.base import open_base
from jaxalign.config import load
from jaxalign.errors import UserError
from jaxalign.probe import auto
from jaxalign.probe.choice import Choice
from jaxalign.sharding import make_mesh
from jaxalign.train import loop, setup
from tests.tiny import ASSETS, SPEC, base, configure, rows  # noqa: F401  (fixtures)

SHORT = ("task.weight=0", "train.steps=1", "train.eval_every=0", "batch.accumulate=1")


@pytest.fixture(autouse=True)
def reads(monkeypatch):
    """On one device; the dtypes in which weights were read."""
    read, real = [], bases.load_params
    monkeypatch.setattr(
        bases, "make_mesh", lambda *axes: make_mesh(*axes, devices=jax.devices()[:1])
    )
    monkeypatch.setattr(
        bases,
        "load_params",
        lambda path, spec, dtype, *rest: (
            read.append(jnp.dtype(dtype).name) or real(path, spec, dtype, *rest)
        ),
    )
    return read


@pytest.fixture
def pairs(tmp_path):
    """Just enough pairs for a probe."""
    lines = (ASSETS / "pairs_xsid.jsonl").read_text("utf-8").splitlines()
    german = [line for line in lines if '"de"' in line][:32]
    (tmp_path / "pairs.jsonl").write_text("\n".join(german) + "\n")
    return f"align.train=[{tmp_path / 'pairs.jsonl'}]"


def test_auto_from_python_reads_the_base_once(configure, pairs, reads, capsys):  # noqa: F811
    config = configure("align.layer=auto", pairs, *SHORT)
    opened = open_base(config)
    result = jaxalign.train(config, base=opened)
    assert reads == ["float32"] and result.step == 1
    assert "align.layer=auto chose block" in capsys.readouterr().out
    saved = load(Path(config.output, "config.yaml")).config
    assert 1 <= saved.align.layer <= SPEC.layers
    assert opened.wear(result.adapter).lora is not None  # with the weights of the training
    assert jaxalign.train(config).repeated
    assert reads == ["float32"]


def test_auto_of_a_full_training_reads_the_base_once(
    configure,  # noqa: F811
    pairs,
    reads,
    monkeypatch,
):
    def rounded(base):  # noqa: F811
        assert {leaf.dtype.name for leaf in jax.tree.leaves(base.bare().params)} == {"bfloat16"}
        return Choice(2, 3, 1.0, 0.0)

    monkeypatch.setattr(auto, "choose", rounded)
    config = configure("align.layer=auto", pairs, "trainable=full", "model.dtype=bfloat16", *SHORT)
    monkeypatch.setattr(loop, "train", lambda config, *_: setup.prepare(config, base=_[-1]))
    run = jaxalign.train(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.state.trained)} == {jnp.dtype("float32")}
    assert reads == ["float32"]


def test_weights_are_rounded_as_if_they_were_read_so(configure, reads):  # noqa: F811
    config = configure("model.dtype=bfloat16")
    rounded, plain = open_base(config, held="float32"), open_base(config)
    for ours, theirs in zip(*map(jax.tree.leaves, (rounded.params, plain.params)), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert reads == ["float32", "bfloat16"]
    taken = plain.opened.take("float32")  # bfloat16 cannot be widened again
    assert jax.tree.leaves(taken)[0].dtype == jnp.float32
    assert reads == ["float32", "bfloat16", "float32"]
    assert plain.opened.weights("float32") is not taken


def test_parts_that_need_no_weights_read_none(configure, reads):  # noqa: F811
    opened = open_base(configure())
    assert len(opened.tokenizer) <= opened.spec.vocab and opened.fingerprint
    opened.opened.check_vocabulary()
    assert opened.opened.tokenizer is opened.tokenizer and not reads


def test_a_training_on_another_base_is_refused(configure, reads):  # noqa: F811
    opened = open_base(configure())
    for words, key in (("model.dtype=bfloat16", "model.dtype"), ("mesh.tensor=1", "")):
        other = configure(words)
        if not key:
            opened.under(other)
            continue
        with pytest.raises(UserError, match=f"{key}: the base was opened with float32"):
            loop.train(other, base=opened)
    other = dataclasses.replace(configure(), mesh=dataclasses.replace(configure().mesh, data=2))
    with pytest.raises(UserError, match="mesh: the base was opened with"):
        opened.under(other)
    assert not reads


def test_a_tokenizer_of_another_model(base, tmp_path):  # noqa: F811
    for file in Path(base).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    (tmp_path / "SHA256SUMS").unlink(missing_ok=True)
    opened = open_base(load(None, [f"model.path={tmp_path}"]).config)
    with pytest.raises(UserError, match=r"tokenizer knows \d+ tokens, the model only 100"):
        opened.opened.check_vocabulary()


def test_no_model():
    with pytest.raises(UserError, match=r"model\.path is empty"):
        open_base(load(None, []).config)


def test_blanks_of_an_answer_stay_where_the_model_wrote_them():
    """Some tokenizers are saved with a clean-up that takes them away: `ça va ?` is `ça va?`."""
    words = ["Comment ça va ?", "rome , nord"]
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.train_from_iterator(
        words * 50,
        trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>"),
    )
    found = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=True)
    ids = [found(text, add_special_tokens=False)["input_ids"] for text in words]
    assert found.decode(ids[0]) == "Comment ça va?"
    assert bases.Base.decode(SimpleNamespace(tokenizer=found), ids) == words


def test_rows_are_within_the_positions_of_the_model(configure, base, tmp_path):  # noqa: F811
    """Its tokenizer names no limit; `generate` refuses such prompts, too."""
    row = {"utterance": "word " * 600, "intent": "none", "slots": [], "lang": "en"}
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row | {"id": n}) + "\n" for n in range(8)))
    words = [f"task.train=[{file}]", "task.valid=[]", "align.weight=0", "task.kind=intent"]
    words += ["batch.max_length=4096", "batch.buckets=[]"]
    folder = tmp_path / "short"
    shutil.copytree(base, folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"max_position_embeddings": 256}))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"batch.max_length: the longest row of task has \d+ tok"):
        setup.prepare(configure(*words, f"model.path={folder}"))
    with pytest.raises(UserError, match=r"positions for 252; set batch.max_length=252"):
        setup.prepare(configure(*words, f"model.path={folder}", "adapter.kind=prefix",
                                "adapter.num_virtual_tokens=4"))  # fmt: skip
