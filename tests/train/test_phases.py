"""What objectives ask for is what they get, by one builder; a phase more is a file more."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.objectives import FINAL, TOKENS, Loss, Needs, Tap, both_sides, declare
from jaxalign.train import setup
from jaxalign.train.design import heads_of
from jaxalign.train.loop import train
from jaxalign.train.phases import PHASES, facts_of
from jaxalign.train.phases.align import Align, retrieval
from jaxalign.train.phases.build import build, passes_of, phase_loss
from jaxalign.train.phases.facts import Facts
from jaxalign.train.phases.walk import Pass
from jaxalign.train.state import HEADS, without_heads
from tests.tiny import SPEC
from tests.train.test_loop import lines

SEEN = {}  # what an objective of these tests was given
TAPS = (Tap(1, "last"), Tap(2, "prompt"), Tap(2, "answer"), Tap(FINAL, "first"), Tap(1, TOKENS),
        Tap(FINAL, TOKENS), Tap(FINAL, "predicts_prompt"),
        Tap(FINAL, "predicts_answer"))  # fmt: skip
QUIET = ("train.eval_every=0", "task.valid=[]", "align.valid=[]", "checkpoint.every=100")


@declare(lambda **_: {"text": Needs(TAPS, reference=(Tap(1, "last"),), answers="trained")})
def curious(states, batch):
    SEEN["states"], SEEN["batch"] = states, batch
    return Loss(jnp.sum(states.text.answers), jnp.ones(()), {})


def unmarked(states, batch):
    """It may read rows in their order: nobody says that it does not."""
    return Loss(jnp.sum(states.text.answers), jnp.ones(()), {})


@declare(lambda **_: {"text": Needs(answers="trained")})
def unpooled(states, batch):
    return Loss(jnp.sum(states.text.answers), jnp.ones(()), {})


def own(name):
    return f"{__name__}:{name}"


def test_passes_are_the_union_of_needs():
    one = both_sides(Needs((Tap(2),)))
    two = {"source": Needs((Tap(1, TOKENS),), reference=(Tap(1, TOKENS),))}
    assert passes_of([one]) == (Pass(("source", "target"), (Tap(2),)),)
    assert passes_of([one, two]) == (
        Pass(("source", "target"), (Tap(2), Tap(1, TOKENS))),
        Pass(("source",), (Tap(1, TOKENS),), model="reference"),
    )
    teacher = {"student": Needs(answers="trained"), "teacher": Needs(answers="stopped")}
    assert passes_of([teacher]) == (
        Pass(("student",), (), answers=("student",)),
        Pass(("teacher",), (), answers=("teacher",), model="stopped"),
    )
    with pytest.raises(ValueError, match="both trained and stopped"):
        passes_of([{"text": Needs(answers="trained")}, {"text": Needs(answers="stopped")}])


AlignX = "{objective: contrastive, phase: task, options: {view: text, group: %d}}"


@pytest.mark.parametrize(
    ("phase", "block", "words"),
    [
        ("task", 0, []),  # each row counts alone
        ("task", 4, [f"objectives=[{AlignX % 4}]"]),
        ("task", 1, [f"objectives=[{{objective: '{own('unmarked')}', phase: task}}]"]),
        ("task", 0, [f"objectives=[{{objective: '{own('curious')}', phase: task}}]"]),
        ("align", 32, ["batch.pairs=64"]),
        ("align", 0, ["align.negatives=global"]),
        ("align", 1, ["align.objective=cka"]),  # the n-th tokens of both sides meet
        ("align", 0, ["align.objective=cka", "align.options={rows: pooled}"]),
    ],
)  # fmt: skip
def test_rows_change_places_only_where_no_term_is_another(configure, phase, block, words):
    assert facts_of(configure(*words), phase).block(configure(*words)) == block


def test_an_objective_gets_what_it_asked_for(configure):
    run = setup.prepare(configure(f"task.objective={own('curious')}", "lora.dropout=0"))
    phase, batch = run.phases["task"], run.train["task"].batch(0)
    trained = jax.tree.map(lambda w: w + 0.02, run.state.trained)
    with jax.set_mesh(run.mesh):
        states = jax.jit(lambda t: phase.states(t, run.frozen, batch, None))(trained)
        wide = jax.jit(
            lambda t: run.decoder.forward(
                run.frozen.base, t, batch.tokens, taps=(1, 2), sows="states"
            )
        )(trained)
        base = run.decoder.forward(run.frozen.base, None, batch.tokens, taps=(1,), sows="states")
    text, real = states.text, batch.segments != 0
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)  # noqa: E731
    close(text.taps[Tap(1, TOKENS)], wide.pooled[1])
    close(text.taps[Tap(FINAL, TOKENS)], wide.hidden)
    last = real.sum(-1) - 1
    rows = np.arange(len(last))
    close(text.taps[Tap(1, "last")], wide.pooled[1][rows, last])
    close(text.reference[Tap(1, "last")], base.pooled[1][rows, last])
    close(text.taps[Tap(FINAL, "first")], wide.hidden[:, 0])
    for pool, role in (("prompt", 2), ("answer", 3)):
        mine = (batch.roles == role)[..., None]
        assert mine.any(1).all()
        close(text.taps[Tap(2, pool)], (wide.pooled[2] * mine).sum(1) / mine.sum(1))
        shifted = (wide.hidden[:, :-1] * mine[:, 1:]).sum(1) / mine[:, 1:].sum(1)
        close(text.taps[Tap(FINAL, f"predicts_{pool}")], shifted)
    places = batch.answer_at[..., None]
    close(text.answers, np.take_along_axis(np.asarray(wide.hidden), places, axis=1))
    assert phase.blocks(run.spec) == run.spec.layers and phase.answers
    # The reference runs one block; its work is a forward pass without the adapter.
    alone = build(run.decoder, [term for term in phase.terms if term.name != "curious"])
    assert alone.passes == ()
    assert phase.tokens(2, 10) == 40


@declare(lambda pool, **_: {"text": Needs((Tap(1, pool),))})
def pooled(states, batch, *, pool): ...


@pytest.mark.parametrize("pool", ["mean", "last", "first", "prompt", "predicts_answer"])
def test_packed_rows_have_no_vectors_of_their_own(configure, pool):
    objective = f"task.objective={own('pooled')}", f"task.options={{pool: {pool}}}"
    words = "batch.pack=segments", "batch.share_prefix=off", *objective
    run = setup.prepare(configure(*words, "align.weight=0", "task.valid=[]"))
    assert run.train["task"].layout is None
    with pytest.raises(UserError, match=r"batch\.pack: segments puts several rows"):
        batch = run.train["task"].batch(0)
        run.phases["task"].states(run.state.trained, run.frozen, batch, None)


def test_packed_rows_have_no_answers_of_their_own(configure):
    """Behind a stem they have (`test_flat.py`): the loss would depend on there being one."""
    words = "batch.pack=segments", "batch.share_prefix=off", "align.weight=0", "task.valid=[]"
    run = setup.prepare(configure(*words, f"task.objective={own('unpooled')}"))
    with pytest.raises(UserError, match=r"segments puts several rows .* objective unpooled reads"):
        phase, batch = run.phases["task"], run.train["task"].batch(0)
        jax.eval_shape(lambda t: phase_loss(phase, t, run.frozen, batch, None), run.state.trained)


@declare(lambda tap, **_: both_sides(Needs((Tap(*tap),))))
def odd(states, batch, *, tap): ...


@pytest.mark.parametrize(
    ("tap", "says"),
    [
        ("[1, answer]", "rows that have none"),
        ("[1, tokens, standardised]", "no mean and deviation"),
        ("[1, average]", "objective odd: Tap.pool is 'average', which is not among mean,"),
        ("[1, mean, standardized]", "Tap.states is 'standardized', which is not among raw, stand"),
    ],
)
def test_a_tap_that_cannot_be(configure, tap, says):
    with pytest.raises(UserError, match=says):
        words = f"align.objective={own('odd')}", f"align.options={{tap: {tap}}}"
        run = setup.prepare(configure(*words, "train.metric=eval/align/odd/nothing"))
        run.phases["align"].states(run.state.trained, run.frozen, run.train["align"].batch(0), None)


@declare(lambda **_: both_sides(Needs((Tap(1), Tap(2, "mean", "standardised")))))
def mixed(states, batch):
    raw, even = states.source.taps[Tap(1)], states.source.taps[Tap(2, "mean", "standardised")]
    return Loss(jnp.sum(raw) + jnp.sum(even), jnp.ones(()), {})


@pytest.mark.slow
def test_raw_and_standardised_taps_side_by_side(configure):
    config = configure(f"align.objective={own('mixed')}", "train.steps=2", *QUIET)
    train(config)
    run = setup.prepare(configure(f"align.objective={own('mixed')}"))
    assert list(run.frozen.standards) == [Tap(2, "mean", "standardised")]


def distance(states, batch, *, layer: int):
    apart = jnp.square(states.source[layer] - states.target[layer]).sum(-1)
    return Loss(apart.sum(), jnp.float32(len(apart)), {})


def test_a_term_sees_what_it_asked_for_alone(configure):
    """Without a mark `states.source[layer]` is one tap, whatever another term reads there."""

    def loss(*words):
        run = setup.prepare(configure(f"align.objective={own('distance')}", *words))
        phase, batch = run.phases["align"], run.train["align"].batch(0)
        with jax.set_mesh(run.mesh):
            losses = phase_loss(phase, run.state.trained, run.frozen, batch, None)[1]
        return losses["distance"].sum

    words = "align.options={layer: 2}", "lora.dropout=0"
    other = "objectives=[{objective: contrastive, phase: align, options: {pooling: last}}]"
    np.testing.assert_allclose(loss(*words, other), loss(*words), rtol=1e-5)


@declare(
    lambda **_: {"text": Needs((Tap(1),))},
    settings="layer",
    head=lambda spec, key, width, **_: {"w": jax.random.normal(key, (spec.dim, width))},
)
def headed(states, batch, *, layer: int, width: int, head):
    assert layer == 2  # the setting of the phase
    squares = jnp.sum((states.text[1] @ head["w"]) ** 2, axis=-1)
    return Loss(jnp.sum(squares), jnp.asarray(len(squares), jnp.float32), {})


def with_head(*words):
    return (
        f"objectives=[{{objective: '{own('headed')}', options: {{width: 3}}}}]", *QUIET,
        "lora.layers=1..2", "checkpoint.every=2", *words,
    )  # fmt: skip


@pytest.mark.slow
def test_a_head_is_kept_by_a_checkpoint(configure, tmp_path):
    whole = train(configure(*with_head("train.steps=4"), f"output={tmp_path / 'whole'}"))
    parts = configure(*with_head("train.steps=2"), f"output={tmp_path / 'parts'}")
    train(parts)
    parts.train.steps = 4
    resumed = train(parts)
    files = [Path(one.adapter, "adapter_model.safetensors") for one in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_head_is_trained_and_not_exported(configure):
    run = setup.prepare(configure(*with_head()))
    head = run.state.trained[HEADS]["headed"]["w"]
    assert head.shape == (run.spec.dim, 3) and HEADS not in without_heads(run.state.trained)
    assert run.trained_count == sum(x.size for x in jax.tree.leaves(run.state.trained)) - sum(
        leaf[2:].size for leaf in jax.tree.leaves(run.state.trained["blocks"])
    )
    gradient = jax.grad(
        lambda t: phase_loss(run.phases["task"], t, run.frozen, run.train["task"].batch(0), None)[0]
    )(run.state.trained)
    assert np.abs(gradient[HEADS]["headed"]["w"]).max() > 0
    with pytest.raises(UserError, match="skip works on adapters only"):
        setup.prepare(configure(*with_head("optim.missing=skip")))


def test_a_term_may_count_in_every_second_update(configure):
    config = configure(
        f"objectives=[{{objective: '{own('curious')}', every: 2, weight: 2}}]", "train.steps=4",
        "align.weight=0", "lora.dropout=0", *QUIET,
    )  # fmt: skip
    train(config)
    for number, line in enumerate(lines(config, "train"), start=1):
        extra = 2 * line["task/curious"] if number % 2 == 0 else 0.0
        assert line["task/loss"] == pytest.approx(line["task/language_model"] + extra, rel=1e-4)


def test_a_setting_is_not_contradicted(configure):
    with pytest.raises(UserError, match=r"contradicts align\.layer=2"):
        setup.prepare(configure("align.options={layer: 1}"))
    with pytest.raises(UserError, match=r"objectives\[0\].options.layer=9 is outside this model"):
        words = "objectives=[{objective: contrastive, phase: task, options: {layer: 9}}]"
        setup.prepare(configure(words))


@declare(lambda layers, depth, **_: both_sides(Needs(tuple(Tap(k) for k in (*layers, depth)))))
def several(states, batch, *, layers, depth: int = 8): ...


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("align.options={layers: [1, 2, 9]}",), r"align\.options\.layers=9 is outside this model"),
        (("align.options={layers: [1], depth: 9}",), r"align\.options\.depth=9 is outside"),
        (("align.options={layers: [1]}",), r"objective several: layer=8 is outside"),
        (("align.options={layers: [9]}", "align.layer=9"), r"align\.options\.layers=9 is outside"),
        (("align.objective=contrastive", "align.layer=9"), r"align\.layer=9 is outside"),
    ],
)
def test_a_layer_past_the_model_is_told_where_it_stands(configure, words, message):
    config = configure(f"align.objective={own('several')}", *words)
    with pytest.raises(UserError, match=f"^{message}"):
        Facts.check(facts_of(config, "align"), config, SPEC, full=False)


def test_sentences_that_end_in_token_0_are_others():
    """Token 0 is a word in some tokenizers; numpy's texts end before it."""
    rows = [SimpleNamespace(target=np.array(ids, np.int32)) for ids in ([5, 7], [5, 7, 0])]
    crossed = {"source": {Tap(1): np.eye(2)}, "target": {Tap(1): np.eye(2)[::-1]}}
    states = [(np.array([0, 1]), crossed)]
    assert retrieval(SimpleNamespace(rows=rows), states, Tap(1)) == 0
    assert retrieval(SimpleNamespace(rows=[rows[0]] * 2), states, Tap(1)) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("objectives=[{objective: contrastiv, phase: align}]", "did you mean 'contrastive'"),
        ("align.objective=nowhere:loss", "'nowhere:loss' cannot be imported"),
    ],
)
def test_a_wrong_name_is_wrong_in_a_phase_that_is_off_too(configure, word, message):
    """Else a baseline runs for hours before the system that it is compared with is refused."""
    with pytest.raises(UserError, match=message):
        setup.prepare(configure("align.weight=0", word))


def test_heads_of_one_name_are_not_one_head(configure):
    config = configure(f"objectives=[{{objective: '{own('headed')}', options: {{width: 3}}}}]")
    phases = setup.prepare(config).phases
    with pytest.raises(UserError, match=r"'headed' trains a head in both phases"):
        heads_of(phases | {"align": phases["task"]}, None, jax.random.key(0))


def grad_norm(states, batch):
    return Loss(jnp.zeros(()), jnp.ones(()), {})


def test_the_log_keeps_its_own_names(configure):
    with pytest.raises(UserError, match=r"the log of the task phase already has a grad_norm"):
        setup.prepare(configure(f"objectives=[{{objective: '{own('grad_norm')}'}}]"))


def test_the_frozen_base_is_not_there_in_full_fine_tuning(configure):
    with pytest.raises(UserError, match="compares with the frozen base"):
        setup.prepare(configure("align.objective=drift", "trainable=full"))


class Second(Align):
    """Alignment once more, at the first block."""

    name, number = "second", 2

    def part(self, config):
        return config.align

    def offers(self, config):
        return super().offers(config) | {"layer": 1}


@pytest.mark.parametrize(
    "every",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("microbatch", "step")), "joint"],
)
def test_a_third_phase_is_a_third_row(configure, monkeypatch, every):
    monkeypatch.setitem(PHASES, "second", Second())
    config = configure(
        f"align.every={every}", "batch.accumulate=3", "train.steps=3", "train.eval_every=3",
        "train.metric=eval/second_loss",
    )  # fmt: skip
    result = train(config)
    assert result.stopped == "finished" and "eval/second/contrastive/cosine" in result.metrics
    found = lines(config, "train")
    turns = [{name for name in PHASES if f"{name}/loss" in line} for line in found]
    assert turns == ([{name} for name in PHASES] if every == "step" else [set(PHASES)] * 3)
    assert all(("gradient_cosine" in line) is False for line in found)  # it is of two phases
