"""Distillation through the real decoder: its teachers, a resume, every command of such a run."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import Lora
from jaxalign.cli import main
from jaxalign.config import to_yaml
from jaxalign.errors import UserError
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import save_peft
from jaxalign.objectives import Loss, Needs, Tap, declare
from jaxalign.train import setup
from jaxalign.train.design import adapter_of
from jaxalign.train.flops import training_flops
from jaxalign.train.loop import train
from jaxalign.train.phases import facts_of
from jaxalign.train.phases.build import phase_loss
from tests.tiny import ASSETS, few
from tests.train.test_loop import (
    Killed,
    assert_equal,
    kill_after,
    lines,
    use_devices,
    weights,
)

WORDS = (
    "task.kind=intent", "align.rows=prompts", "align.objective=distil", "batch.pairs=4",
    f"align.train=[{ASSETS}/dev.en.jsonl, {ASSETS}/dev.de.jsonl]",
    f"align.valid=[{ASSETS}/dev.en.jsonl, {ASSETS}/dev.de.jsonl]",
    "align.transforms=[{name: part, options: {share: 0.2}, splits: [train, valid]}]",
    "batch.max_length=64", "batch.buckets=[64]", "lora.dropout=0",
)  # fmt: skip
BOTH = "objectives=[{objective: language_model, phase: align, options: {view: student}}]"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def warm(tree, size=0.03):
    return jax.tree.map(
        lambda w: w + size * jnp.cos(jnp.arange(w.size) ** 1.5).reshape(w.shape), tree
    )


@pytest.fixture
def moved(monkeypatch):
    """Adapters begin with a B that is not zero."""
    init = Lora.init
    monkeypatch.setattr(Lora, "init", lambda *args: warm(init(*args), 0.3))


@pytest.fixture
def first(configure, tmp_path):
    """The folder of an adapter that an earlier run might have left, as large as one likes."""

    def build(size):
        config = configure(*WORDS)
        spec = load_spec(config.model.path)
        adapter = adapter_of(config, spec)
        shapes = jax.eval_shape(partial(adapter.init, spec), jax.random.key(0), None)
        trained = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        save_peft(tmp_path / "first", warm(trained, size), spec, adapter)
        return f"adapter.start={tmp_path / 'first'}"

    return build


def distilled(run):
    """The mean of the term over a micro-batch of the run as it begins."""
    with jax.set_mesh(run.mesh):
        batch = run.train["align"].batch(0)
        losses, _ = run.evaluate["align"](run.state.trained, run.frozen, batch)
    return float(losses["distil"].sum / losses["distil"].count)


def by_hand(run, batch, temperature, trained):
    """T^2 KL, row by row, from whole logits of the decoder; the teacher is constant."""
    params, total, count = run.frozen.base, 0.0, 0
    head = run.decoder.head(params).astype(jnp.float32)
    for row in range(batch.answers.shape[0]):
        there = batch.answers[row] >= 0
        found = {}
        for name, side in batch.sides().items():
            tokens = side.tokens[row][side.real[row] != 0]
            hidden = run.decoder.forward(params, trained, jnp.asarray(tokens[None])).hidden[0]
            logits = hidden[side.answer_at[row][there]].astype(jnp.float32) @ head.T
            found[name] = jax.nn.log_softmax(logits / temperature)
        teacher = jax.lax.stop_gradient(found["teacher"])
        total += temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - found["student"]))
        count += there.sum()
    return total / count


def test_value_and_gradient_are_those_of_whole_logits(configure, moved):
    run = setup.prepare(configure(*WORDS, "align.options.temperature=2.0", "batch.pairs=2"))
    phase, batch = run.phases["align"], run.train["align"].batch(0)
    assert [(one.model, one.sides) for one in phase.passes] == [
        ("trained", ("student",)), ("stopped", ("teacher",)),
    ]  # fmt: skip
    rows, places = batch.answers.shape  # each pass reads the answer of its own side
    of = partial(training_flops, run.spec, rows * 64, 64, None, run.multiplied, rows * places)
    assert run.work("align", batch).flops == of() + of("forward")
    ours = lambda t: phase_loss(phase, t, run.frozen, batch, None)[0]  # noqa: E731
    with jax.set_mesh(run.mesh):
        value, gradient = jax.jit(jax.value_and_grad(ours))(run.state.trained)
        theirs = jax.value_and_grad(partial(by_hand, run, batch, 2.0))
        wanted, slopes = jax.jit(theirs)(run.state.trained)
    # By hand, the rounding of the normalisers is in the sum.
    assert float(value) == pytest.approx(float(wanted), abs=2e-6) and value > 1e-3
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


BESIDE = Tap(1)


@declare(lambda **_: {
    "student": Needs((BESIDE,), reference=(BESIDE,)), "teacher": Needs((BESIDE,)),
})  # fmt: skip
def beside(states, batch):
    """Reads states of sides whose answers come from another pass."""
    seen = states.student.taps, states.student.reference, states.teacher.taps
    return Loss(sum(jnp.sum(one[BESIDE]) for one in seen), jnp.ones(()), {})


@pytest.mark.parametrize("teacher", few(("base", "start", "online"), "base"))
def test_a_term_beside_it_changes_nothing_for_the_student(configure, first, teacher):
    """The frozen base also runs for the student's states; its answers are not the student's."""
    found = []
    for more in ("", f", {{objective: '{__name__}:beside', phase: align, weight: 0}}"):
        words = (*WORDS, first(0.2), BOTH.replace("]", f"{more}]"), "batch.pairs=2")
        run = setup.prepare(configure(*words, f"align.options.teacher={teacher}"))
        phase, batch = run.phases["align"], run.train["align"].batch(0)
        ours = partial(phase_loss, phase, frozen=run.frozen, batch=batch, key=None)
        with jax.set_mesh(run.mesh):
            both = jax.jit(jax.value_and_grad(ours, has_aux=True))
            (value, _), gradient = both(run.state.trained)
        found.append((value, gradient))
    (alone, slopes), (value, gradient) = found
    assert float(value) == pytest.approx(float(alone), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_teachers(configure, first):
    """Where both read one prompt, only a teacher with other weights has something to say."""
    start = first(0.2)
    own = (*WORDS, "align.pivot=''", BOTH, start)
    found, passes = {}, {}
    for teacher in ("online", "start", "base"):
        run = setup.prepare(configure(*own, f"align.options.teacher={teacher}"))
        found[teacher], passes[teacher] = distilled(run), run.phases["align"].passes
        assert (run.frozen.start is not None) == (teacher == "start")
        assert run.phases["align"].number == 1
    assert found["online"] < 1e-9 > found["start"] and found["base"] > 1e-4
    assert [one.model for one in passes["start"]] == ["trained", "start"]
    run = setup.prepare(configure(*own, "align.options.teacher=start", "adapter.start=null"))
    assert run.frozen.start is None and distilled(run) < 1e-9  # a fresh adapter is the base
    planned = facts_of(run.config, "align").batch(jax.ShapeDtypeStruct((4, 64), jnp.int32))
    shapes = jax.eval_shape(
        partial(phase_loss, run.phases["align"]), run.state.trained, run.frozen, planned, None
    )
    assert shapes[0].shape == ()


@pytest.mark.slow
def test_a_resumed_run_has_its_teacher(configure, first, tmp_path, monkeypatch):
    """Bit for bit, by the weights that it began with; by others it does not go on."""
    words = (*WORDS, BOTH, first(0.03), "align.options.teacher=start", "train.steps=4",
             "lora.dropout=0.1", "train.eval_every=2", "checkpoint.every=2",
             "task.weight=0",
             "task.valid=[]")  # fmt: skip
    whole = configure(*words)
    result = train(whole)
    assert result.metrics["eval/align_loss"] > 0
    assert {"align/distil", "align/distil/agreement", "align/language_model/accuracy"} <= lines(
        whole, "train"
    )[-1].keys()
    parted = configure(*words, f"output={tmp_path / 'parted'}")
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(Killed):
            train(parted)
    first(0.05)
    with pytest.raises(UserError, match=r"parted began from another adapter than"):
        train(parted)
    first(0.03)
    train(parted)
    assert_equal(weights(whole), weights(parted))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("align.objective=contrastive",),
            "objective contrastive reads source and target, and the rows of the align phase have "
            "student and teacher; choose another",
        ),
        (
            ("align.rows=pairs",),
            "distil reads student and teacher, and the rows of the align phase have source and",
        ),
        (
            ("trainable=full", "align.options.teacher=start"),
            "objective distil compares with the frozen base, which full fine-tuning does not keep",
        ),
        (
            (BOTH.replace("view: student", "view: teacher"),),
            "objectives: distil and language_model read the answer of teacher from two models "
            r"\(stopped and trained\), and each side is run once; leave one of them out",
        ),
        (
            (
                "align.rows=pairs",
                "align.objective=language_model",
                "align.options={view: source}",
            ),
            "objective language_model predicts the answer of source, and the rows of the align "
            "phase have none there; choose another objective",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(configure, words, says):
    from jaxalign.base import open_base

    config = configure(*WORDS, *words)
    with pytest.raises(UserError, match=says):
        facts_of(config, "align").check(config, open_base(config).spec, config.trainable == "full")


@pytest.mark.slow
def test_every_command(configure, tmp_path, capsys):
    """A run with the teacher of the moment, under full fine-tuning too."""
    train(
        configure(*WORDS, BOTH, "trainable=full", "train.steps=2", "output=" + str(tmp_path / "f"))
    )
    config = configure(*WORDS, BOTH, "train.steps=2", f"evaluate.data=[{ASSETS}/test.de.jsonl]",
                       "evaluate.rows=2", "generate.max_new_tokens=4", "task.weight=0",
                       "task.valid=[]")  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config), "utf-8")
    adapter = f"{config.output}/adapter"
    parallel = f"{ASSETS}/dev.*.jsonl"
    for words in (
        ("train",),
        ("evaluate", "--adapter", f"a={adapter}"),
        ("probe", "--parallel", parallel, "--adapter", f"a={adapter}", "--out", tmp_path / "p"),
        ("plan", "--data", "--topology", "h100:1"),
        ("data", "show"),
    ):
        command = words[: 2 if words[0] == "data" else 1]
        assert main([*command, str(file), *map(str, words[len(command) :])]) == 0, words
    out = tmp_path / "exported"
    assert main(["export", config.output, "--format", "merged", "--out", str(out)]) == 0
    card = (out / "README.md").read_text("utf-8")
    assert "distil, weight 1" in card and "rows of two prompts" in card
    assert json.loads((out / "config.json").read_text("utf-8"))


@pytest.mark.slow
def test_rules_give_one_gradient(configure, moved):
    """The loss is of each row alone, so that all rows at once give what micro-batches give."""
    # At temperature 1 student and teacher hardly differ here: their gradient is the small rest of
    # two large ones, and holds the rounding of those.
    words = (*WORDS, "align.options.teacher=base", "align.options.temperature=0.05")
    found = []
    for rule in ("mean", "cached"):
        run = setup.prepare(configure(*words, f"align.rule={rule}"))
        with jax.set_mesh(run.mesh):
            stack = run.train["align"].stack([0, 1])
            found.append(run.step.gradient("align", run.state, run.frozen, stack, None))
    (mean, logs), (cached, others) = found
    assert float(logs["distil"]) == pytest.approx(float(others["distil"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(cached), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
