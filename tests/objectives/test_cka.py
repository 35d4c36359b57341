"""CKA and drift against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives import TOKENS, States, Tap, View
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
