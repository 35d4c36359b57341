"""What accelerators can do, by the vendors' data sheets: the peaks that MFU and plans refer to.

chip = CHIPS['v5e']
chip.flops, chip.memory                          # 1.97e14 FLOP/s in bf16, 1.6e10 bytes
of_kind('TPU v5 lite')                           # the same, by JAX's name of a device
"""

from __future__ import annotations

from dataclasses import dataclass

GiB = float(1 << 30)


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a chip, its cores together."""

    name: str
    kinds: tuple[str, ...]  # JAX's `device_kind`
    flops: float  # dense bf16 FLOP/s
    memory: float  # bytes that programs may use
    bandwidth: float  # bytes/s of that memory
    link: float = 0.0  # bytes/s to all neighbours together, one way; 0: not known here
    clock: float = 0.0  # Hz in which the TPU compiler counts cycles; 0: it does not
    capability: str = ""  # of a GPU, the CUDA compute capability; empty: a TPU

    @property
    def platform(self) -> str:
        """`tpu` or `gpu`, as JAX names it."""
        return "gpu" if self.capability else "tpu"


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; memory is what the compiler lets programs have
# of it (v5e: 15.75 of 16 GiB), a link half of the bidirectional bandwidth. A clock is the peak over
# what a chip's matrix units multiply in a cycle (v4, v5p: 8 of 128 x 128, v5e: 4). The two units of
# 256 x 256 in a v6e would need 3.5 GHz for its peak, but the compiler counts slower cycles: it
# tells 2.98 million of them for a product of 8192 cubed, which at 3.5 GHz were 1.4 times the peak,
# and at half of that is 70 % of it (on the others the same product reaches 88 to 94 %).
# GPUs: NVIDIA's data sheets, SXM, without sparsity; of their memory JAX may take the share that
# launch/gpu_flags.sh sets.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 30.75 * GiB, 1.2e12, 300e9, 1.05e9),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GiB, 0.819e12, 200e9, 1.5e9),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GiB, 2.765e12, 600e9, 1.75e9),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GiB, 1.638e12, 400e9, 1.75e9),
        Chip(
            "a100-40", ("NVIDIA A100-SXM4-40GB",), 312e12, 0.9 * 40e9, 1.555e12, 300e9, 0.0, "8.0"
        ),
        Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 0.9 * 80e9, 2.039e12, 300e9, 0.0, "8.0"),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 0.9 * 80e9, 3.35e12, 450e9, 0.0, "9.0"),
        Chip("h200", ("NVIDIA H200",), 989e12, 0.9 * 141e9, 4.8e12, 450e9, 0.0, "9.0"),
    )
}


def of_kind(kind: str) -> Chip | None:
    """The chip that JAX calls so, or None."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
