"""cuDNN's flash attention on NVIDIA GPUs, as `jax.nn.dot_product_attention` calls it.

Chosen by `model.attention=auto` on a GPU; splits over a mesh by rows and heads on its own.

    y = attend(q, k, v, segments, window=0, scale=0.1, cap=0.0)     # [B, T, N, H]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

LEAST = 0  # tokens of a row from which the kernel is worth it


def refusal(q: Any, cap: float, capability: str) -> str:
    """Why the kernel cannot take these shapes on such a GPU; empty where it can."""
    if cap:
        return "cannot cap the scores of attention, as this model does"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16, not {q.dtype}"
    most = widest(capability)
    if q.shape[-1] % 8 or q.shape[-1] > most:
        return f"takes heads of up to {most} numbers, a multiple of 8, not {q.shape[-1]}"
    return ""


def widest(capability: str) -> int:
    """Numbers of a head whose gradient cuDNN computes on a GPU of this compute capability.

    256 are for Hopper alone (9): cuDNN's backward pass on newer cards takes 128, though JAX lets
    more pass.
    """
    return 256 if capability.startswith("9.") else 128


def capability() -> str:
    """The compute capability of a GPU of this machine; empty where there is none."""
    return str(getattr(jax.local_devices()[0], "compute_capability", ""))


def keeps(primitive: Any) -> bool:
    """Whether it is the kernel's forward pass, whose results the backward pass reads."""
    return "dot_product_attention_fwd" in primitive.name


def attend(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, T, K, H]
    v: jax.Array,  # [B, T, K, H]
    segments: jax.Array | None,  # [B, T] int
    *,
    window: int,
    scale: float,
    cap: float,
) -> jax.Array:  # [B, T, N, H]
    """Causal attention within segments; a query sees the last `window` tokens (0: all)."""
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=True,
        # A window of w tokens holds the query itself and w - 1 before it.
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
