"""Rows end to end behind what they share, against the same rows padded: what is trained is equal.

Losses, metrics and gradients of a micro-batch, whatever objectives look at; twenty updates; eight
devices; validation. Only dropout draws other masks.
"""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign import base as bases
from jaxalign.adapters import Lora
from jaxalign.errors import UserError
from jaxalign.objectives import FINAL, TOKENS, Loss, Needs, Tap, declare
from jaxalign.sharding import make_mesh, put_batch
from jaxalign.train import setup
from jaxalign.train.loop import _work, train
from jaxalign.train.phases.build import lost_rows
from jaxalign.train.standards import settle
from tests.tiny import few
from tests.train.test_loop import lines

SYSTEM = "prompt.system='Answer with the intent and the slots of what the user says.'"
FREE = ("batch.buckets=[]", "batch.max_length=256", SYSTEM, "train.steps=4")
LAYOUTS = {
    "padded": ("batch.pack=none",),
    "end to end": ("batch.pack=flatten", "batch.share_prefix=off"),
    "shared": ("batch.pack=auto",),
}
TAPS = (Tap(1, "last"), Tap(2, "prompt"), Tap(2, "predicts_prompt"), Tap(2, "answer"),
        Tap(2, "predicts_answer"), Tap(2, "position"), Tap(0, "mean"),
        Tap(FINAL, "first"), Tap(FINAL, "mean_rest"), Tap(1, TOKENS),
        Tap(FINAL, TOKENS))  # fmt: skip


@declare(lambda **_: {"text": Needs(TAPS, reference=(Tap(1, "mean"),), answers="trained")})
def curious(states, batch):
    """A number that depends on everything that it can see."""
    del batch
    text = states.text
    rows = jnp.cos(jnp.arange(text.real.shape[0]))  # each row counts differently
    seen = [*text.taps.values(), *text.reference.values()]
    total = sum(
        jnp.einsum("B,B...->", rows, jnp.sin(3 * x) * _kept(x, text.real)) / 100 for x in seen
    )
    return Loss(total + 0 * jnp.sum(text.answers), jnp.ones(()), {})


@declare(lambda **_: {"source": Needs(), "target": Needs((Tap(2),), reference=(Tap(2),))})
def one_sided(states, batch):
    """The base runs over the targets alone, and the sources run for nothing."""
    del batch
    moved = states.target.taps[Tap(2)] - states.target.reference[Tap(2)]
    return Loss(jnp.sum(moved**2), jnp.ones(()), {})


def each_row(states, batch):
    """Each row counts the same, however long its answer is, read at both places where it stands."""
    there = (batch.answers != -100).astype(jnp.float32)
    wanted = jnp.maximum(batch.answers, 0)[..., None]
    tokens = jnp.maximum(jnp.sum(there, -1), 1.0)
    at = jnp.take_along_axis(states.hidden, batch.answer_at[..., None], axis=1)
    found = {}
    for name, hidden in (("given", states.text.answers), ("looked_up", at)):
        scores = jax.nn.log_softmax(hidden.astype(jnp.float32) @ states.head.T)
        own = jnp.take_along_axis(scores, wanted, axis=-1)[..., 0]
        found[name] = -jnp.sum(jnp.sum(own * there, -1) / tokens)
    rows = jnp.sum(jnp.any(there, -1).astype(jnp.float32))
    return Loss(found["given"] + 2 * found["looked_up"], rows, found)


def _kept(x, real):
    return real[:, : x.shape[1], None] if x.ndim == 3 else 1.0


@pytest.fixture(autouse=True)
def warm(monkeypatch):
    """B is zero at the start: give it values, or every gradient of A would be zero."""
    init = Lora.init
    monkeypatch.setattr(
        Lora,
        "init",
        lambda *args: jax.tree.map(
            lambda w: w + 0.03 * jnp.cos(jnp.arange(w.size) ** 1.5).reshape(w.shape), init(*args)
        ),
    )


def gradients(config, names=("task", "align")):
    """{phase: (gradient, metrics)} of two micro-batches, and the run."""
    run = setup.prepare(config)
    found = {}
    with jax.set_mesh(run.mesh):
        settle(run, None)
        for name in names:
            stack = put_batch(run.mesh, run.train[name].stack([0, 1]), stacked=True)
            found[name] = jax.device_get(
                run.step.gradient(name, run.state, run.frozen, stack, None)
            )
    return found, run


def assert_equal(found, expected, relative=1e-5):
    for name, (gradient, metrics) in expected.items():
        for ours, theirs in zip(
            jax.tree.leaves(found[name][0]), jax.tree.leaves(gradient), strict=True
        ):
            assert np.linalg.norm(ours - theirs) <= relative * np.linalg.norm(theirs)
        assert found[name][1].keys() == metrics.keys()
        for what, value in metrics.items():
            np.testing.assert_allclose(found[name][1][what], value, rtol=1e-5, err_msg=what)


WORDS = {
    "plain": (),
    "standardised": ("align.states=standardised",),
    "mean_rest": ("align.pooling=mean_rest", "align.negatives=global"),
    "last": ("align.pooling=last", "align.detach=target"),
    "all that an objective may see": (f"task.objective={__name__}:curious",),
    "a row each": (f"task.objective={__name__}:each_row",),
    "cka and drift": (
        "objectives=[{objective: cka, phase: align}, {objective: drift, phase: align}]",
    ),
    "cached": ("align.rule=cached", "align.negatives=global"),
    "nf4": ("model.quantize=nf4",),
    "remat": ("model.remat=names",),
    "a prefix": ("adapter.kind=prefix", "model.quantize=nf4"),
    "a soft prompt": ("adapter.kind=prompt", "model.remat=full", "adapter.num_virtual_tokens=3"),
}


@pytest.mark.parametrize("case", few(WORDS, "standardised", "a row each"))
def test_what_is_trained_is_that_of_padded_rows(configure, one_device, case):
    words = [*FREE, *WORDS[case], "lora.dropout=0"]
    expected, padded = gradients(configure(*words, *LAYOUTS["padded"]))
    for layout in ("end to end", "shared"):
        found, run = gradients(configure(*words, *LAYOUTS[layout]))
        assert_equal(found, expected)
        task = run.train["task"]
        assert (len(task.layout.stem.tokens) > 20) == (layout == "shared")
    counted, computed = task.tokens(0)
    assert counted > 0.85 * computed and padded.train["task"].tokens(0)[1] > 2 * computed


def test_prompts_that_depend_on_the_text_have_padded_rows(configure, one_device):
    found, run = gradients(configure(*FREE, "adapter.kind=pool", "adapter.num_virtual_tokens=2"))
    assert all(stream.layout is None for stream in run.train.values())
    own = found["task"][0]["pool"]
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in own.values())
    with pytest.raises(UserError, match=r"batch\.pack: segments puts several texts"):
        configure("adapter.kind=pool", "batch.pack=segments")


MESHES = {"8x1": (8, 1, 1, 1), "2x2x2": (2, 2, 2, 1), "1x1x4": (1, 1, 4, 1)}


@pytest.mark.parametrize(
    ("case", "mesh"),
    few(product(("plain", "a row each"), MESHES), ("plain", "2x2x2"), ("a row each", "2x2x2")),
)
def test_devices_have_a_stem_each(configure, monkeypatch, case, mesh):
    words = [*FREE, *WORDS[case], "lora.dropout=0", "batch.size=16", "batch.pairs=16"]
    make = lambda *shape: make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])  # noqa: E731
    monkeypatch.setattr(bases, "make_mesh", lambda *_: make(1, 1, 1, 1))
    expected, _ = gradients(configure(*words, *LAYOUTS["padded"]))
    monkeypatch.setattr(bases, "make_mesh", lambda *_: make(*MESHES[mesh]))
    found, run = gradients(configure(*words))
    assert_equal(found, expected)
    assert run.train["task"].layout.ways == MESHES[mesh][0] * MESHES[mesh][1]
    assert len(run.train["task"].layout.stem.tokens) > 20


@pytest.mark.parametrize("case", ["plain", "a row each"])
def test_packed_rows_share_too(configure, one_device, case):
    """Slots of a fixed length hold more rows; each row's loss is the one that it has alone."""
    free = [*FREE, *WORDS[case], "lora.dropout=0"]
    words = [*free, "batch.size=2"]
    found, run = gradients(configure(*words, "batch.pack=segments"), names=("task",))
    stream = run.train["task"]
    assert len(stream.layout.lengths) == 1 and stream.layout.most > 1
    rows = [row for index in (0, 1) for slot in stream._slots(index) for row in slot]
    length = max(stream.layout.lengths) - len(stream.layout.stem.tokens)
    assert sum(len(stream.rows[row].tokens) for row in rows) > 1.5 * 2 * length
    whole = setup.prepare(configure(*free, *LAYOUTS["padded"]))
    batch = whole.train["task"]._made([(row,) for row in rows], 160)
    stack = jax.tree.map(lambda x: x[None], batch)
    with jax.set_mesh(whole.mesh):
        expected = whole.step.gradient("task", whole.state, whole.frozen, stack, None)
    (gradient, metrics), (slopes, ours) = jax.device_get(expected), found["task"]
    for one, other in zip(jax.tree.leaves(slopes), jax.tree.leaves(gradient), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
    np.testing.assert_allclose(ours["loss"], metrics["loss"], rtol=1e-5)


@pytest.mark.slow
def test_twenty_updates_are_those_of_padded_rows(configure, one_device, tmp_path):
    words = [*FREE, "lora.dropout=0", "train.steps=20", "align.every=joint"]
    words.append("optim.learning_rate=0.003")
    configs = [
        configure(*words, *LAYOUTS[layout], f"output={tmp_path / layout}")
        for layout in ("padded", "shared")
    ]
    for config in configs:
        train(config)
    padded, shared = (
        [line for event in ("train", "eval") for line in lines(config, event)] for config in configs
    )
    assert len(padded) == len(shared) > 20
    for one, other in zip(padded, shared, strict=True):
        for name, value in one.items():
            if "loss" in name or "grad_norm" in name or "accuracy" in name:
                np.testing.assert_allclose(other[name], value, rtol=2e-4, err_msg=name)
    useful = [
        np.mean([line["tokens_useful"] for line in log if line["event"] == "train"])
        for log in (padded, shared)
    ]
    assert useful[1] > 0.85 > useful[0]


def test_a_pass_counts_the_tokens_of_the_sides_that_it_reads(configure, one_device):
    words = (*FREE, f"align.objective={__name__}:one_sided")
    for layout in ("padded", "end to end", "shared"):
        run = setup.prepare(configure(*words, *LAYOUTS[layout]))
        stream, batch = run.train["align"], run.train["align"].batch(0)
        work = _work(run, "align", batch, stream.counted([0]))
        read = [side for one in run.phases["align"].passes for side in one.sides]
        assert read.count("source") < read.count("target") == 2
        real = {"source": batch.source_mask.sum(), "target": batch.target_mask.sum()}
        counted = sum(real[side] for side in read)
        if layout == "padded":
            assert work.tokens == len(read) * stream.size * batch.source.shape[1]
        if layout != "shared":
            assert work.counted == counted
        assert work.counted <= min(counted, work.tokens)


def test_rows_whose_states_are_lost_are_named(configure, one_device):
    run = setup.prepare(configure(*FREE, "lora.dropout=0"))
    phase, batch = run.phases["task"], run.train["task"].batch(0)
    with jax.set_mesh(run.mesh):
        states = jax.jit(lambda batch: phase.states(run.state.trained, run.frozen, batch, None))
        found = states(batch)
        assert not lost_rows(found).any()
        own = int(np.flatnonzero(batch.flat.segments[0] == 3)[-1])
        place = int(np.flatnonzero(batch.flat.answer_at[0] == own - 1)[0])
        answers = found.text.answers.at[0, place].set(jnp.nan)
        view = found.text._replace(answers=answers)
        lost = lost_rows(found._replace(views={"text": view}))
    assert np.flatnonzero(lost).tolist() == [2]


def test_a_longer_batch_than_all_before_gets_its_own_length(configure, one_device):
    stream = setup.prepare(configure(*FREE)).train["task"]
    layout, known = stream.layout, max(stream.layout.lengths)
    own = [layout.own([(row,)]) for row in range(len(stream.rows))]
    slots = [[(int(np.argmax(own)),)] * 8 * 3]
    wide = layout.__class__(**{**vars_of(layout), "size": 24})
    length = wide.fitting(slots)
    assert length > known and length not in layout.lengths
    flat = wide.flat(slots[0], length)
    assert flat.tokens.shape == (1, length) and flat.answer_at.shape == (1, length)


def vars_of(layout):
    names = ("rows", "stem", "size", "most", "ways", "lengths", "pad_id", "block")
    return {name: getattr(layout, name) for name in names}


@pytest.mark.parametrize("words", [("batch.buckets=[64]",), ("mesh.seq=2",)])
def test_what_cannot_be_flattened_is_refused(configure, words):
    with pytest.raises(UserError, match=r"batch\.pack"):
        configure("batch.buckets=[]", "batch.pack=flatten", *words)


def test_a_bare_off_is_the_word(configure):
    assert configure("batch.share_prefix=off").batch.share_prefix == "off"


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(configure, one_device, tmp_path):
    """With dropout, whose masks follow from the step alone."""
    words = [*FREE, "checkpoint.every=2", "lora.dropout=0.1", "train.eval_every=0"]
    whole = configure(*words, f"output={tmp_path / 'whole'}")
    train(whole)
    parts = [configure(*words, f"output={tmp_path / 'parts'}", f"train.steps={n}") for n in (2, 4)]
    for config in parts:
        train(config)
    one, other = (load_file(f"{config.output}/adapter/adapter_model.safetensors")
                  for config in (whole, parts[1]))  # fmt: skip
    assert all((one[name] == other[name]).all() for name in one)
