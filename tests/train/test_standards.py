"""Standardised states: what is measured, what it does to a loss that is flat, how it is kept."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import base as bases
from jaxalign.config import load
from jaxalign.hf.load import load_params
from jaxalign.hf.save import save_base
from jaxalign.objectives import Loss, Needs, Tap, declare
from jaxalign.objectives.standards import FORMS, Form, Moments, Standards, standardise
from jaxalign.settings import AlignConfig
from jaxalign.sharding import make_mesh
from jaxalign.train import setup, standards
from jaxalign.train.flat import DEVIATION, DUPLICATES, warnings
from jaxalign.train.loop import train
from tests.tiny import SPEC
from tests.train.test_loop import lines

LAYER = 2
TAP = Tap(LAYER, "mean", "standardised")


@pytest.fixture(scope="module")
def massive(base, tmp_path_factory):
    """The tiny base with one dimension of the residual stream a hundred times the others."""
    params = jax.tree.map(np.array, load_params(base, SPEC, np.float32))
    params["embed"][:, 5] = 2.0
    folder = tmp_path_factory.mktemp("massive") / "base"
    save_base(folder, params, SPEC, tokenizer_from=base)
    return str(folder)


def test_standards_are_the_moments_of_the_training_pairs(configure):
    run = setup.prepare(configure("align.states=standardised", "batch.pairs=8"))
    with jax.set_mesh(run.mesh):
        found = standards.measure(run)
        (tap, one), stream = next(iter(found.items())), run.train["align"]
        raw = run.frozen._replace(standards={tap: Standards.neutral(SPEC.dim)})
        rows = []
        for index in range(stream.epoch_batches):
            _, kept = run.evaluate["align"](run.state.trained, raw, stream.batch(index))
            rows += [np.asarray(kept[side][tap]) for side in ("source", "target")]
    vectors = np.concatenate(rows).astype(np.float64)
    assert tap == TAP and len(vectors) == 128
    np.testing.assert_allclose(one.mean, vectors.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(one.scale, 1 / vectors.std(0), rtol=1e-5)
    meta = json.loads(json.dumps(standards.to_meta(found)))
    kept = standards.from_meta(meta, "first")[tap]
    np.testing.assert_array_equal(kept.mean, one.mean)
    np.testing.assert_array_equal(kept.scale, one.scale)
    for older in (str(LAYER), f"{LAYER}/mean"):  # as older versions wrote it
        old = standards.from_meta({older: meta[f"{LAYER}/mean/standardised"]}, "mean")
        assert list(old) == [tap]
    other = {tap._replace(states="trimmed"): one}
    assert list(standards.from_meta(standards.to_meta(other), "mean")) == list(other)
    even = np.asarray(standardise(vectors.astype(np.float32), one))
    np.testing.assert_allclose(even.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(even.std(0), 1, rtol=1e-4)


FORMED = TAP._replace(states="centred")


@declare(lambda **_: {"source": Needs((TAP,)), "target": Needs(reference=(TAP, FORMED))})
def toward_base(states, batch):
    """A source goes where the base without the adapter puts its target."""
    apart = states.source.taps[TAP] - states.target.reference[TAP]
    told = jnp.sum(states.target.reference[FORMED])
    return Loss(jnp.sum(apart**2), jnp.float32(len(apart)), {"told": told})


def test_states_of_the_base_alone_have_standards_too(configure):
    run = setup.prepare(configure(f"align.objective={__name__}:toward_base"))
    run.state = run.state.replace(trained=jax.tree.map(lambda w: w + 0.05, run.state.trained))
    with jax.set_mesh(run.mesh):
        standards.settle(run, None)
        found = run.frozen.standards
        one, stream = found[FORMED], run.train["align"]
        phase, blank = run.phases["align"], dict.fromkeys(found, Standards.neutral(SPEC.dim))
        raw = run.frozen._replace(standards=blank)
        look = jax.jit(lambda batch: phase.states(run.state.trained, raw, batch, None))
        views = [look(stream.batch(n)).views for n in range(stream.epoch_batches)]
    targets = np.concatenate([view["target"].reference[FORMED] for view in views])
    np.testing.assert_allclose(one.mean, targets.mean(0), rtol=1e-4, atol=1e-6)
    assert np.abs(one.mean - found[TAP].mean).max() > 1  # that is of the adapter's states


def test_a_constant_dimension_is_left_out():
    moments = Moments(3)
    moments.add(10, np.array([5.0, 1e4, 0.0]), 10 * np.array([4.0, 1e-9, 0.0]))
    np.testing.assert_array_equal(moments.standards().scale, [0.5, 0, 0])


def test_what_each_form_subtracts_and_multiplies_with():
    moments = Moments(4)
    moments.add(10, np.array([1.0, 2.0, -70.0, 0.0]), 10 * np.array([1.0, 4.0, 100.0, 0.25]))
    found = {form: moments.standards(form) for form in FORMS}  # energies 2, 8, 5,000, 0.25
    np.testing.assert_array_equal(found["standardised"].mean, [1, 2, -70, 0])
    np.testing.assert_allclose(found["standardised"].scale, [1, 0.5, 0.1, 2])
    np.testing.assert_array_equal(found["centred"].mean, [1, 2, -70, 0])
    np.testing.assert_array_equal(found["centred"].scale, [1, 1, 1, 1])
    np.testing.assert_array_equal(found["trimmed"].mean, [0, 0, 0, 0])
    np.testing.assert_array_equal(found["trimmed"].scale, [1, 1, 0, 1])


def test_every_form_is_a_setting():
    (chosen,) = (f for f in dataclasses.fields(AlignConfig) if f.name == "states")
    assert chosen.metadata["about"].bounds.choices == get_args(Form) == ("raw", *FORMS)


def test_a_massive_dimension_makes_the_raw_loss_flat(configure, massive, rows, tmp_path, capsys):
    # Sentences that share most words: states that are not drowned find them before any training.
    written = (rows / "pairs.jsonl").read_text("utf-8").splitlines()[:8]
    texts = [json.loads(line)["text1"] for line in written]
    pairs = [json.dumps({"text0": text, "text1": f"please {text}"}) + "\n" for text in texts]
    (tmp_path / "eight.jsonl").write_text("".join(pairs), "utf-8")
    found = {}
    for states in ("raw", "trimmed", "standardised"):
        config = configure(
            f"model.path={massive}", f"align.states={states}", "task.weight=0", "align.valid=[]",
            "train.steps=6", "align.temperature=1.0", "optim.learning_rate=1e-5", "lora.dropout=0",
            "batch.accumulate=1", f"output={tmp_path / states}",
            f"align.train=[{tmp_path}/eight.jsonl]",
            "checkpoint.every=100", "train.eval_every=0",
        )  # fmt: skip
        train(config)
        losses = [line["align/loss"] for line in lines(config, "train")]
        found[states] = losses, capsys.readouterr().out
    raw, said = found["raw"]
    assert "loss is almost flat" in said and "align.states=standardised" in said
    # Flat: cosines that differ by 1e-3 at temperature 1 move the loss by less than that.
    assert raw[0] == pytest.approx(np.log(8), abs=2e-3) and raw[-1] > 0.99 * np.log(8)
    mended, said = found["standardised"]
    assert mended[0] < 0.7 * np.log(8) and mended[-1] < mended[0] - 5e-4 and "flat" not in said
    trimmed, _ = found["trimmed"]  # of cosines that are not about their mean
    assert trimmed[0] < 0.95 * np.log(8) and trimmed[-1] < trimmed[0] - 5e-4


def test_a_flat_loss_of_a_further_term_is_told_with_its_own_options():
    term = (
        "objectives=[{objective: contrastive, phase: align, options: {layer: 3, temperature: 2}}]"
    )
    config = load(None, ["align.objective=cka", term]).config
    (said,) = warnings(config, {DEVIATION: 0.01, DUPLICATES: 0.0})
    assert "at layer 3 deviate" in said and "a tenth of temperature=2:" in said
    assert [*warnings(config, {DEVIATION: 0.3, DUPLICATES: 0.0})] == [*warnings(config, {})] == []


@pytest.mark.slow
def test_a_resumed_run_keeps_its_standards(configure, monkeypatch, tmp_path):
    words = ["align.states=standardised", "task.weight=0", "train.eval_every=0", "align.valid=[]"]
    whole = train(configure(*words, f"output={tmp_path / 'whole'}"))
    parts = [*words, f"output={tmp_path / 'parts'}"]
    train(configure(*parts, "train.steps=3"))

    def fail(run):
        raise AssertionError("measured again")

    monkeypatch.setattr(standards, "measure", fail)
    resumed = train(configure(*parts, "train.steps=6"))
    files = [Path(one.adapter, "adapter_model.safetensors") for one in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_eight_devices_measure_what_one_does(configure, monkeypatch):
    found = []
    for shape in ((1, 1, 1, 1), (2, 2, 2, 1)):
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = make_mesh(*shape, devices=devices)
        monkeypatch.setattr(bases, "make_mesh", lambda *_, mesh=mesh: mesh)
        run = setup.prepare(configure("align.states=standardised"))
        with jax.set_mesh(run.mesh):
            found.append(standards.measure(run)[TAP])
            standards.settle(run, None)
        assert run.frozen.standards[TAP].mean.sharding.is_fully_replicated
    np.testing.assert_allclose(found[0].mean, found[1].mean, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found[0].scale, found[1].scale, rtol=2e-5)


def test_copies_among_the_candidates_are_told(configure, rows, tmp_path, capsys):
    """Few pairs, or a sentence with translations into several languages."""
    texts = [f"message number {n} from me" for n in range(8)]
    pairs = [{"text0": f"{word} {text}", "text1": text} for text in texts for word in ("oui", "ja")]
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    words = ("task.weight=0", "align.valid=[]", "train.steps=1", "batch.accumulate=1",
             f"align.train=[{file}]", "train.eval_every=0", "align.states=standardised",
             "batch.pairs=16")  # fmt: skip
    said = {}
    for way in ("keep", "mask"):
        options = f"align.options={{duplicates: {way}}}"
        config = configure(*words, options, f"output={tmp_path / way}")
        train(config)
        (line,) = lines(config, "train")
        assert line["align/contrastive/duplicates"] == 1
        said[way] = capsys.readouterr().out
    sentence = "100% of the pairs meet a copy of their own target among the wrong candidates"
    assert f"warning: align: {sentence}; add duplicates: mask to align.options" in said["keep"]
    assert "copy of their own" not in said["mask"]
