"""Updates of Llama 3 8B with LoRA: compile time, tokens a second, TFLOP/s, memory.

The card is measured first (a bf16 product, a copy), so that MFU is a share of what this very card
does. Weights are random and made on the device; every token of a task row is trained, no dropout.

    python benchmarks/gpu/fast.py --seconds 300
"""

from __future__ import annotations

from typing import Any

from part import Part, Row, median_seconds, need_gpu
from shapes import LARGE, LLAMA, TASK, WORK, Work, hf_config, least_flops, shrunk, spec_of

MARGIN = 0.97  # of a device's memory that a program may take


def main() -> None:
    part = Part(__doc__)
    need_gpu(part)
    part.measure("card: bf16 product", lambda: product(256 if part.rehearse else 8192))
    part.measure("card: copy", lambda: copy(1 << (20 if part.rehearse else 31)))
    spec, made = spec_of(hf_config(LLAMA, part.rehearse)), []

    def weights() -> dict:
        import ours

        if not made:
            made.append(ours.random_weights(spec))
        return made[0]

    chosen = WORK[:3] if part.quick else WORK
    for work in chosen:
        measure(part, spec, work, ("names", "full"), weights)
    for remat in () if part.quick else ("full", "dots"):
        measure(part, spec, TASK, (remat,), weights, f", remat {remat}")
    if part.full:
        made.clear()  # the 8B weights make room
        large = spec_of(hf_config(LARGE, part.rehearse))
        one = Work("70B in nf4, task 2 x 2,048", "task", 1, 2, 2048)
        measure(part, large, one, ("full",), lambda: None, quantize="nf4")


def measure(
    part: Part,
    spec: Any,
    work: Work,
    policies: tuple[str, ...],
    weights: Any,
    suffix: str = "",
    quantize: str = "none",
) -> None:
    """The first of these policies that fits."""
    small = shrunk(work) if part.rehearse else work
    part.measure(
        work.name + suffix,
        lambda: update(part, spec, small, policies, weights(), quantize),
        need=20,
    )


def update(
    part: Part,
    spec: Any,
    work: Work,
    policies: tuple[str, ...],
    weights: Any,
    quantize: str = "none",
) -> Row:
    """One work's row."""
    import jax
    import ours

    refused = {}
    for remat in policies:
        one = ours.Ours(spec, work, remat, weights, quantize)
        compiled = one.compile()
        limit = ours.device_memory().get("limit_gb", float("inf"))
        needed = one.memory / 1e9
        if needed > MARGIN * limit and remat != policies[-1]:
            refused[remat] = round(needed, 1)
            continue
        try:
            loss = one.run()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or remat == policies[-1]:
                raise
            refused[remat] = round(needed, 1)
            continue
        seconds = median_seconds(one.run, most=3 if part.quick else 5)
        row = {
            "remat": remat,
            "loss": round(loss, 4),
            "compile_s": round(compiled, 1),
            "seconds": seconds,
            "tokens": work.tokens,
            "flops": least_flops(spec, work),
            "memory_gb": round(needed, 2),
            **ours.device_memory(),
        }
        return row | ({"too_large_gb": refused} if refused else {})
    raise RuntimeError("no remat policy was given")


def product(size: int, times: int = 20) -> Row:
    """TFLOP/s of a bf16 product of random square matrices."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(n), (size, size), jnp.bfloat16) for n in (0, 1))
    multiply = jax.jit(jnp.matmul)

    def run() -> None:
        for _ in range(times):
            found = multiply(a, b)
        found.block_until_ready()

    run()
    seconds = median_seconds(run) / times
    return {"flops_per_s": 2 * size**3 / seconds, "device": jax.devices()[0].device_kind}


def copy(size: int, times: int = 10) -> Row:
    """Bytes a second, read plus written, of an array of so many bytes."""
    import jax
    import jax.numpy as jnp

    array = jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16)
    change = jax.jit(lambda x: -x)

    def run() -> None:
        for _ in range(times):
            found = change(array)
        found.block_until_ready()

    run()
    seconds = median_seconds(run) / times
    return {"bytes_per_s": 2 * size / seconds}


if __name__ == "__main__":
    main()
