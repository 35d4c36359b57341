"""Every golden case through the public API, at the tolerances that each case's README states."""

import json
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives import bind, resolve
from jaxalign.objectives.contrastive import similarities
from jaxalign.train.optim import make_optimiser
from jaxalign.train.phases.build import Term, build, phase_loss
from jaxalign.train.schedule import learning_rate, turns, warmup_steps
from jaxalign.train.state import Frozen, TrainState
from jaxalign.train.step import make_eval_step, make_train_step
from tests.parity.golden import CASES, find, pair_batch, task_batch
from tests.tiny import few

POOLING = {"mean": "mean", "bos": "first"}
cases = pytest.mark.parametrize("case", CASES, ids=repr)


def phases_of(case, layer, temperature, pooling="mean", detach="none", weight=1.0, remat="none"):
    decoder = case.decoder(remat=remat)
    options = {
        "layer": layer, "temperature": temperature, "detach": detach, "group": 64,
        "pooling": pooling,
    }  # fmt: skip

    def term(name, options, weight=1.0):
        return Term(name, bind(resolve(name), name, options, "options", {}, {}), weight)

    return {
        "task": build(decoder, (term("language_model", {}),)),
        "align": build(decoder, (term("contrastive", options, weight),), number=1),
    }


def settings(name):
    """`k2_T0.1_mean_uni` -> the arguments of phases_of."""
    layer, temperature, pooling, way = name.split("_")
    return {
        "layer": int(layer[1:]),
        "temperature": float(temperature[1:]),
        "pooling": POOLING[pooling],
        "detach": "target" if way == "uni" else "none",
    }


def loss_of(phase, case, batch, lora="the case's"):
    lora = case.lora if lora == "the case's" else lora
    run = jax.jit(lambda lora, base, batch: phase_loss(phase, lora, base, batch, None)[0])
    return run(lora, Frozen(case.params), batch)


def flat(tensors, names):
    return np.concatenate([np.ravel(tensors[name]) for name in sorted(names)])


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)


def test_there_are_cases():
    assert CASES, "no case.json below the golden folders"


@cases
def test_hidden_states_logits_and_task_loss(case):
    inputs, expected = case.arrays("probe_inputs.npz"), case.arrays("expected_task.npz")
    decoder, layers = case.decoder(), case.spec.layers
    forward = jax.jit(partial(decoder.forward, taps=tuple(range(layers + 1)), sows="states"))
    out = forward(case.params, case.lora, inputs["input_ids"])
    states = [out.pooled[k] for k in range(layers)] + [out.hidden]
    real = inputs["attention_mask"] == 1
    for layer, state in enumerate(states):
        np.testing.assert_allclose(
            np.asarray(state)[real], expected["hidden_states"][layer][real], atol=3e-5, rtol=0
        )
    logits = np.asarray(decoder.logits(case.params, out.hidden))
    np.testing.assert_allclose(logits[real], expected["logits"][real], atol=3e-5, rtol=0)

    batch = task_batch(inputs)
    task = phases_of(case, 1, 1.0)["task"]
    for lora, name in ((case.lora, "task_loss"), (None, "base_task_loss")):
        loss = loss_of(task, case, batch, lora)
        assert float(loss) == pytest.approx(float(expected[name]), abs=1e-5)
    base = decoder.forward(case.params, None, inputs["input_ids"][:1])
    base_logits = decoder.logits(case.params, base.hidden)[0]
    np.testing.assert_allclose(
        np.asarray(base_logits)[real[0]], expected["base_logits_row0"][real[0]], atol=3e-5, rtol=0
    )


@cases
def test_alignment_of_every_setting(case):
    inputs, expected = case.arrays("probe_inputs.npz"), case.arrays("expected_align.npz")
    batch, task = pair_batch(inputs), task_batch(inputs)
    names = [key.removeprefix("loss/") for key in expected if key.startswith("loss/")]
    assert names
    task_loss = float(loss_of(phases_of(case, 1, 1.0)["task"], case, task))
    exposed = {}
    for name in names:
        chosen = settings(name)
        align, layer = phases_of(case, **chosen)["align"], chosen["layer"]
        key = name.split("_")[0] + "_" + name.split("_")[2]
        if key not in exposed:
            exposed[key] = jax.jit(align.states)(case.lora, Frozen(case.params), batch, None)
        states = exposed[key]
        for side, vectors in enumerate((states.source, states.target)):
            np.testing.assert_allclose(
                vectors[layer], expected[f"pooled_{side}/{key}"], atol=3e-5, rtol=0
            )
        cosine = np.asarray(similarities(states.source[layer], states.target[layer])).T
        np.testing.assert_allclose(cosine, expected[f"cos/{key}"], atol=3e-6, rtol=0)
        np.testing.assert_allclose(
            cosine / chosen["temperature"], expected[f"logits/{name}"], atol=3e-5, rtol=0
        )
        (term,) = align.terms
        result = term.objective.function(states, batch)
        loss = float(term.weight * result.sum / result.count)
        assert loss == pytest.approx(float(expected[f"loss/{name}"]), abs=1e-5)
        assert task_loss + loss == pytest.approx(float(expected[f"both_loss/{name}"]), abs=2e-5)


@cases
@pytest.mark.parametrize("remat", few(("none", "names", "full"), "names"))
def test_gradients(case, remat):
    inputs, expected = case.arrays("probe_inputs.npz"), case.arrays("expected_grads.npz")
    for name in sorted({key.split("/")[0] for key in expected}):
        if name == "task":
            phase, batch = phases_of(case, 1, 1.0, remat=remat)["task"], task_batch(inputs)
        else:
            phase, batch = (
                phases_of(case, **settings(name), remat=remat)["align"],
                pair_batch(inputs),
            )
        loss = lambda lora, base, phase=phase, batch=batch: phase_loss(  # noqa: E731
            phase, lora, base, batch, None
        )[0]
        gradient = jax.jit(jax.grad(loss))
        ours = case.to_peft(gradient(case.lora, Frozen(case.params)))
        theirs = {k.split("/", 1)[1]: v for k, v in expected.items() if k.startswith(name + "/")}
        assert relative(flat(ours, theirs), flat(theirs, theirs)) < 1e-4
        for tensor, value in ours.items():
            if tensor not in theirs:
                assert not value.any(), f"{name}: {tensor} lies above the tap but has a gradient"


@cache
def trajectory(case, name):
    """Runs the paper's alternation on the golden micro-batches and compares as it goes."""
    record, run = case.arrays(f"{name}.npz"), case.facts["trajectory"]["runs"][name]
    missing = "skip" if name.endswith("skip") else "zero"
    accumulate, steps = run["gradient_accumulation"], run["optimizer_steps"]
    facts, inputs = case.facts["trajectory"], case.arrays("traj_inputs.npz")
    warmup = warmup_steps(steps, 0, facts["warmup_ratio"])
    rate = learning_rate("inverse_sqrt", facts["lr"], steps, warmup)
    beta1, beta2 = facts["optimizer"]["betas"]
    optimiser = make_optimiser(
        rate, beta1=beta1, beta2=beta2, eps=facts["optimizer"]["eps"],
        clip_norm=facts["max_grad_norm"], missing=missing,
    )  # fmt: skip
    phases = phases_of(
        case, facts["layer"], facts["temperature"], weight=facts["loss_weight"],
        pooling=POOLING[facts["pooling"]], detach="target" if facts["unidirectional"] else "none",
    )  # fmt: skip
    step = make_train_step(phases, optimiser, every="microbatch", average="microbatch", rate=rate)
    state = TrainState.create(jax.tree.map(jnp.array, case.lora), optimiser)
    build = {"task": task_batch, "align": pair_batch}
    epoch = facts["micro_batches_per_epoch"]

    width = max(array.shape[1] for array in inputs.values())  # one shape, one compilation

    def stack(phase, micros):
        batches = [build[phase](inputs, f"mb{m % epoch}/") for m in micros]
        fill = (0, 0, 0, 0, -100) if phase == "task" else (0, 0, 0, 0)
        wide = [
            type(b)(*(
                np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=v)
                for x, v in zip(b[: len(fill)], fill, strict=True)
            ))
            for b in batches
        ]  # fmt: skip
        return jax.tree.map(lambda *rows: np.stack(rows), *wide)

    for update in range(steps):
        # Each phase's n-th turn falls on global micro-batch 2n (task) or 2n + 1 (alignment).
        mine = turns("microbatch", update, accumulate, tuple(phases))
        micros = {p: [2 * n + (p == "align") for n in r] for p, r in mine.items()}
        for phase, numbers in micros.items():
            assert all(record["micro_kind"][m] == (phase == "task") for m in numbers)
        batches = {phase: stack(phase, numbers) for phase, numbers in micros.items()}
        state, metrics = step(state, Frozen(case.params), batches, None)
        assert float(metrics["learning_rate"]) == pytest.approx(record["lr_used"][update], rel=1e-6)
        assert float(metrics["grad_norm"]) == pytest.approx(record["grad_norm"][update], rel=1e-4)
        for phase, numbers in micros.items():
            np.testing.assert_allclose(
                metrics[f"{phase}/micro_losses"], record["micro_loss"][numbers], atol=2e-4, rtol=0
            )
    return state


@cases
@pytest.mark.parametrize("name", ["traj_ga4", "traj_ga1_zero", "traj_ga1_skip"])
def test_trajectories(case, name):
    record, state = case.arrays(f"{name}.npz"), trajectory(case, name)
    start, end = case.to_peft(case.lora), case.to_peft(state.trained)
    theirs = {k.removeprefix("final/"): v for k, v in record.items() if k.startswith("final/")}
    flat = lambda of: np.concatenate([np.ravel(of(k)) for k in sorted(start)])  # noqa: E731
    ours = flat(lambda k: end[k] - start[k])
    wanted = flat(lambda k: theirs.get(k, start[k]) - start[k])
    assert relative(ours, wanted) < 1e-3


@pytest.mark.parametrize("file", find("schedule.json").values(), ids=lambda file: file.parent.name)
def test_inverse_sqrt_schedule(file):
    for row in json.loads(file.read_text()):
        steps = row["optimizer_steps"]
        warmup = warmup_steps(steps, row["warmup_steps_arg"], row["warmup_ratio"])
        assert warmup == row["effective_warmup_steps"]
        rate = learning_rate("inverse_sqrt", row["base_lr"], steps, warmup)
        ours = jax.vmap(rate)(jnp.arange(steps))
        np.testing.assert_allclose(ours, row["lr_used"], rtol=2e-6, atol=1e-12)


@cases
@pytest.mark.parametrize("run", ["hf_ga1", "hf_ga4"])
def test_evaluation_losses(case, run):
    """Losses of the validation rows after the recorded updates, as the original averages them."""
    facts, expected = case.facts["trajectory"], json.loads(
        (case.folder / "expected_eval.json").read_text()
    )[run]  # fmt: skip
    rows = json.loads((case.folder / "data.json").read_text())["eval"]
    phases = phases_of(case, facts["layer"], facts["temperature"])
    steps = {name: make_eval_step(phase) for name, phase in phases.items()}
    name = {"hf_ga1": "traj_ga1_skip", "hf_ga4": "traj_ga4"}[run]
    total = facts["runs"][name]["optimizer_steps"]
    size = case.facts["batch_size"]
    for point in expected:
        assert point["step"] <= total
    # The state at the end of the recorded trajectory is that of the last evaluation.
    state = trajectory(case, name)
    point = next(p for p in expected if p["step"] == total)
    weights, task, align = [], [], []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        padded = pad_rows(part, case.facts["pad_id"])
        losses, _ = steps["task"](state.trained, Frozen(case.params), task_batch(padded))
        task.append(float(losses["language_model"].sum / losses["language_model"].count))
        losses, _ = steps["align"](state.trained, Frozen(case.params), pair_batch(padded))
        align.append(float(losses["contrastive"].sum / losses["contrastive"].count))
        weights.append(len(part))
    assert np.mean(task) == pytest.approx(point["eval_task_loss"], abs=2e-4)
    assert np.mean(align) == pytest.approx(point["eval_alignment_loss"], abs=2e-4)
    whole = np.average(np.add(task, align), weights=weights)
    assert whole == pytest.approx(point["eval_loss"], abs=2e-4)
    assert math.isfinite(whole)


def pad_rows(rows, pad_id):
    """Ragged rows as right-padded arrays."""
    fills = {"labels": -100}
    padded = {}
    for key in rows[0]:
        if not isinstance(rows[0][key], list):
            continue
        width = max(len(row[key]) for row in rows)
        fill = fills.get(key, pad_id if key.startswith("input_ids") else 0)
        padded[key] = np.array(
            [row[key] + [fill] * (width - len(row[key])) for row in rows], np.int32
        )
    return padded
