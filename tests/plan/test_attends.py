"""The scores that a plan counts are those that attention forms, where no kernel takes them."""

import math
from dataclasses import replace

import jax
import pytest

from jaxalign.chips import CHIPS
from jaxalign.errors import UserError
from jaxalign.model import attention
from jaxalign.plan.analytic import PRECISION, estimate
from jaxalign.plan.programs import job
from jaxalign.plan.rows import read
from jaxalign.plan.run import find_spec
from jaxalign.sharding import make_mesh
from jaxalign.train.design import adapter_of, design
from tests.plan.conftest import config
from tests.programs import OPTIMISED
from tests.tiny import SPEC, few

H100, V5E = CHIPS["h100"], CHIPS["v5e"]
AHEAD = ("task.order=grouped", "align.weight=0")


def made(settings, spec=None):
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    spec = spec or find_spec(settings)
    return design(settings, spec, adapter_of(settings, spec), mesh, 100)


@pytest.fixture
def formed(monkeypatch):
    """Numbers in the scores of each layer that is traced."""
    found, reference = [], attention._reference

    def record(q, k, v, mask, before, *rest):
        batch, length, heads, _ = q.shape
        own = math.prod(mask.shape[1:])
        found.append(batch * heads * (own + length * (before.keys.shape[1] if before else 0)))
        return reference(q, k, v, mask, before, *rest)

    monkeypatch.setattr(attention, "_reference", record)
    return found


FREE = ("batch.buckets=[]", "batch.max_length=256", "lora.dropout=0", "align.every=joint")
WAYS = [
    ("none", "lora"), ("none", "prefix"), ("none", "prompt"), ("segments", "lora"),
    ("segments", "prompt"), ("auto", "lora"), ("auto", "prefix"), ("auto", "prompt"),
]  # fmt: skip


@pytest.mark.parametrize("phase", ["task_eval", "align_eval"])
@pytest.mark.parametrize(
    ("pack", "kind"), few(WAYS, ("none", "prefix"), ("segments", "prompt"), ("auto", "prompt"))
)
def test_the_scores_of_a_pass(configure, formed, phase, pack, kind):
    words = (*FREE, f"batch.pack={pack}", f"adapter.kind={kind}", "prompt.system='Say it.'")
    settings = configure(*words)
    plan = made(settings, SPEC)
    asked = job(plan, phase, read(settings, 1, plan.adapter)[0])
    asked.lower()
    # Chunks are a multiple of the sequence, the plan's tokens are the sequence.
    assert asked.attends.scores(plan, H100) == pytest.approx(4 * max(formed), rel=0.08)


@pytest.mark.parametrize(
    ("words", "chip", "arrays"),
    [
        ((), H100, 0),
        ((), V5E, 0),
        (("model.attention=reference",), H100, 1),
        (("model.dtype=float32",), H100, 1),  # which cuDNN does not take, and splash does
        (("model.dtype=float32",), V5E, 0),
        (("adapter.kind=prefix",), H100, 1 + 16 / 2048),
        (("task.rule=maml", *AHEAD), H100, 1 / 2),
        (("batch.size=8", "batch.max_length=192"), V5E, 8 / 32 * (192 / 2048) ** 2),  # too short
    ],
)
def test_a_kernel_forms_none(words, chip, arrays):
    plan = made(config("batch.max_length=2048", *words))
    found = job(plan, "task").attends.scores(plan, chip)
    assert found == pytest.approx(arrays * 32 * 32 * 2048**2 * 4)


def test_what_the_model_asks_of_a_kernel():
    settings = config("batch.max_length=2048")
    for change, ampere, hopper in (({"attn_soft_cap": 50.0}, 1, 1), ({"head_dim": 256}, 1, 0)):
        plan = made(settings, replace(find_spec(settings), **change))
        attends = job(plan, "task").attends
        assert bool(attends.scores(plan, CHIPS["a100"])) == ampere
        assert bool(attends.scores(plan, H100)) == hopper


def test_a_kernel_that_cannot_is_told():
    plan = made(config("model.attention=cudnn", "model.dtype=float32"))
    with pytest.raises(UserError, match=r"model\.attention=cudnn takes bfloat16, not float32"):
        estimate(plan, H100, "task")


LONG = [
    ("task", ("model.remat=full",)),
    ("task", ("model.remat=names",)),
    ("task", ("adapter.kind=prefix", "model.remat=full")),
    ("task_eval", ()),
    ("align", ("batch.pair_max_length=1024", "batch.pairs=4")),
    ("task", ("task.rule=maml", "task.inner_steps=1", *AHEAD)),
    ("task", ("task.rule=maml", "task.inner_steps=2", "model.remat=none", *AHEAD)),
    ("task", ("task.rule=reptile", *AHEAD)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words"), few(LONG, LONG[2]))
def test_long_rows_take_what_the_compiler_says(name, words):
    """Of this machine's compiler, for a small model whose scores are most of it."""
    settings = config("model.attention=reference", "model.dtype=float32", "lora.r=4",
                      "batch.size=4", "batch.max_length=1024", "align.layer=2", *words)  # fmt: skip
    spec = replace(find_spec(settings), vocab=1000, dim=256, layers=4, heads=8, kv_heads=4,
                   head_dim=32, ffn=512)  # fmt: skip
    plan = made(settings, spec)
    compiled = job(plan, name).lower().compile(compiler_options=OPTIMISED)
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert estimate(plan, H100, name).temporaries == pytest.approx(taken, rel=PRECISION)
