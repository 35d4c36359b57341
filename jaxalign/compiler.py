"""What we ask of XLA beyond its defaults, by platform, each with its reason.

Set per program (`jax.jit(compiler_options=...)`), so that nobody has to export XLA_FLAGS; flags
that only work in the environment are in `launch/*_flags.sh`.

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
    },
}

MEMORY = "xla_tpu_scoped_vmem_limit_kib"  # on chip, of one fused operation
# SparseCores gather weights, along one or two axes of the slice, while the main core computes; by
# default it waits. JAX's own tests of overlapping ask for the same.
ASIDE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
}
# What single chips are asked for besides. Chips that are not named were not looked at.
#
# Guides for older compilers also name `xla_tpu_enable_async_collective_fusion` and its relatives.
# On v5e it is the default. On other chips newer compilers refuse it, because it may give wrong
# results, hang or corrupt data (https://github.com/jax-ml/jax/issues/38741); older ones accept it.
CHIPS = {
    # The default of 16 MB leaves large products with small tiles: by the compiler's estimate the
    # step above takes 262 ms instead of 308 with 24 MB (with 32 or 64 it is 3 to 5 ms faster still,
    # but less of the gathering is hidden).
    "TPU v5 lite": {MEMORY: str(24 << 10)},
    "TPU v5": {MEMORY: str(32 << 10)} | ASIDE,  # v5p: 486 to 462 ms
    "TPU v6 lite": {MEMORY: str(64 << 10)} | ASIDE,  # 184 to 179 ms; nothing below
}


def options(device: Any) -> dict[str, str] | None:
    """Compiler options for programs on this device; None where the defaults are best."""
    asked = OPTIONS.get(device.platform)
    return asked and asked | CHIPS.get(device.device_kind, {})
