"""Every attention kernel against the reference: values and gradients.

Splash attention runs in the TPU interpreter here; cuDNN's kernel needs a GPU.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.model import attention, cudnn, splash
from jaxalign.model.attention import Sight, attend, causal, near
from jaxalign.sharding import make_mesh

ROWS, LENGTH, HEADS, GROUPS, WIDTH = 2, 256, 4, 2, 64


def arrays(dtype=jnp.float32, length=LENGTH):
    """q, k, v and what stands for the gradient from above."""
    numbers = np.random.default_rng(0)
    shapes = [(HEADS,), (GROUPS,), (GROUPS,), (HEADS,)]
    draw = lambda heads: numbers.standard_normal((ROWS, length, *heads, WIDTH))  # noqa: E731
    return [jnp.asarray(draw(heads), dtype) for heads in shapes]


def segments():
    """One row of three texts and padding, one of a single text and padding."""
    ids = np.zeros((ROWS, LENGTH), np.int32)
    for row, ends in enumerate(((100, 101, 230), (200,))):
        for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False), start=1):
            ids[row, start:end] = number
    return jnp.asarray(ids)


def mask(windows, kind, ids, length=LENGTH):
    place = jnp.arange(length)[None]
    seen = causal(length, ids)
    window = windows[kind]
    return seen & near(place, place, window) if window else seen


def both(backend, *, ids=None, windows=(0,), kind=0, cap=0.0, dtype=jnp.float32, length=LENGTH):
    """(output, gradients by q, k, v) of the backend; real tokens alone."""
    q, k, v, above = arrays(dtype, length)
    real = jnp.ones((ROWS, length)) if ids is None else ids != 0

    def total(q, k, v):
        sight = Sight(ids, windows, jnp.int32(kind))
        out = attend(q, k, v, mask(windows, kind, ids, length), backend, 0.1, cap, sight)
        return jnp.sum((out * above * real[..., None, None]).astype(jnp.float32)), out

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = step(q, k, v)
    return [out * real[..., None, None], *gradients]


CASES = {
    "causal": {},
    "segments": {"ids": segments()},
    "window": {"windows": (100,)},
    "window of a layer": {"windows": (0, 128), "kind": 1},
    "no window in this layer": {"windows": (130, 0), "kind": 1},
    "cap": {"cap": 3.0},
    "all": {"ids": segments(), "windows": (0, 64), "kind": 1, "cap": 2.0},
}


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_the_reference(case):
    expected, found = both("reference", **CASES[case]), both("splash", **CASES[case])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_cases_differ():
    chosen = [case for name, case in CASES.items() if name != "no window in this layer"]
    outputs = [np.asarray(both("reference", **case)[0]) for case in chosen]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert np.abs(one - other).max() > 1e-2


def test_splash_in_bfloat16():
    expected = both("reference", ids=segments(), dtype=jnp.bfloat16)
    found = both("splash", ids=segments(), dtype=jnp.bfloat16)
    exact = both("reference", ids=segments())
    for ours, theirs, true in zip(found, expected, exact, strict=True):
        error = lambda x: np.abs(np.asarray(x, np.float32) - true).max()  # noqa: B023, E731
        assert error(ours) < 1.5 * error(theirs)  # no worse than what rounding costs


@pytest.mark.parametrize(
    "axes", [(2, 1, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2), (2, 1, 2, 2), (1, 1, 4, 1)]
)
def test_splash_on_a_mesh(axes):
    # Four ways to split four heads leave two key heads whole.
    count = int(np.prod(axes))
    if len(jax.devices()) < count:
        pytest.skip("needs eight devices")
    expected = both("reference", ids=segments())
    with jax.set_mesh(make_mesh(*axes, devices=jax.devices()[:count])):
        found = both("splash", ids=segments())
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(("length", "kernel"), [(128, False), (200, False), (256, True)])
def test_auto_takes_the_kernel_where_it_gains(monkeypatch, length, kernel):
    called = []
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "attend", lambda q, *_, **__: called.append(q.shape) or q)
    q, k, v, _ = arrays(length=length)
    attend(q, k, v, causal(length), "auto", sight=Sight())
    assert bool(called) == kernel


def test_auto_is_the_reference_here():
    if jax.default_backend() != "cpu":
        pytest.skip("chooses a kernel on an accelerator")
    expected, found = both("reference"), both("auto")
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize(
    ("backend", "case", "sentence"),
    [
        ("splash", {"length": 200}, "splash takes rows of a multiple of 128 tokens, not 200"),
        ("cudnn", {"cap": 1.0}, "cudnn cannot cap the scores"),
        ("cudnn", {}, "cudnn takes bfloat16, not float32"),
    ],
)
def test_what_a_kernel_cannot_take(backend, case, sentence):
    with pytest.raises(UserError, match=f"model.attention={sentence}.*model.attention=auto"):
        both(backend, **case)


def test_cudnn_is_called_as_it_wants(monkeypatch):
    """Which arguments reach JAX: its own reference then computes what the kernel would."""
    called = {}
    plain = jax.nn.dot_product_attention

    def record(*arrays, implementation, **options):
        called.update(options, implementation=implementation)
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    case = {"ids": segments(), "windows": (0, 64), "kind": 1, "dtype": jnp.bfloat16}
    expected, found = both("reference", **case), both("cudnn", **case)
    assert called["implementation"] == "cudnn" and called["is_causal"]
    exact = both("reference", **case | {"dtype": jnp.float32})
    for ours, theirs, true in zip(found, expected, exact, strict=True):
        error = lambda x: np.abs(np.asarray(x, np.float32) - true).max()  # noqa: B023, E731
        assert error(ours) < 2 * error(theirs)


@pytest.mark.parametrize(
    ("capability", "width", "kernel"),
    [
        ("9.0", 256, True),  # Hopper
        ("9.0", 264, False),
        ("8.9", 256, False),
        ("10.0", 256, False),  # Blackwell computes no gradient of such heads
        ("10.0", 128, True),
        ("gfx90a", 256, False),  # another vendor's
        (None, 256, False),  # no GPU here: a plan
    ],
)
def test_wide_heads_are_hoppers(monkeypatch, capability, width, kernel):
    """`auto` takes cuDNN where the card computes heads of this width, else the reference."""
    called = []
    facts = {} if capability is None else {"compute_capability": capability}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(**facts)])
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "attend", lambda q, *_, **__: called.append(q.shape) or q)
    q = jnp.zeros((1, 4, 2, width), jnp.bfloat16)
    attend(q, q, q, causal(4), "auto", sight=Sight())
    assert bool(called) == kernel


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("case", [name for name in CASES if "cap" not in CASES[name]])
def test_cudnn_equals_the_reference(case):
    chosen = CASES[case] | {"dtype": jnp.bfloat16}
    expected, found = both("reference", **chosen), both("cudnn", **chosen)
    exact = both("reference", **CASES[case])
    for ours, theirs, true in zip(found, expected, exact, strict=True):
        error = lambda x: np.abs(np.asarray(x, np.float32) - true).max()  # noqa: B023, E731
        assert error(ours) < 2 * error(theirs)


def test_flops_of_a_call():
    # Four blocks of 512 queries see 1 + 2 + 3 + 4 of 16 pairs of blocks.
    queries, keys = [2, 32, 2048, 128], [2, 8, 2048, 128]
    whole = 2 * 2 * 32 * 2048 * 2048 * 128
    fwd = splash.flops("splash_mha_fwd_residuals.3", [[4, 4], queries, keys])
    assert fwd == 2 * whole * 10 / 16
    assert splash.flops("splash_mha_dkv_no_residuals", [queries, keys]) == 4 * whole * 10 / 16
    one = splash.flops("splash_mha_fwd_residuals.3", [[1, 4, 4], queries[1:], keys[1:]])
    assert one == fwd / 2
    assert splash.flops("other_kernel", [queries, keys]) is None
