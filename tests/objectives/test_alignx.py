"""AlignX's terms on the spans of one sequence, against a transcription in torch."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives import States, Tap, View
from jaxalign.objectives.contrastive import contrastive
from jaxalign.objectives.language_matching import TAPS, language_matching, start

ROWS, DIM, LENGTH = 5, 6, 7  # the last row is padding
DRAW = np.random.default_rng(0)
BATCH = SimpleNamespace(
    tokens=DRAW.integers(5, 90, (ROWS, LENGTH)),
    roles=np.array([[1, 2, 2, 1, 3, 3, 0]] * (ROWS - 1) + [[0] * LENGTH]),
    prompt_language=np.array([[3], [4], [3], [5], [-1]]),
    answer_language=np.array([[1], [1], [3], [1], [-1]]),
)


def drawn():
    return [DRAW.normal(size=(ROWS, DIM)).astype(np.float32) for _ in range(2)]


def seen(source, target, taps):
    found = dict(zip(taps, (source, target), strict=True))
    return States({"text": View(jnp.asarray(BATCH.roles != 0), found, {})})


@pytest.mark.torch
def test_contrastive_between_the_spans_of_a_row():
    """The released code halves the sum of its directions though it has one: our weight says so."""
    import torch

    taps = Tap(2, "prompt"), Tap(2, "answer")
    source, target = drawn()
    x, y = (torch.tensor(side, requires_grad=True) for side in (source, target))
    cosine = torch.nn.functional.cosine_similarity(x[: ROWS - 1, None], y[None, : ROWS - 1], dim=-1)
    # mean_j -log softmax_i(cos(s_j, t_i) / tau)_j
    wanted = torch.nn.functional.cross_entropy(cosine / 0.1, torch.arange(ROWS - 1))
    (0.3 * 0.5 * wanted).backward()

    def value(x, y):
        loss = contrastive(seen(x, y, taps), BATCH, layer=2, view="text", negatives="global")
        return 0.15 * loss.sum / loss.count

    found, slopes = jax.value_and_grad(value, (0, 1))(jnp.asarray(source), jnp.asarray(target))
    assert float(found) == pytest.approx(0.15 * wanted.item(), rel=1e-5)
    for ours, theirs in zip(slopes, (x, y), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.torch
def test_matching_of_all_ordered_pairs():
    import torch

    head = start(SimpleNamespace(dim=DIM), jax.random.key(0), 128)
    source, target = drawn()

    def value(head, x, y):
        loss = language_matching(seen(x, y, TAPS), BATCH, head=head)
        return loss.sum / loss.count, loss

    given = (head, jnp.asarray(source), jnp.asarray(target))
    (found, loss), slopes = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(*given)

    w = {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in head.items()}
    x, y = (torch.tensor(side, requires_grad=True) for side in (source, target))
    texts = torch.cat([x[: ROWS - 1], y[: ROWS - 1]])
    spoken = np.concatenate([BATCH.prompt_language[:-1, 0], BATCH.answer_language[:-1, 0]])
    logits, same = [], []
    for i in range(len(texts)):
        for j in range(len(texts)):
            both = torch.cat([texts[i], texts[j]])
            gate = torch.nn.functional.silu(both @ w["gate"])
            logits.append((gate * (both @ w["up"])) @ w["down"])
            same.append(int(spoken[i] == spoken[j]))
    logits, same = torch.stack(logits), torch.tensor(same)
    wanted = torch.nn.functional.cross_entropy(logits, same)
    wanted.backward()
    assert float(loss.count) == (2 * (ROWS - 1)) ** 2
    assert float(loss.logs["accuracy"]) == float((logits.argmax(-1) == same).sum())
    assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
    for name, slope in slopes[0].items():
        np.testing.assert_allclose(slope, w[name].grad, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(slopes[1:], (x, y), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, rtol=1e-4, atol=1e-6)
