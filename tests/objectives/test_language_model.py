"""Cross-entropy of the answers against its closed form, whole and in chunks."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.objectives import (
    OBJECTIVES,
    States,
    View,
    chunked,
    contrastive,
    language_model,
    resolve,
)
from jaxalign.objectives.states import Loss
from jaxalign.train.phases.walk import _at

ROWS, LENGTH, DIM, VOCAB, ANSWERS = 3, 9, 8, 11, 6


def case(seed: int = 0):
    """hidden [B, T, D], head [V, D] and a batch whose rows have 6, 3 and 0 answers."""
    numbers = np.random.default_rng(seed)
    hidden = numbers.standard_normal((ROWS, LENGTH, DIM)).astype(np.float32)
    head = numbers.standard_normal((VOCAB, DIM)).astype(np.float32)
    answers = numbers.integers(0, VOCAB, (ROWS, ANSWERS))
    answers[1, 3:] = -100
    answers[2] = -100
    answer_at = np.stack([numbers.permutation(LENGTH)[:ANSWERS] for _ in range(ROWS)])
    answer_at[answers < 0] = 0
    return hidden, head, SimpleNamespace(answer_at=answer_at, answers=answers)


def given(hidden, head, batch, cap=0.0):
    """As a phase builds it."""
    answers = _at(hidden, jnp.asarray(batch.answer_at))
    return States({"text": View(None, {}, {}, answers)}, head, cap)


def evaluate(hidden, head, batch, cap=0.0):
    """The Loss and the gradients of its sum by hidden and head."""

    def total(hidden, head):
        loss = language_model(given(hidden, head, batch, cap), batch)
        return loss.sum, loss

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, loss), gradients = step(jnp.asarray(hidden), jnp.asarray(head))
    return loss, gradients


def reference(hidden, head, batch, cap=0.0):
    """(sum, count, hits, gradient by hidden, gradient by head), token by token in float64."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    total, count, hits = 0.0, 0, 0
    by_hidden, by_head = np.zeros_like(hidden), np.zeros_like(head)
    for b in range(ROWS):
        for place, answer in zip(batch.answer_at[b], batch.answers[b], strict=True):
            if answer == -100:
                continue
            logits = head @ hidden[b, place]
            slope = 1 - np.tanh(logits / cap) ** 2 if cap else 1.0
            logits = cap * np.tanh(logits / cap) if cap else logits
            probabilities = np.exp(logits) / np.exp(logits).sum()
            total -= np.log(probabilities[answer])
            count, hits = count + 1, hits + (logits.argmax() == answer)
            error = (probabilities - np.eye(VOCAB)[answer]) * slope
            by_hidden[b, place] += error @ head
            by_head += np.outer(error, hidden[b, place])
    return total, count, hits, by_hidden, by_head


# Logits alive at once: all; half of the columns; 2 of 6; one; less than one.
CHUNKS = [1 << 24, 3 * ROWS * VOCAB, 2 * ROWS * VOCAB + 5, ROWS * VOCAB, 1]


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("limit", CHUNKS)
def test_value_and_gradient(monkeypatch, limit, cap):
    monkeypatch.setattr(chunked, "CPU_LOGITS", limit)
    hidden, head, batch = case()
    total, count, hits, by_hidden, by_head = reference(hidden, head, batch, cap)
    loss, gradients = evaluate(hidden, head, batch, cap)
    np.testing.assert_allclose(loss.sum, total, rtol=1e-5)
    assert loss.count == count == 9
    assert loss.logs["accuracy"] == hits
    np.testing.assert_allclose(gradients[0], by_hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[1], by_head, rtol=1e-4, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_smoothed_labels_are_those_of_torch(monkeypatch, cap):
    import torch

    monkeypatch.setattr(chunked, "CPU_LOGITS", 2 * ROWS * VOCAB)
    hidden, head, batch = case(2)
    x, w = (torch.tensor(array, requires_grad=True) for array in (hidden, head))
    logits = x[torch.arange(ROWS)[:, None], torch.tensor(batch.answer_at)] @ w.T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(batch.answers).flatten(), label_smoothing=0.1,
        reduction="sum",
    )  # fmt: skip
    wanted.backward()
    total = lambda h, w: language_model(given(h, w, batch, cap), batch, label_smoothing=0.1).sum  # noqa: E731
    found, slopes = jax.value_and_grad(total, (0, 1))(jnp.asarray(hidden), jnp.asarray(head))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    for ours, theirs in zip(slopes, (x.grad, w.grad), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [5, 4, 1])
def test_chunks_of_widths_that_do_not_divide(monkeypatch, width):
    hidden, head, batch = case(1)
    batch = SimpleNamespace(answer_at=batch.answer_at[:, :5], answers=batch.answers[:, :5])
    whole, expected = evaluate(hidden, head, batch)
    monkeypatch.setattr(chunked, "CPU_LOGITS", width * ROWS * VOCAB)
    loss, gradients = evaluate(hidden, head, batch)
    np.testing.assert_allclose(loss.sum, whole.sum, rtol=1e-6)
    assert (loss.count, loss.logs["accuracy"]) == (whole.count, whole.logs["accuracy"])
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [False, True])
def test_logits_of_a_chunk_are_all_that_exists(monkeypatch, cut):
    if cut:
        monkeypatch.setattr(chunked, "CPU_LOGITS", 2 * ROWS * VOCAB)
    hidden, head, batch = case()
    gradient = jax.grad(lambda h, w: language_model(given(h, w, batch), batch).sum, (0, 1))
    program = str(jax.make_jaxpr(gradient)(hidden, head))
    shapes = {width: f"f32[{ROWS},{width},{VOCAB}]" in program for width in (2, ANSWERS)}
    assert shapes == {2: cut, ANSWERS: not cut}
    # The backward pass keeps none of them.
    assert f"f32[{ANSWERS // 2},{ROWS},2,{VOCAB}]" not in program


def test_how_many_logits_a_device_holds():
    """A chunk reads the whole head: large ones where memory allows, on a GPU by how much it has."""
    usual, most = 1 << 24, 1 << 27
    of_memory = {76.5e9: most, 63.7e9: most, 16.5e9: 1 << 25, 2e9: usual, 0: usual}
    for memory, found in of_memory.items():
        assert chunked.at_once("gpu", memory) == found
        assert chunked.at_once("tpu", memory) == usual
        assert chunked.at_once("cpu", memory) == 1 << 26
    assert chunked.at_once() in (most, 1 << 26) and chunked.at_once("gpu") >= usual


def test_no_answers_at_all():
    hidden, head, batch = case()
    batch.answers[:] = -100
    loss, gradients = evaluate(hidden, head, batch)
    assert (loss.sum, loss.count, loss.logs["accuracy"]) == (0, 0, 0)
    assert not any(np.asarray(gradient).any() for gradient in gradients)


def test_huge_logits_do_not_overflow():
    hidden, head, batch = case()
    loss, gradients = evaluate(1e4 * hidden, head, batch)
    assert np.isfinite(loss.sum)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_rows_are_picked_unchanged():
    hidden, head, batch = case()
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    loss, gradients = evaluate(hidden, head, batch)
    # The same numbers in float32: products are summed in float32 either way.
    wide, _ = evaluate(hidden.astype(jnp.float32), head.astype(jnp.float32), batch)
    assert loss.sum.dtype == jnp.float32
    np.testing.assert_allclose(loss.sum, wide.sum, rtol=1e-5)
    assert [gradient.dtype.name for gradient in gradients] == ["bfloat16", "bfloat16"]


def test_rows_add_up():
    hidden, head, batch = case(2)
    whole, _ = evaluate(hidden, head, batch)
    rows = [
        evaluate(
            hidden[b : b + 1],
            head,
            SimpleNamespace(answer_at=batch.answer_at[[b]], answers=batch.answers[[b]]),
        )[0]
        for b in range(ROWS)
    ]
    np.testing.assert_allclose(whole.sum, sum(row.sum for row in rows), rtol=1e-6)
    assert whole.count == sum(row.count for row in rows)


# --- the registry -------------------------------------------------------------------------------


def own(states, batch, *, strength=1.0) -> Loss:
    """An objective as a user writes it."""
    return Loss(jnp.float32(strength), jnp.float32(1), {})


def test_resolve():
    assert resolve("language_model") is language_model
    assert resolve("contrastive") is contrastive
    assert resolve(f"{__name__}:own") is own
    assert {"language_model", "contrastive"} <= set(OBJECTIVES)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("constrastive", "is unknown; did you mean 'contrastive'?"),
        ("language-model", "did you mean 'language_model'?"),
        ("my_losses.own", "An objective of your own is written package.module:function"),
        (":own", "An objective of your own is written package.module:function"),
        ("my_losses:", "An objective of your own is written package.module:function"),
        ("no_such_package:own", "cannot be imported: ModuleNotFoundError: No module"),
        (f"{__name__}:absent", "has no attribute 'absent'"),
        ("math:pi", "'math:pi' is not a function but 3.14"),
    ],
)
def test_names_that_lead_nowhere(name, sentence):
    with pytest.raises(UserError) as error:
        resolve(name)
    assert str(error.value).startswith(f"objective {name!r} ")
    assert sentence in str(error.value)


def test_a_tie_is_no_hit():
    """A collapsed model, whose words are all as likely, is right nowhere."""
    _, head, batch = case()
    loss, _ = evaluate(np.zeros((*batch.answer_at.shape, head.shape[1]), np.float32), head, batch)
    np.testing.assert_allclose(loss.sum / loss.count, np.log(VOCAB), rtol=1e-6)
    assert loss.logs["accuracy"] == 0
