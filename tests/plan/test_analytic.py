"""The formula: arrays exactly, peaks within its precision of what the TPU compiler reserved."""

from dataclasses import replace

import jax
import pytest

from jaxalign.chips import CHIPS
from jaxalign.errors import UserError
from jaxalign.model.spec.tensors import parameter_count
from jaxalign.plan.analytic import PRECISION, estimate
from jaxalign.plan.programs import job
from jaxalign.plan.run import find_spec, plan_run
from jaxalign.plan.topology import parse
from jaxalign.sharding import make_mesh
from jaxalign.train.design import adapter_of, design
from tests.plan.conftest import config

WEIGHTS = 8_030_261_248
ADAPTER = 20_971_520


def formula(place, *words, only=("task",)):
    return plan_run(config(*words), parse(place), only, how="formula")


# Peaks by the TPU compiler, libtpu 0.0.42, Llama 3 8B (GB).
COMPILED = [
    ("v5e:4x4", (), "task", 5.08),
    ("v5e:4x4", (), "align", 5.09),
    ("v5e:4x4", ("model.quantize=int8",), "task", 4.64),
    ("v6e:2x4", (), "task", 9.49),
    ("v5p:2x2x1", ("mesh.data=4", "mesh.fsdp=1"), "task", 30.86),
]


@pytest.mark.parametrize(("place", "words", "name", "peak"), COMPILED)
def test_the_formula_is_near_the_compiler(place, words, name, peak):
    plan = formula(place, *words, only=(name,))
    assert plan.programs[0].source == "formula"
    assert plan.peak / 1e9 == pytest.approx(peak, rel=PRECISION)


def test_arrays_are_counted_exactly():
    (program,) = formula("h100:8").programs
    batch = 5 * 32 * 512 * 4 / 8
    trained = 3 * ADAPTER * 4  # adapter and two moments, whole on every chip
    counter = 2 * 4  # updates done, in the state and in the optimiser's
    assert program.arguments == pytest.approx(WEIGHTS * 2 / 8 + trained + batch + counter, rel=1e-4)


def test_full_fine_tuning_keeps_everything_in_float32():
    (program,) = formula("h100:8", "trainable=full", "align.weight=0", only=("update",)).programs
    # Weights, two moments, the gradient.
    assert program.arguments == pytest.approx(4 * 4 * WEIGHTS / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "less"),
    [
        ((), ("model.remat=full",)),
        (("model.remat=none",), ()),
        ((), ("model.quantize=int8",)),
        ((), ("batch.size=16",)),
        (("mesh.data=2",), ()),
        ((), ("batch.max_length=256",)),
    ],
)
def test_what_saves_memory_saves_it_by_formula(words, less):
    assert formula("v5e:4x4", *less).peak < formula("v5e:4x4", *words).peak


def test_a_quantised_base_takes_about_half():
    wide, narrow = (
        formula("h100:1", f"model.quantize={kind}").programs[0].arguments
        for kind in ("none", "int8")
    )
    head = 2 * 2 * 128256 * 4096  # embeddings and head stay in bfloat16
    assert narrow - head == pytest.approx((wide - head) / 2, rel=0.03)


def test_time_is_unknown_and_the_roofline_is_not():
    plan = formula("h100:8", only=("task", "align", "update"))
    assert plan.update_seconds is None and plan.utilisation is None and plan.chip_hours is None
    spec = find_spec(config())
    inner = parameter_count(spec) - 2 * spec.vocab * spec.dim
    attention = 6 * 32 * 32 * 128 * 512  # causal: six products of half the pairs
    tokens = 32 * 512
    least = tokens * (4 * (inner + spec.vocab * spec.dim) + 6 * ADAPTER + attention)
    assert plan.programs[0].least == pytest.approx(least / 8, rel=1e-6)
    assert plan.programs[0].roofline == pytest.approx(least / 8 / 989e12, rel=1e-6)


def test_alignment_costs_half_of_the_blocks_and_no_head():
    task, align = formula("v5e:4x4", "batch.size=64", "batch.max_length=128", "batch.pairs=32",
                          only=("task", "align")).programs  # fmt: skip
    assert task.tokens == align.tokens
    assert 0.4 < align.least / task.least < 0.5


def test_turns_say_how_often_a_phase_runs():
    plan = formula(
        "v5e:4x4", "align.every=microbatch", "batch.accumulate=4", only=("task", "align")
    )
    assert plan.counts == {"task": 2, "align": 2}
    plan = formula("v5e:4x4", "align.every=step", "batch.accumulate=3", only=("task", "align"))
    assert plan.counts == {"task": 1.5, "align": 1.5}
    assert formula("v5e:4x4", "align.weight=0").counts == {"task": 1}


def test_an_open_layer_is_planned_at_half_of_the_depth():
    plan = formula("v5e:4x4", "align.layer=auto", only=("align",))
    assert plan.config.align.layer == 16
    assert "planned with layer 16" in plan.notes[0]


@pytest.mark.parametrize(
    ("place", "slices", "words", "told"),
    [
        ("v5e:4x4", 1, ("batch.size=24",), "batch.size: 24 rows cannot be divided among 16"),
        ("v5e:4x4", 1, ("mesh.fsdp=8",), "mesh: data 1 x fsdp 8 x tensor 1 needs 8 devices"),
        ("v5e:4x4", 1, ("align.layer=33",), "align.layer=33 is outside"),
        ("h100:8", 2, ("mesh.tensor=16",), "cannot be laid over 2 slices"),
    ],
)
def test_what_cannot_work_is_told(place, slices, words, told):
    with pytest.raises(UserError, match=told):
        plan_run(config(*words), parse(place, slices), ("task",), how="formula")


@pytest.mark.parametrize(("attention", "peak"), [("auto", 2.94e9), ("reference", 4.50e9)])
def test_prompts_hold_scores_only_where_no_kernel_takes_them(attention, peak):
    """The TPU compiler's peaks of 32 prompts of 2,048 tokens (docs/tpu.md)."""
    words = (f"model.attention={attention}", "batch.max_length=2176")
    (prompt,) = formula("v5e:4x4", *words, only=("prompt",)).programs
    assert prompt.what == "32 x 2048"
    assert prompt.peak == pytest.approx(peak, rel=PRECISION)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("mean", ("model.remat=names",)),
        ("maml", ("model.remat=names", "task.inner_steps=1")),
        ("maml", ("model.remat=names", "task.inner_steps=2")),
        ("maml", ("model.remat=names", "task.inner_steps=4")),
        ("maml", ("model.remat=none", "task.inner_steps=2")),
        ("maml", ("model.remat=full", "task.inner_steps=2")),
        ("reptile", ("model.remat=names",)),
    ],
)
def test_a_rule_keeps_what_the_compiler_says(rule, words):
    """Of this machine's compiler, for a small model: what a micro-batch takes for a while."""
    words = (*words, f"task.rule={rule}", "align.weight=0", "batch.size=8", "batch.max_length=256",
             "model.attention=reference", "model.dtype=float32", "lora.r=4")  # fmt: skip
    settings = config(*words, *(() if rule == "mean" else ("task.order=grouped",)))
    spec = replace(find_spec(settings), vocab=4000, dim=256, layers=8, heads=8, kv_heads=4,
                   head_dim=32, ffn=1024)  # fmt: skip
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    plan = design(settings, spec, adapter_of(settings, spec), mesh, 100)
    compiled = job(plan, "task").lower().compile().memory_analysis().temp_size_in_bytes
    assert estimate(plan, CHIPS["h100"], "task").temporaries == pytest.approx(
        compiled, rel=PRECISION
    )


def test_rules_that_look_ahead_have_half_of_the_rows_in_a_pass():
    words = ("task.order=grouped", "align.weight=0", "model.attention=reference")
    plain, half = (
        formula("h100:1", *words, f"task.rule={rule}").programs[0].temporaries
        for rule in ("mean", "reptile")
    )
    assert 0.4 < half / plain < 0.7
    ahead = [
        formula("h100:1", *words, "task.rule=maml", f"task.inner_steps={steps}").programs[0]
        for steps in (1, 2, 3)
    ]
    first, second, third = (program.temporaries for program in ahead)
    assert plain < first < second < third
    assert third - second == pytest.approx(second - first)
