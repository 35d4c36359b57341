"""CKA and drift against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.objectives import TOKENS, States, Tap, View, bind
from jaxalign.objectives.cka import cka, drift

LAYER, TAP = 2, Tap(2, TOKENS)
DRAW = np.random.default_rng(0)
LENGTHS = (np.array([4, 2, 0]), np.array([3, 5, 0]))  # tokens of three pairs; the last is padding


def view(states, lengths, reference=None):
    real = np.arange(states.shape[1]) < lengths[:, None]
    taps = {TAP: jnp.asarray(states)}
    return View(
        jnp.asarray(real), taps, {TAP: jnp.asarray(states if reference is None else reference)}
    )


def sides(dim=7, scale=1.0):
    drawn = [DRAW.normal(size=(3, 5, dim)).astype(np.float32) * scale for _ in range(2)]
    return drawn, States(
        {name: view(x, n) for name, x, n in zip(("source", "target"), drawn, LENGTHS, strict=True)}
    )


def plain(x, y):
    """Linear CKA of the released code: all real tokens, cut to the shorter, centred."""
    x, y = (
        np.concatenate([row[:n] for row, n in zip(side, lengths, strict=True)]).astype(np.float64)
        for side, lengths in zip((x, y), LENGTHS, strict=True)
    )
    number = min(len(x), len(y))
    x, y = (side[:number] - side[:number].mean(0) for side in (x, y))
    norm = lambda a: np.linalg.norm(a)  # noqa: E731
    return norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


@pytest.mark.parametrize("dim", [7, 40])  # fewer and more dimensions than tokens
def test_value_is_that_of_numpy(dim):
    (x, y), states = sides(dim)
    loss = jax.jit(lambda states: cka(states, None, layer=LAYER))(states)
    assert float(loss.count) == 1 and float(loss.sum) == pytest.approx(1 - plain(x, y), abs=1e-5)


def test_rotation_and_scale_change_nothing():
    (x, _), states = sides()
    turn, _ = np.linalg.qr(DRAW.normal(size=(7, 7)))
    target = view((3 * x @ turn).astype(np.float32), LENGTHS[0])
    same = cka(states._replace(views=states.views | {"target": target}), None, layer=LAYER)
    assert float(same.sum) == pytest.approx(0, abs=1e-5)


def test_gradient_is_that_of_finite_differences():
    (x, y), states = sides()

    def value(source):
        changed = view(source, LENGTHS[0])
        return cka(states._replace(views=states.views | {"source": changed}), None, layer=LAYER).sum

    gradient = np.asarray(jax.grad(value)(jnp.asarray(x)))
    direction, step = DRAW.normal(size=x.shape), 1e-4
    slope = (plain(x - step * direction, y) - plain(x + step * direction, y)) / (2 * step)
    assert (gradient * direction).sum() == pytest.approx(slope, rel=2e-3)
    assert not gradient[2].any() and not gradient[0, 4].any()  # padding


def test_drift_counts_real_tokens():
    (x, y), _ = sides()
    states = States({"source": view(x, LENGTHS[0], reference=y)})
    loss = drift(states, None, layer=LAYER)
    rows = [((a[:n] - b[:n]) ** 2).mean(-1) for a, b, n in zip(x, y, LENGTHS[0], strict=True)]
    assert float(loss.count) == 6
    assert float(loss.sum) == pytest.approx(np.concatenate(rows).sum(), rel=1e-5)


@pytest.mark.torch
def test_the_released_term_step_by_step():
    """Transcription of `linear_cka` and of what surrounds it, with its gradient and its clamp."""
    import torch

    def released(source, target):
        number = min(len(source), len(target))
        x, y = (side[:number] - side[:number].mean(0, keepdim=True) for side in (source, target))
        shared = (x.T @ y).pow(2).sum()
        norm = (x.T @ x).pow(2).sum().sqrt() * (y.T @ y).pow(2).sum().sqrt()
        return torch.clamp(shared / (norm + 1e-6), 0.0, 1.0)

    (x, y), states = sides(11)
    leaves = [torch.tensor(side, requires_grad=True) for side in (x, y)]
    kept = [
        torch.cat([row[:n] for row, n in zip(side, lengths, strict=True)])
        for side, lengths in zip(leaves, LENGTHS, strict=True)
    ]
    wanted = 1 - released(*kept)
    wanted.backward()

    def value(x, y):
        drawn = {"source": view(x, LENGTHS[0]), "target": view(y, LENGTHS[1])}
        return cka(states._replace(views=drawn), None, layer=LAYER).sum

    found, slopes = jax.value_and_grad(value, (0, 1))(jnp.asarray(x), jnp.asarray(y))
    assert float(found) == pytest.approx(wanted.item(), abs=1e-5)
    for ours, theirs in zip(slopes, leaves, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-5)
    assert not np.asarray(slopes[1])[1, 4:].any()  # beyond the shorter side
    # Rounding may lead beyond 1, where the clamp holds it.
    twice = dict.fromkeys(("source", "target"), view(1e4 * x, LENGTHS[0]))
    assert 0 <= float(cka(States(twice), None, layer=LAYER).sum) < 1e-5


def test_debiased_is_the_estimator_of_song_et_al():
    """Through sums over different rows, as the statistic is defined."""
    (x, y), states = sides(40)
    loss = cka(states, None, layer=LAYER, estimator="debiased")
    x, y = (
        np.concatenate([row[:n] for row, n in zip(side, lengths, strict=True)])[:6]
        for side, lengths in zip((x, y), LENGTHS, strict=True)
    )

    def hsic(a, b):
        k, l = a @ a.T, b @ b.T  # noqa: E741
        n, total = range(len(a)), 0.0
        pairs = [(i, j) for i in n for j in n if i != j]
        triples = [(i, j, q) for i, j in pairs for q in n if q not in (i, j)]
        fours = [(i, j, q, r) for i, j, q in triples for r in n if r not in (i, j, q)]
        total += np.mean([k[i, j] * l[i, j] for i, j in pairs])
        total += np.mean([k[i, j] * l[q, r] for i, j, q, r in fours])
        return total - 2 * np.mean([k[i, j] * l[i, q] for i, j, q in triples])

    wanted = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert 1 - float(loss.sum) == pytest.approx(np.clip(wanted, -1, 1), abs=1e-4)


def test_debiased_is_near_zero_for_unrelated_rows():
    wide = [DRAW.normal(size=(2, 16, 256)).astype(np.float32) for _ in range(2)]
    drawn = {
        n: view(x, np.array([16, 16])) for n, x in zip(("source", "target"), wide, strict=True)
    }
    found = {
        one: float(1 - cka(States(drawn), None, layer=LAYER, estimator=one).sum)
        for one in ("biased", "debiased")
    }
    assert found["biased"] > 0.8 and abs(found["debiased"]) < 0.2


def test_a_choice_that_is_none():
    with pytest.raises(UserError, match="'best' is not among biased, debiased"):
        bind(cka, "cka", {"layer": LAYER, "estimator": "best"}, "align.options", {}, {})


def test_pooled_rows_take_the_form_of_the_states_and_their_pooling():
    """Settings of the phase; as options of the term they would be passed over silently."""
    settings = {"layer": LAYER, "pooling": "last", "form": "standardised", "temperature": 0.1}
    read = {
        rows: bind(cka, "cka", {"rows": rows}, "align.options", settings, {}).needs["source"].taps
        for rows in ("pooled", "tokens")
    }
    assert read == {"pooled": (Tap(LAYER, "last", "standardised"),), "tokens": (TAP,)}
    (x, y), _ = sides()
    tap = Tap(LAYER, "last", "standardised")
    pooled = {
        name: view(x, n)._replace(taps={tap: jnp.asarray(drawn[:, 0])})
        for name, drawn, n in zip(("source", "target"), (x, y), LENGTHS, strict=True)
    }
    loss = cka(States(pooled), None, layer=LAYER, rows="pooled", pooling="last", form=tap.states)
    x, y = (side[:2, 0] - side[:2, 0].mean(0) for side in (x, y))  # the third pair is padding
    own, others = (np.linalg.norm(side.T @ side) for side in (x, y))
    cosine = np.linalg.norm(x.T @ y) ** 2 / (own * others)
    assert float(loss.sum) == pytest.approx(1 - cosine, abs=1e-5)
