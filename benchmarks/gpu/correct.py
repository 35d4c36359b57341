"""Whether a GPU computes what the reference does: attention, golden values, a resumed run, nf4.

Attention by cuDNN in bfloat16 is compared with the reference in float32, in value and gradient: its
error may be at most twice that of the reference in bfloat16. Golden values are those of the paper's
PyTorch code (`tests/data/golden`), at the tolerances of the tests.

    python benchmarks/gpu/correct.py --seconds 120
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from part import REPO, Part, Row, need_gpu

GRADIENT, LOSS = 1e-4, 1e-5  # as in tests/parity/test_golden.py
LAID = 1e-5  # as in tests/train/test_flat.py

# Heads, heads of the keys, their size, rows, tokens, and what else is special.
ATTENTION: dict[str, dict[str, Any]] = {
    "8B's shape: 32 heads over 8 of 128": {"heads": (32, 8, 128), "rows": 1},
    "heads of 64, padding on the right": {"heads": (4, 4, 64), "padded": True},
    "packed texts": {"heads": (8, 2, 128), "packed": True},
    "a window of 100": {"heads": (8, 2, 64), "windows": (100,)},
    "packed, a window in this layer": {
        "heads": (8, 2, 128), "packed": True, "windows": (0, 48), "kind": 1,
    },
}  # fmt: skip


# What is compared is what kernels compute, not which of XLA's products is the fastest: trying them
# all took most of the time.
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def main() -> None:
    os.environ["XLA_FLAGS"] = f"{UNTUNED} {os.environ.get('XLA_FLAGS', '')}".strip()
    part = Part(__doc__)
    need_gpu(part)
    first, *others = cases()
    most = 0.35 * part.left
    part.measure(f"golden values: {first!r}", partial(golden, first, part, most), need=10)
    for phase in ("task", "align"):
        name = f"rows end to end against padded ones: {phase}"
        part.measure(name, partial(laid, first, phase), need=10)
    part.measure("a resumed run", resumed, need=20)
    for kind in ("nf4", "int8"):
        part.measure(f"{kind}: a product", partial(quantised, kind, part.rehearse), need=4)
    name = "heads of 256, packed, a window, asked of cuDNN itself"
    part.measure(name, partial(wide, part.rehearse), need=4)
    for name, case in reversed(ATTENTION.items()):
        if part.rehearse:
            case = case | {"length": 128, "heads": (4, 2, case["heads"][2] // 4)}
        part.measure(f"cuDNN: {name}", partial(kernel, case, part.rehearse), need=6)
    part.measure("attention=auto in float32 is the reference", float32_is_the_reference, need=3)
    part.measure("attention with capped scores", soft_cap, need=3)
    for case in () if part.quick or part.rehearse else others:
        part.measure(f"golden values: {case!r}", partial(golden, case, part, part.left), need=10)


# --- attention ------------------------------------------------------------------------------------


def kernel(case: dict[str, Any], rehearse: bool) -> Row:
    """The worst error of the output and the three gradients, as a share of what it may be."""
    import jax
    import jax.numpy as jnp

    with jax.default_matmul_precision("highest"):
        exact = both("reference", case, jnp.float32)
    plain = both("reference", case, jnp.bfloat16)
    with stand_in() if rehearse else _nothing():
        found = both("cudnn", case, jnp.bfloat16)
    errors = [distance(ours, true) for ours, true in zip(found, exact, strict=True)]
    allowed = [2 * distance(theirs, true) for theirs, true in zip(plain, exact, strict=True)]
    worst = max(ours / most for ours, most in zip(errors, allowed, strict=True))
    return {"ok": bool(worst < 1), "worst": worst, "limit": 1.0, "errors": errors}


def both(backend: str, case: dict[str, Any], dtype: Any) -> list[np.ndarray]:
    """Output and gradients by q, k and v; real tokens alone."""
    import jax
    import jax.numpy as jnp

    from jaxalign.model.attention import Sight, attend, causal, near

    rows, length, (heads, keys, width) = case.get("rows", 2), case.get("length", 512), case["heads"]
    numbers = np.random.default_rng(0)
    draw = lambda n: numbers.standard_normal((rows, length, n, width), np.float32)  # noqa: E731
    # Rounded for all: what differs is how attention is computed.
    q, k, v, above = (
        jnp.asarray(draw(n), jnp.bfloat16).astype(dtype) for n in (heads, keys, keys, heads)
    )
    real, ids = jnp.ones((rows, length)), None
    if case.get("padded"):
        real = real.at[:, length * 3 // 4 :].set(0)
    if case.get("packed"):
        ids = np.zeros((rows, length), np.int32)
        ids[:, : length // 3], ids[:, length // 3 : length * 3 // 4] = 1, 2
        real = jnp.asarray(ids != 0, jnp.float32)
    windows, kind = case.get("windows", (0,)), case.get("kind", 0)
    place, cap = jnp.arange(length)[None], case.get("cap", 0.0)

    def total(q: Any, k: Any, v: Any, ids: Any) -> Any:
        mask = causal(length, ids)
        if windows[kind]:
            mask = mask & near(place, place, windows[kind])
        sight = Sight(ids, windows, jnp.int32(kind))
        out = attend(q, k, v, mask, backend, width**-0.5, cap, sight)
        out = out * real[..., None, None].astype(out.dtype)
        return jnp.sum((out * above).astype(jnp.float32)), out

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = step(q, k, v, ids)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def distance(ours: np.ndarray, true: np.ndarray) -> float:
    """‖ours - true‖ / ‖true‖; infinite where something is not finite."""
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.linalg.norm(ours - true) / np.linalg.norm(true))


def float32_is_the_reference() -> Row:
    """`auto` does not lose float32's digits."""
    import jax.numpy as jnp

    case = {"heads": (4, 2, 64), "length": 128}
    worst = max(
        map(distance, both("auto", case, jnp.float32), both("reference", case, jnp.float32))
    )
    return {"ok": worst == 0, "worst": worst, "limit": 0.0}


def soft_cap() -> Row:
    """`auto` takes the reference, and `cudnn` by name is refused."""
    import jax.numpy as jnp

    from jaxalign.errors import UserError

    case = {"heads": (4, 2, 64), "length": 128, "cap": 3.0}
    found, expected = (both(name, case, jnp.bfloat16) for name in ("auto", "reference"))
    worst = max(map(distance, found, expected))
    try:
        both("cudnn", case, jnp.bfloat16)
    except UserError as error:
        return {"ok": worst == 0, "worst": worst, "limit": 0.0, "note": str(error)}
    return {"ok": False, "note": "model.attention=cudnn takes capped scores, but cannot cap them"}


def wide(rehearse: bool) -> Row:
    """Heads of 256 as Gemma has them, asked of cuDNN itself; an error where we give it such."""
    import jax.numpy as jnp

    from jaxalign.model import cudnn

    case = {"heads": (4, 1, 256), "length": 256, "packed": True, "windows": (0, 48), "kind": 1}
    ours, refused = cudnn.refusal, cudnn.refusal(jnp.zeros((1, 1, 1, 256), jnp.bfloat16), 0.0)
    cudnn.refusal = lambda q, cap: ""
    try:
        found = kernel(case, rehearse)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        return {"ok": bool(refused), "note": f"refused: {type(error).__name__}: {reason}"}
    finally:
        cudnn.refusal = ours
    if not refused:
        return found
    return found | {"ok": True, "note": f"cuDNN computes it; ours says: {refused}"}


@contextmanager
def stand_in() -> Iterator[None]:
    """JAX's own attention in the place of cuDNN's, which needs a GPU."""
    import jax

    real = jax.nn.dot_product_attention
    jax.nn.dot_product_attention = lambda *given, implementation, **more: real(
        *given, implementation="xla", **more
    )
    try:
        yield
    finally:
        jax.nn.dot_product_attention = real


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# --- weights in 4 and 8 bits ----------------------------------------------------------------------


def quantised(kind: str, rehearse: bool) -> Row:
    """A projection and its gradient against NumPy's reading of the stored numbers."""
    import jax
    import jax.numpy as jnp

    from jaxalign.frozen.projection import Projection
    from jaxalign.frozen.quantised import quantise

    size = 256 if rehearse else 4096
    numbers = np.random.default_rng(0)
    weight = numbers.standard_normal((1, size, size), np.float32) * 0.02
    small = jax.jit(partial(quantise, kind=kind, inputs=1))(jnp.asarray(weight))
    small = jax.tree.map(lambda leaf: leaf[0], small)
    true = read(small)
    x, above = (numbers.standard_normal((64, size), np.float32) for _ in range(2))
    expected = [x @ true, above @ true.T]

    def both_ways(x: Any, dtype: Any) -> list[np.ndarray]:
        y, pull = jax.vjp(Projection(small, None, 1, "D F"), x.astype(dtype))
        return [np.asarray(y, np.float32), np.asarray(pull(above.astype(y.dtype))[0], np.float32)]

    with jax.default_matmul_precision("highest"):
        exact = max(map(distance, both_ways(x, jnp.float32), expected))
    rough = max(map(distance, both_ways(x, jnp.bfloat16), expected))
    ok = exact < 1e-5 and rough < 1e-2
    return {"ok": ok, "worst": exact, "limit": 1e-5, "bfloat16": rough, "bfloat16_limit": 1e-2}


def read(small: Any) -> np.ndarray:
    """The weight that a quantised one stands for, by NumPy alone: [in, out]."""
    from jaxalign.frozen.quantised import NF4

    values, scales = np.asarray(small.values), np.asarray(small.scales, np.float32)
    if small.kind == "int8":
        return values.astype(np.float32) * scales
    groups = values.reshape(scales.shape[0], -1, values.shape[-1])
    numbers = np.concatenate([groups & 15, groups >> 4], axis=1)
    wide = np.asarray(NF4, np.float32)[numbers] * scales[:, None]
    return wide.reshape(-1, values.shape[-1])


# --- a resumed run --------------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a signal: nothing of the package catches it."""


def resumed() -> Row:
    """The demo's adapter after four updates, at once and with a kill after two."""
    import jax

    from jaxalign.config import load
    from jaxalign.hf.load import load_spec
    from jaxalign.hf.peft import load_peft
    from jaxalign.train import loop

    with tempfile.TemporaryDirectory() as folder:
        words = [
            "train.steps=4", "train.eval_every=2", "train.eval_batches=1", "checkpoint.every=2",
            "optim.warmup_steps=0", "batch.buckets=[40]", "log.progress=none", "mesh.data=1",
        ]  # fmt: skip
        runs = [
            load(REPO / "jaxalign/demo/demo.yaml", [*words, f"output={folder}/{name}"]).config
            for name in ("whole", "parted")
        ]
        loop.train(runs[0])
        real = loop._batches

        def dying(run: Any, start: int) -> Any:
            for number, item in enumerate(real(run, start)):
                if start + number == 2:
                    raise Killed
                yield item

        loop._batches = dying
        try:
            loop.train(runs[1])
        except Killed:
            pass
        finally:
            loop._batches = real
        result = loop.train(runs[1])
        spec = load_spec(runs[0].model.path)
        whole, parted = (
            jax.tree.leaves(load_peft(f"{run.output}/adapter", spec)[0]) for run in runs
        )
    gaps = [distance(np.asarray(b), np.asarray(a)) for a, b in zip(whole, parted, strict=True)]
    note = "bit for bit" if max(gaps) == 0 else "not bit for bit"
    ok = result.step == 4 and max(gaps) < 1e-5
    return {"ok": ok, "worst": max(gaps), "limit": 1e-5, "note": note}


# --- golden values --------------------------------------------------------------------------------


def cases() -> list[Any]:
    """The cases that come with the repository."""
    from tests.parity.golden import CASES

    return CASES


def golden(case: Any, part: Part, most: float) -> Row:
    """Losses and gradients of each phase for which time is left; products in full float32."""
    import jax

    from jaxalign.train.phases.build import phase_loss
    from jaxalign.train.state import Frozen
    from tests.parity.golden import pair_batch, task_batch

    inputs, wanted = case.arrays("probe_inputs.npz"), case.arrays("expected_grads.npz")
    losses = {
        "task": case.arrays("expected_task.npz")["task_loss"],
        **{
            name.removeprefix("loss/"): value
            for name, value in case.arrays("expected_align.npz").items()
            if name.startswith("loss/")
        },
    }
    names = sorted({key.split("/")[0] for key in wanted}, key=lambda name: name != "task")
    loss_gap, gradient_gap, seen, least = 0.0, 0.0, [], part.left - most
    for name in names:
        if seen and part.left < max(8, least) and not part.rehearse:
            break
        phase = phase_of(case, name)
        batch = (task_batch if name == "task" else pair_batch)(inputs)

        def loss(lora: Any, base: Any, phase: Any = phase, batch: Any = batch) -> Any:
            return phase_loss(phase, lora, base, batch, None)[0]

        with jax.default_matmul_precision("highest"):
            found, slopes = jax.jit(jax.value_and_grad(loss))(case.lora, Frozen(case.params))
        loss_gap = max(loss_gap, abs(float(found) - float(losses[name])))
        theirs = {k.split("/", 1)[1]: v for k, v in wanted.items() if k.startswith(name + "/")}
        ours = case.to_peft(slopes)
        flat = lambda of: np.concatenate([np.ravel(of[k]) for k in sorted(theirs)])  # noqa: B023, E731
        gradient_gap = max(gradient_gap, distance(flat(ours), flat(theirs)))
        seen.append(name)
    ok = loss_gap < LOSS and gradient_gap < GRADIENT
    note = f"losses to {loss_gap:.0e} (limit {LOSS:.0e}); {len(seen)} of {len(names)} phases"
    return {"ok": ok, "worst": gradient_gap, "limit": GRADIENT, "note": note}


def laid(case: Any, phase: str) -> Row:
    """Loss and gradient of the short rows of slots.py on a golden model, laid either way."""
    import jax
    import slots

    from jaxalign.train.phases.build import phase_loss
    from jaxalign.train.state import Frozen

    vocab = case.params["embed"].shape[0]
    computes = phase_of(case, "task" if phase == "task" else "k2_T0.1_mean_both")
    found = []
    for way in slots.LAYOUTS:
        stream = slots.stream_of(phase, slots.texts(phase, vocab), laid=way == slots.LAYOUTS[0])
        batch = jax.tree.map(lambda leaf: leaf[0], stream.stack([0]))

        def loss(lora: Any, batch: Any) -> Any:
            return phase_loss(computes, lora, Frozen(case.params), batch, None)[0]

        with jax.default_matmul_precision("highest"):
            found.append(jax.jit(jax.value_and_grad(loss))(case.lora, batch))
    (one, ours), (other, theirs) = found
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    gap = distance(flat(ours), flat(theirs))
    losses = abs(float(one) / float(other) - 1)
    ok = gap < LAID and losses < LAID
    return {"ok": ok, "worst": gap, "limit": LAID, "note": f"losses to {losses:.0e}"}


def phase_of(case: Any, name: str) -> Any:
    """The phase behind `task` or a name such as `k2_T0.1_mean_uni`."""
    from jaxalign.objectives import bind, resolve
    from jaxalign.train.phases.build import Term, build

    objective, options, number = "language_model", {}, 0
    if name != "task":
        layer, temperature, pooling, way = name.split("_")
        objective, number = "contrastive", 1
        options = {
            "layer": int(layer[1:]),
            "temperature": float(temperature[1:]),
            "pooling": {"mean": "mean", "bos": "first"}[pooling],
            "detach": "target" if way == "uni" else "none",
            "group": 64,
        }
    bound = bind(resolve(objective), objective, options, "options", {}, {})
    return build(case.decoder(), (Term(objective, bound),), number=number)


if __name__ == "__main__":
    main()
