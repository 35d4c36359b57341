"""What we ask of XLA beyond its defaults, by platform, each with its reason.

Set per program (`jax.jit(compiler_options=...)`), so that nobody has to export XLA_FLAGS; flags
that only work in the environment stand in `launch/flags`.

    jax.jit(step, compiler_options=options('tpu'))
"""

from __future__ import annotations

OPTIONS: dict[str, dict[str, str]] = {
    "tpu": {
        # Weights gathered beside the computation before, as a whole, instead of piece by piece
        # within a product cut into as many pieces: by the compiler's own estimate a step of
        # Llama 3 8B on 16 chips takes 308 ms instead of 366 (docs/tpu.md).
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        # That gathering runs beside products, woven into them. The default on v5e; on v6e nothing
        # is hidden without these, and with them 24 of 25 GB a step are.
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}


def options(platform: str) -> dict[str, str] | None:
    """Compiler options for programs on this platform; None where the defaults are best."""
    return OPTIONS.get(platform)
