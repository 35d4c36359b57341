"""The teacher's answer to the student against torch's kl_div, whole and in chunks."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.objectives import States, View, bind, chunked
from jaxalign.objectives.distil import distil

ROWS, DIM, VOCAB, ANSWERS = 3, 8, 11, 6


def case(seed=0, width=ANSWERS):
    """Student and teacher [B, A, D], head [V, D], and a batch with 6, 3 and 0 answers."""
    numbers = np.random.default_rng(seed)
    student, teacher = numbers.standard_normal((2, ROWS, width, DIM)).astype(np.float32)
    head = numbers.standard_normal((VOCAB, DIM)).astype(np.float32)
    answers = numbers.integers(0, VOCAB, (ROWS, width))
    answers[1, 3:] = -100
    answers[2] = -100
    return student, teacher, head, SimpleNamespace(answers=jnp.asarray(answers))


def loss(student, teacher, head, batch, cap=0.0, **options):
    views = {"student": View(None, {}, {}, student), "teacher": View(None, {}, {}, teacher)}
    return distil(States(views, head, cap), batch, **options)


def slopes(student, teacher, head, batch, **options):
    """The Loss, and its sum's gradients by student, teacher and head."""

    def total(*given):
        found = loss(*given, batch, **options)
        return found.sum, found

    step = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, found), gradients = step(*map(jnp.asarray, (student, teacher, head)))
    return found, gradients


@pytest.mark.torch
@pytest.mark.parametrize("limit", [1 << 24, 2 * 2 * ROWS * VOCAB, 1], ids=["all", "two", "one"])
@pytest.mark.parametrize(("temperature", "cap"), [(1.0, 0.0), (6.0, 0.0), (0.5, 2.0)])
def test_value_and_gradient_are_those_of_kl_div(monkeypatch, limit, temperature, cap):
    import torch

    monkeypatch.setattr(chunked, "CPU_LOGITS", limit)
    student, teacher, head, batch = case()
    real = torch.tensor(np.asarray(batch.answers)) != -100
    one, other, words = (
        torch.tensor(array.astype(np.float64), requires_grad=True)
        for array in (student, teacher, head)
    )

    def logits(states, by):
        found = states[real] @ by.T
        return cap * torch.tanh(found / cap) if cap else found

    theirs = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(logits(one, words) / temperature, -1),
        torch.softmax(logits(other, words).detach() / temperature, -1),
        reduction="batchmean",
    )
    theirs.backward()
    found, gradients = slopes(student, teacher, head, batch, cap=cap, temperature=temperature)
    assert float(found.count) == real.sum() == 9
    assert float(found.sum / found.count) == pytest.approx(theirs.item(), rel=1e-5)
    for ours, wanted in ((gradients[0], one.grad), (gradients[2], words.grad)):
        np.testing.assert_allclose(ours / found.count, wanted.numpy(), rtol=1e-4, atol=1e-6)
    assert not np.asarray(gradients[1]).any()  # none flows into the teacher


@pytest.mark.parametrize("limit", [1 << 24, 1])
def test_one_prompt_twice_is_nothing_to_learn(monkeypatch, limit):
    monkeypatch.setattr(chunked, "CPU_LOGITS", limit)
    student, _, head, batch = case()
    found, gradients = slopes(student, student, head, batch, temperature=3.0)
    assert float(found.sum) == 0 and not any(np.asarray(g).any() for g in gradients)
    assert found.logs["agreement"] == found.count == 9


def test_agreement_is_that_of_first_choices():
    student, teacher, head, batch = case(1)
    real = np.asarray(batch.answers) != -100
    choices = [(states @ head.T).argmax(-1)[real] for states in (student, teacher)]
    found = loss(*map(jnp.asarray, (student, teacher, head)), batch)
    assert found.logs["agreement"] == (choices[0] == choices[1]).sum()
    for ties in ((0 * student, teacher), (student, 0 * teacher), (0 * student, 0 * student)):
        assert loss(*map(jnp.asarray, (*ties, head)), batch).logs["agreement"] == 0


def numbers_alive(width, vocabulary):
    """Of the gradient's program: the largest array, in numbers."""
    shape = jax.ShapeDtypeStruct((ROWS, width, DIM), jnp.float32)
    head = jax.ShapeDtypeStruct((vocabulary, DIM), jnp.float32)
    answers = jax.ShapeDtypeStruct((ROWS, width), jnp.int32)

    def gradient(student, teacher, head, answers):
        batch = SimpleNamespace(answers=answers)
        return jax.grad(lambda x, w: loss(x, teacher, w, batch).sum, (0, 1))(student, head)

    program = str(jax.make_jaxpr(gradient)(shape, shape, head, answers))
    shapes = re.findall(r"f32\[([\d,]+)\]", program)
    return max(math.prod(map(int, one.split(","))) for one in shapes)


def test_memory_is_flat_in_answers_and_words(monkeypatch):
    """More answers and more words make more chunks of one size; no array holds all logits."""
    limit = 2 * 8 * ROWS * 512  # logits of both sides, of 8 answers
    monkeypatch.setattr(chunked, "CPU_LOGITS", limit)
    for width, vocabulary in ((64, 512), (512, 512), (64, 1024)):
        assert ROWS * width * vocabulary > 3 * limit
        assert numbers_alive(width, vocabulary) == limit // 2  # one side's
    monkeypatch.setattr(chunked, "CPU_LOGITS", 1 << 24)  # what it would be
    assert numbers_alive(512, 512) == ROWS * 512 * 512


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teacher": "mine"}, "options.teacher: 'mine' is not among online, start, base"),
        ({"temperature": 0.0}, "options.temperature: 0.0 should be a number, above 0"),
        ({"temperatur": 1.0}, "takes no option 'temperatur'; did you mean 'temperature'"),
    ],
)
def test_options(options, says):
    with pytest.raises(UserError, match=says):
        bind(distil, "distil", options, "align.options", {}, {})


@pytest.mark.parametrize(
    ("teacher", "answers"), [("online", "stopped"), ("start", "start"), ("base", "reference")]
)
def test_teachers(teacher, answers):
    needs = bind(distil, "distil", {"teacher": teacher}, "align.options", {}, {}).needs
    assert (needs["student"].answers, needs["teacher"].answers) == ("trained", answers)
