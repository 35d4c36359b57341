"""Lens' three terms against plain NumPy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.languages import language_number
from jaxalign.errors import UserError
from jaxalign.objectives import States, View, bind
from jaxalign.objectives.lens import LAST, MEAN, lens
from jaxalign.objectives.subspace import Subspace
from jaxalign.prepare.lsar import subspace as lsar

DIM, CODES = 12, ("de", "en", "tr", "id")
DRAW = np.random.default_rng(0)
FOUND = lsar(DRAW.normal(size=(4, DIM)) + 3, CODES.index("en"))


def space(layer=-1, pooling="last"):
    arrays = {name: array.astype(np.float32) for name, array in FOUND._asdict().items()}
    numbers = np.array([language_number(code) for code in CODES], np.int32)
    return Subspace("x.npz", **arrays, languages=CODES, numbers=numbers, pivot="en",
                    layer=layer, pooling=pooling, base="", digest="")  # fmt: skip


SPACE = space()
SPOKEN = ("tr", "de", "en", "")  # the last pair is padding
THERE = 3
NAMES = ("source", "target", "source_base", "mean", "mean_base")
STATES = {name: DRAW.normal(size=(4, DIM)).astype(np.float32) for name in NAMES}


class Batch:
    source_language = jnp.asarray([language_number(code) if code else -1 for code in SPOKEN])


def loss(given, **options):
    real = jnp.arange(4)[:, None] < jnp.full((1, 2), THERE)
    views = {
        "source": View(real, {LAST: given["source"]}, {LAST: given["source_base"]}),
        "target": View(
            real, {LAST: given["target"], MEAN: given["mean"]}, {MEAN: given["mean_base"]}
        ),
    }
    return lens(States(views), Batch, subspace=SPACE, **options)


def released(torch, given, bringing, target, retaining):
    """trainer_lens.py with whole matrices, each pair a language; the mean over pairs."""
    axis, basis, shifts = (torch.tensor(np.asarray(array)) for array in FOUND)
    shared, different = torch.outer(axis, axis), basis @ basis.T
    mse = torch.nn.functional.mse_loss
    total = 0
    for row, code in enumerate(SPOKEN[:THERE]):
        one = {name: array[row] for name, array in given.items()}
        shift = shifts[CODES.index(code)]
        total += bringing * mse(shared @ one["target"], shared @ one["source"])
        moved = different @ one["source"] - different @ one["source_base"].detach()
        total += mse(moved, target * shift)
        total += retaining * mse(one["mean"], one["mean_base"].detach())
    return total


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.2, 3.0), (0.0, 2.0, 0.0)])
def test_value_and_gradient_are_those_of_the_released_code(weights):
    torch = pytest.importorskip("torch")
    names = dict(zip(("bringing", "target", "retaining"), weights, strict=True))
    given = {
        name: torch.tensor(array.astype(np.float64), requires_grad=True)
        for name, array in STATES.items()
    }
    theirs = released(torch, given, *weights)
    theirs.backward()
    value, gradient = jax.value_and_grad(lambda states: loss(states, **names).sum)(
        {name: jnp.asarray(array) for name, array in STATES.items()}
    )
    assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
    assert float(loss(STATES, **names).count) == THERE
    for name, array in gradient.items():
        wanted = given[name].grad
        wanted = np.zeros((4, DIM)) if wanted is None else wanted.numpy()
        np.testing.assert_allclose(array, wanted, atol=2e-6, err_msg=name)


def test_each_term_is_logged_without_its_weight():
    found = loss(STATES, bringing=0.5, retaining=3.0)
    logs = found.logs
    assert logs.keys() == {"bring", "apart", "retain"}
    whole = 0.5 * logs["bring"] + logs["apart"] + 3 * logs["retain"]
    assert float(found.sum) == pytest.approx(float(whole), rel=1e-6)
    across = ((STATES["target"] - STATES["source"])[:THERE] @ FOUND.axis) ** 2 / DIM
    assert float(logs["bring"]) == pytest.approx(across.sum(), rel=1e-5)


def test_at_the_start_nothing_has_to_be_retained():
    same = STATES | {"mean_base": STATES["mean"]}
    weight = {"bringing": 0.0, "target": 0.0, "retaining": 1.0}
    gradient = jax.grad(lambda mean: loss(same | {"mean": mean}, **weight).sum)(STATES["mean"])
    assert float(loss(same, **weight).logs["retain"]) == 0 and not np.asarray(gradient).any()


def test_a_language_has_its_own_shift():
    """Where the model is the base, `apart` is the square of the shift; the pivot has none."""
    same = STATES | {"source_base": STATES["source"]}
    rows = np.mean(FOUND.shifts**2, axis=-1)
    wanted = sum(rows[CODES.index(code)] for code in SPOKEN[:THERE])
    assert float(loss(same, target=2.0).logs["apart"]) == pytest.approx(4 * wanted, rel=1e-5)
    assert rows[CODES.index("en")] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("x.npz", r"should be \{file: X.npz\}"),
        (space(layer=2), "measured at layer 2, pooling last; measure it with"),
        (space(pooling="mean"), "layer -1, pooling mean; measure it with"),
    ],
)
def test_another_subspace_is_refused(given, says):
    with pytest.raises(UserError, match=says):
        bind(lens, "lens", {"subspace": given}, "align.options", {}, {})
