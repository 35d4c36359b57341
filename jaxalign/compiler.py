"""What we ask of XLA beyond its defaults, by platform, each with its reason.

Set per program (`jax.jit(compiler_options=...)`), so that nobody has to export XLA_FLAGS; flags
that only work in the environment stand in `launch/flags`.

    jax.jit(step, compiler_options=options(jax.devices()[0]))
"""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, str]] = {
    "tpu": {
        # Weights gathered during the computation before, as a whole, instead of piece by piece
        # within a product cut into as many pieces: by the compiler's own estimate a step of
        # Llama 3 8B on 16 chips takes 308 ms instead of 366 (docs/tpu.md).
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        # That gathering runs during products, woven into them. The default on v5e; on v6e nothing
        # is hidden without these, and with them 24 of 25 GB a step are.
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}


# On-chip memory (KiB) that one fused operation may take. The default of 16 MB leaves large products
# with small tiles: by the compiler's estimate the step above takes 262 ms instead of 308 with 24 MB
# (with 32 or 64 it is 3 to 5 ms faster still, but less of the gathering is hidden). Chips that are
# not named were not looked at.
FUSION_MEMORY = {
    "TPU v5 lite": 24 << 10,
    "TPU v5": 32 << 10,  # v5p: 486 to 462 ms
    "TPU v6 lite": 64 << 10,  # 184 to 179 ms; nothing below
}


def options(device: Any) -> dict[str, str] | None:
    """Compiler options for programs on this device; None where the defaults are best."""
    asked = OPTIONS.get(device.platform)
    if asked is None or device.device_kind not in FUSION_MEMORY:
        return asked
    return asked | {"xla_tpu_scoped_vmem_limit_kib": str(FUSION_MEMORY[device.device_kind])}
