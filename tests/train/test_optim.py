"""AdamW with blocks that have no gradient, or are not trained: against torch and by formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.train.optim import make_optimiser

LAYERS, STEPS = 3, 6
SHAPES = {"a": (LAYERS, 4, 2), "b": (LAYERS, 2, 3, 2)}
# Blocks with a gradient in each update: a tap at block 2, then 1, leaves the upper ones without.
PRESENT = [(1, 1, 1), (1, 1, 0), (1, 1, 1), (1, 0, 0), (0, 0, 0), (1, 1, 1)]


def rate(step):
    return 0.05 / (1 + step)


def start() -> dict:
    numbers = np.random.default_rng(0)
    return {name: numbers.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients(present=PRESENT) -> list[dict]:
    numbers = np.random.default_rng(1)
    return [
        {
            name: numbers.standard_normal(shape)
            * np.array(blocks).reshape(-1, *(1,) * (len(shape) - 1))
            for name, shape in SHAPES.items()
        }
        for blocks in present
    ]


def run(grads: list[dict], **options) -> list[dict]:
    """The parameters after every update."""
    optimiser = make_optimiser(rate, **options)

    @jax.jit
    def step(params, state, gradient):
        changes, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    to_jax = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    params = {"blocks": to_jax(start())}
    state, found = optimiser.init(params), []
    for gradient in grads:
        params, state = step(params, state, {"blocks": to_jax(gradient)})
        found.append(jax.tree.map(np.asarray, params["blocks"]))
    return found


def adamw(present: list, decay: float, missing: str, trained=(1, 1, 1)) -> list[dict]:
    """Loshchilov & Hutter, algorithm 2, block by block in float64."""
    params, seen = start(), np.zeros(LAYERS, int)
    first = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    second = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    found = []
    for number, gradient in enumerate(gradients(present)):
        for block in range(LAYERS):
            if not trained[block] or (missing == "skip" and not present[number][block]):
                continue
            seen[block] += 1
            for name, whole in gradient.items():
                g, m, v = whole[block], first[name][block], second[name][block]
                m[:], v[:] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                step = (m / (1 - 0.9 ** seen[block])) / (
                    np.sqrt(v / (1 - 0.999 ** seen[block])) + 1e-8
                )
                params[name][block] -= rate(number) * (step + decay * params[name][block])
        found.append({name: value.copy() for name, value in params.items()})
    return found


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    for number, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        for name, value in left.items():
            np.testing.assert_allclose(
                value, right[name], rtol=2e-5, atol=2e-6, err_msg=f"{name} after update {number}"
            )


@pytest.mark.parametrize("missing", ["zero", "skip"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_formula(missing, decay):
    found = run(gradients(), missing=missing, weight_decay=decay, clip_norm=0.0)
    assert_close(found, adamw(PRESENT, decay, missing))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_missing_makes_no_difference_where_nothing_is_missing(decay):
    everywhere = gradients([(1, 1, 1)] * STEPS)
    zero = run(everywhere, missing="zero", weight_decay=decay)
    assert_close(run(everywhere, missing="skip", weight_decay=decay), zero)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_skip_stands_still_and_zero_moves_on(decay):
    skip = run(gradients(), missing="skip", weight_decay=decay)
    zero = run(gradients(), missing="zero", weight_decay=decay)
    for name in SHAPES:
        for number, blocks in enumerate(PRESENT[1:], start=1):
            for block, there in enumerate(blocks):
                still = np.array_equal(skip[number][name][block], skip[number - 1][name][block])
                assert still == (not there)
                assert not np.array_equal(zero[number][name][block], zero[number - 1][name][block])


@pytest.mark.torch
@pytest.mark.parametrize("missing", ["zero", "skip"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_torch(missing, decay):
    import torch

    params = {
        name: [torch.nn.Parameter(torch.tensor(block)) for block in value]
        for name, value in start().items()
    }
    everything = [block for blocks in params.values() for block in blocks]
    optimiser = torch.optim.AdamW(everything, lr=1.0, weight_decay=decay)
    theirs = []
    for number, gradient in enumerate(gradients()):
        optimiser.param_groups[0]["lr"] = rate(number)
        for name, blocks in params.items():
            for block, parameter in enumerate(blocks):
                absent = missing == "skip" and not PRESENT[number][block]
                parameter.grad = None if absent else torch.tensor(gradient[name][block])
        optimiser.step()
        theirs.append(
            {n: torch.stack(tuple(blocks)).detach().numpy() for n, blocks in params.items()}
        )
    assert_close(run(gradients(), missing=missing, weight_decay=decay, clip_norm=0.0), theirs)


def test_an_adapter_without_blocks_is_one():
    """Soft prompts: present in an update, or standing still in it."""
    prompt = {"prompt": jnp.arange(6.0).reshape(2, 3)}
    skip, zero = (make_optimiser(lambda _: 0.1, missing=way) for way in ("skip", "zero"))
    states = [way.init(prompt) for way in (skip, zero)]
    some = {"prompt": jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])}
    for _ in range(2):
        (moved, states[0]), (same, states[1]) = (
            way.update(some, state, prompt) for way, state in zip((skip, zero), states, strict=True)
        )
        assert_close([moved], [same])
    still, _ = skip.update(jax.tree.map(jnp.zeros_like, some), states[0], prompt)
    assert not np.any(still["prompt"])


@pytest.mark.parametrize("missing", ["zero", "skip"])
def test_blocks_that_are_not_trained_never_move(missing):
    everywhere = [(1, 1, 1)] * STEPS
    mask = jnp.array([1.0, 0.0, 1.0])
    options = {"missing": missing, "weight_decay": 0.1, "layer_mask": mask}
    found = run(gradients(everywhere), clip_norm=0.0, **options)
    for name, first in start().items():
        np.testing.assert_array_equal(found[-1][name][1], np.float32(first[1]))
    assert_close(found, adamw(everywhere, 0.1, missing, trained=(1, 0, 1)))


def test_blocks_that_are_not_trained_do_not_count_for_clipping():
    mask = jnp.array([1.0, 0.0, 1.0])
    grads = gradients([(1, 1, 1)] * STEPS)
    loud = jax.tree.map(np.copy, grads)
    for gradient in loud:
        for value in gradient.values():
            value[1] *= 1e6
    assert_close(run(loud, layer_mask=mask), run(grads, layer_mask=mask))


def test_clipping():
    grads = gradients([(1, 1, 1)] * STEPS)
    norm = lambda tree: np.sqrt(sum(np.sum(value**2) for value in tree.values()))  # noqa: E731
    limits = [norm(gradient) for gradient in grads]
    limit = float(np.median(limits))
    assert min(limits) < limit < max(limits)  # some are cut, some are not
    by_hand = [
        jax.tree.map(lambda g, n=n: g * min(limit / n, 1.0), gradient)
        for gradient, n in zip(grads, limits, strict=True)
    ]
    clipped = run(grads, clip_norm=limit)
    assert_close(clipped, run(by_hand, clip_norm=0.0))
    free = run(grads, clip_norm=0.0)
    assert np.abs(clipped[-1]["a"] - free[-1]["a"]).max() > 1e-4
