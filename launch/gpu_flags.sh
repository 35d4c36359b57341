# shellcheck shell=bash
# Settings of XLA and NCCL for NVIDIA GPUs, in one place, each with its reason and source. Sourced
# by launch/local_gpu and, inside a job, by launch/slurm_job.
#
# On one H100 the latency hiding scheduler made no difference (docs/gpu.md). The flags matter between
# GPUs, and several have not been tried. XLA_FLAGS that are already set come last and so win.

jaxalign_xla_flags() {
    # Moves collectives away from the computation that waits for them; off by default.
    # JAX docs, "GPU performance tips"; NVIDIA's JAX images set it ("Environment variables").
    printf '%s' '--xla_gpu_enable_latency_hiding_scheduler=true'
    # Weights split over mesh.fsdp are gathered layer by layer: one large gather instead of seven
    # small ones. 512 MiB holds a bf16 layer of an 8B model (436 MB). JAX docs, the same page: "at
    # least a Transformer Layer's weight"; the reduce-scatter counts where trainable=full.
    printf ' %s' '--xla_gpu_all_gather_combine_threshold_bytes=536870912'
    printf ' %s' '--xla_gpu_reduce_scatter_combine_threshold_bytes=536870912'
}

XLA_FLAGS="$(jaxalign_xla_flags)${XLA_FLAGS:+ $XLA_FLAGS}"
export XLA_FLAGS

# JAX takes 75 % of a GPU's memory at the start, a share meant for machines with other users; the
# rest goes to NCCL and the CUDA libraries. JAX docs, "GPU memory allocation"; NVIDIA's "Tips for
# High-Performance LLMs with JAX and XLA" uses 0.9 or 0.8.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"

# Says why a connection between nodes failed, and nothing else. NCCL docs, "Environment variables".
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Left alone on purpose: NCCL_SOCKET_IFNAME, NCCL_IB_HCA and the like belong to a site (set them in
# your shell, the launchers pass them on); CUDA_DEVICE_MAX_CONNECTIONS=1 helps Hopper and slows
# Blackwell (NVIDIA, the same tips); NCCL_PROTO and its buffer sizes were found useful within one
# machine, not between machines (JAX docs, "GPU performance tips").
