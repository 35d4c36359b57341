"""Meta-learning rules against plain definitions, in both layouts; resumed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import base as bases
from jaxalign.errors import UserError
from jaxalign.settings.data import HALVED
from jaxalign.train import setup
from jaxalign.train.loop import train
from jaxalign.train.phases import PHASES
from jaxalign.train.phases.build import Inner, phase_loss
from jaxalign.train.rules import RULES
from jaxalign.train.rules.meta import halves
from tests.tiny import ASSETS, few
from tests.train.test_loop import Killed, assert_equal, kill_after, lines, use_devices, weights
from tests.train.test_rules import relative, warm

LANGUAGES = ("de", "en", "tr")
DATA = ",".join(f"{ASSETS}/dev.{language}.jsonl" for language in LANGUAGES)
META = (
    f"task.train=[{DATA}]", f"task.valid=[{DATA}]", "task.kind=intent", "task.order=grouped",
    "task.sampling=uniform", "align.weight=0", "batch.accumulate=3", "batch.size=8",
    "batch.max_length=64", "batch.buckets=[]", "task.inner_rate=0.1", "train.eval_batches=1",
)  # fmt: skip
LAYOUTS = {
    "padded": ("batch.pack=none", "model.remat=none", "lora.dropout=0.1"),
    "end to end": ("batch.pack=flatten", "model.remat=names", "lora.dropout=0"),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def prepared(configure, rule, *words):
    """A run, what it starts from, one micro-batch, and a key where it drops."""
    run = setup.prepare(configure(*META, f"task.rule={rule}", *words))
    key = jax.random.key(5) if run.drops else None
    return run, run.phases["task"], warm(run.state.trained), run.train["task"].stack([0]), key


def loss(run, phase, trained, batch, key, number):
    own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, 0), number)
    return phase_loss(phase, trained, run.frozen, batch, own)[0]


def by_hand(run, phase, trained, batches, key):
    """The weights after the inner steps, and the gradients along the way."""
    slopes = []
    for number, batch in enumerate(batches):
        slopes.append(jax.grad(lambda t: loss(run, phase, t, batch, key, number))(trained))  # noqa: B023
        trained = jax.tree.map(lambda w, g: w - phase.inner.rate * g, trained, slopes[-1])
    return trained, slopes


def gradient(run, phase, trained, stack, key):
    rule = RULES[phase.rule].gradient
    return jax.jit(lambda t: rule(phase, t, run.frozen, stack, key, "tokens"))(trained)


def parts(stack):
    """The rows that a padded batch of numbers 0, 1, ... gives to either half."""
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), stack)
    return [jax.tree.map(lambda x, n=n: x[n::2], batch) for n in (0, 1)]


def test_halves_are_the_same_rows_in_both_layouts_on_any_mesh(configure):
    """Of a mixed order, as there the rows of a batch differ most in length."""
    words = (*META, "task.rule=maml", "task.order=mixed", "batch.size=16")
    found = []
    for layout, ways in (("none", 1), ("flatten", 1), ("flatten", 4)):
        config = configure(*words, f"batch.pack={layout}")
        base = bases.open_base(config)
        stream = PHASES["task"].stream(config, base.tokenizer, ways=ways)
        assert (stream.layout is None) == (layout == "none")
        sides = halves(stream.batch(3))
        found.append([sorted(half.rows.ravel().tolist()) for half in sides])
        if stream.layout:
            for half in sides:
                assert half.flat.tokens.shape[0] == ways
                # What the sequences hold are these rows: so many predicted tokens each.
                targets = sum(stream.rows[row].targets for row in half.rows.ravel())
                assert int(np.sum(half.flat.answers != -100)) == targets
                assert int(np.sum(half.answers != -100)) == targets
    slots = [row for (row,) in stream._order.slots(48, 64)]
    assert found[0] == [sorted(slots[0::2]), sorted(slots[1::2])]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("layout", few(LAYOUTS, "end to end"))
def test_maml_is_the_slope_of_the_loss_after_the_steps(configure, layout):
    run, phase, trained, stack, key = prepared(configure, "maml", *LAYOUTS[layout])
    support, query = halves(jax.tree.map(lambda x: jnp.asarray(x[0]), stack))
    steps = phase.inner.steps

    @jax.jit
    def after(trained):
        fast, _ = by_hand(run, phase, trained, [support] * steps, key)
        return loss(run, phase, fast, query, key, steps)

    found, metrics = gradient(run, phase, trained, stack, key)
    assert float(metrics["loss"]) == pytest.approx(float(after(trained)), rel=1e-5)
    way = jax.tree.map(lambda g: g / optax.tree.norm(found), found)
    width = 0.004
    ends = (
        jax.tree.map(lambda w, d: w + s * width * d, trained, way)  # noqa: B023
        for s in (1, -1)
    )
    up, down = (float(after(end)) for end in ends)
    # A central difference in float32: its rounding and the curvature leave about a hundredth.
    assert (up - down) / (2 * width) == pytest.approx(float(optax.tree.norm(found)), rel=1e-2)
    # The second derivatives matter at this rate.
    first, _ = gradient(run, replace(phase, rule="fomaml"), trained, stack, key)
    assert relative(first, found) > 0.02


@pytest.mark.slow
def test_first_order_rules_are_what_they_are_called(configure):
    run, phase, trained, stack, key = prepared(configure, "fomaml", *LAYOUTS["padded"])
    support, query = parts(stack)
    rate, steps = phase.inner

    @jax.jit
    def plain(trained):
        fast, _ = by_hand(run, phase, trained, [support] * 2, key)
        fomaml = jax.grad(lambda t: loss(run, phase, t, query, key, 2))(fast)
        end, _ = by_hand(run, phase, trained, [support, query], key)
        return fomaml, jax.tree.map(lambda a, b: (a - b) / (2 * phase.inner.rate), trained, end)

    assert (rate, steps) == (0.1, 2)
    at_end, way = plain(trained)
    found, _ = gradient(run, phase, trained, stack, key)
    assert relative(found, at_end) < 1e-5
    found, _ = gradient(run, replace(phase, rule="reptile"), trained, stack, key)
    assert relative(found, way) < 1e-4  # θ - φ is small against θ


@pytest.mark.slow
def test_without_a_rate_nothing_looks_ahead(configure):
    words = (*LAYOUTS["padded"], "lora.dropout=0", "task.inner_rate=0")
    run, phase, trained, stack, _ = prepared(configure, "maml", *words)
    query = jax.tree.map(lambda x: x[None], parts(stack)[1])
    plain, _ = gradient(run, replace(phase, rule="mean"), trained, query, None)
    for rule in ("maml", "fomaml"):
        found, _ = gradient(run, replace(phase, rule=rule), trained, stack, None)
        assert relative(found, plain) < 1e-6
    both = jax.tree.map(lambda *x: jnp.stack(x), *parts(stack))
    rule = lambda t: RULES["mean"].gradient(phase, t, run.frozen, both, None, "microbatch")  # noqa: E731
    plain, _ = jax.jit(rule)(trained)
    found, _ = gradient(run, replace(phase, rule="reptile"), trained, stack, None)
    assert relative(found, plain) < 1e-6


def test_blocks_that_are_not_trained_take_no_step(configure):
    words = (*LAYOUTS["padded"], "lora.layers=1..2", "task.inner_steps=1", "lora.dropout=0")
    run, phase, trained, stack, _ = prepared(configure, "fomaml", *words)
    assert phase.layer_mask.tolist() == [1, 1, 0]
    support, query = parts(stack)

    @jax.jit
    def plain(trained):
        fast, _ = by_hand(run, phase, trained, [support], None)
        moved = jax.tree.map(lambda a, b: jnp.abs(a[2] - b[2]).max(), fast, trained)
        fast = jax.tree.map(lambda a, b: a.at[2].set(b[2]), fast, trained)
        return jax.grad(lambda t: loss(run, phase, t, query, None, 1))(fast), moved

    wanted, moved = plain(trained)
    assert max(jax.tree.leaves(moved)) > 1e-4  # what the mask keeps where it is
    found, _ = gradient(run, phase, trained, stack, None)
    assert relative(found, wanted) < 1e-5


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(configure, tmp_path, monkeypatch):
    words = (*META, "task.rule=maml", "lora.dropout=0.1", "train.steps=4", "train.eval_every=2",
             "checkpoint.every=2", "train.cosine_every=4", "batch.buckets=[64]",
             "batch.accumulate=2")  # fmt: skip
    whole = configure(*words)
    result = train(whole)
    assert result.metrics["eval/task_loss"] > 0
    looks = lines(whole, "gradients")
    assert len(looks) == 1 and 0 < looks[0]["task/plain_cosine"] < 1 - 1e-7
    parted = configure(*words, f"output={tmp_path / 'parted'}")
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(Killed):
            train(parted)
    train(parted)
    assert_equal(weights(whole), weights(parted))


def test_odd_halves_and_kernels_are_refused(configure):
    with pytest.raises(UserError, match=r"batch\.size: 9 .* a multiple of 2"):
        setup.prepare(configure(*META, "task.rule=reptile", "batch.size=9"))
    with pytest.raises(UserError, match=r"task\.rule=maml differentiates twice, which the kernel"):
        setup.prepare(configure(*META, "task.rule=maml", "model.attention=splash"))
    with pytest.raises(UserError, match=r"task\.order: packed sequences hold rows of several"):
        configure(*META, "batch.pack=segments")


def test_what_a_rule_costs(configure):
    """In passes of all rows: a step is half of one, its second derivative as much again."""
    assert {*HALVED, "mean", "cached"} == set(RULES)
    cost = {name: rule.cost(Inner(0.1, 2)) for name, rule in RULES.items()}
    assert cost == {"mean": 1, "cached": 1, "maml": 2.5, "fomaml": 1.5, "reptile": 1}
    runs = [setup.prepare(configure(*META, f"task.rule={rule}")) for rule in ("mean", "maml")]
    work = [run.work("task", runs[0].train["task"].stack([0])).flops for run in runs]
    assert work[1] == 2.5 * work[0]
