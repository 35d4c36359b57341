"""Sums over answer tokens whose logits never exist all at once.

A chunk of the answers' columns passes the head at a time: at most one chunk of [tokens, V] float32
is alive. Its logits give its share of the loss and, in the same visit, of the gradient: nothing is
computed twice.

    chunk = columns(width=96, logits=32 * 128256)
    total, logs = summed(visit, hidden, head, answers, chunk)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.sharding import constrain, devices, platform

CHUNK_LOGITS = 1 << 24  # float32 logits alive at once on a device: 64 MiB
# A GPU reads the head from memory for each chunk: on an H100 updates of Llama 3 8B are 5 % faster
# with 512 MiB (docs/gpu.md). A smaller GPU takes less: this share of its memory, in powers of two,
# so that equal cards agree.
GPU_LOGITS, GPU_SHARE = 1 << 27, 1 / 96
CPU_LOGITS = 1 << 26  # it rearranges the whole head for each chunk's products: 256 MiB

# (hidden [B, c, D], head [V, D], given, slopes: 'logits' | 'none') -> (total, logs, the total's
# slopes [B, c, V] by hidden @ head in hidden's dtype, or None).
Visit = Callable[[jax.Array, jax.Array, Any, str], tuple[jax.Array, Any, jax.Array | None]]


def at_once(where: str | None = None, memory: float | None = None) -> int:
    """Float32 logits that a device holds at once; None: of the mesh in use, of this machine."""
    where = where or platform()
    if where != "gpu":
        return CPU_LOGITS if where == "cpu" else CHUNK_LOGITS
    if memory is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    share = 1 << max(0, int(GPU_SHARE * memory / 4).bit_length() - 1)
    return max(CHUNK_LOGITS, min(GPU_LOGITS, share))


def columns(width: int, logits: int) -> int:
    """How many of `width` columns make a chunk, where a column has so many logits."""
    # Logits are split over the whole mesh: rows over data, the vocabulary over the rest.
    chunk = max(1, min(width, at_once() * devices() // logits))
    while width % chunk:
        chunk -= 1
    return chunk


@partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def summed(
    visit: Visit, hidden: jax.Array, head: jax.Array, given: Any, chunk: int
) -> tuple[jax.Array, Any]:
    """The sums of what `visit` finds, in chunks of so many columns of A.

    Args:
      hidden: [B, A, D]; head: [V, D]. Gradients flow into these two.
      given: arrays [B, A, ...] that the visit also reads; no gradient flows into them.
    """

    def body(_: Any, piece: Any) -> Any:
        total, logs, _ = visit(piece[0], head, piece[1], "none")
        return None, (total, logs)

    _, found = jax.lax.scan(body, None, (_split(hidden, chunk), _split(given, chunk)))
    return jax.tree.map(jnp.sum, found)


def _forward(visit: Visit, hidden: Any, head: Any, given: Any, chunk: int) -> Any:
    """The same, and its gradients: by `head` only where it is trained."""
    given = jax.tree.map(lambda x: x.value, given, is_leaf=lambda x: hasattr(x, "perturbed"))
    pieces = (_split(hidden.value, chunk), _split(given, chunk))
    weights = head.value

    def body(by_head: Any, piece: Any) -> Any:
        total, logs, slopes = visit(piece[0], weights, piece[1], "logits")
        by_hidden = jnp.einsum("BAV,VD->BAD", slopes, weights)
        if by_head is not None:
            wide = {"preferred_element_type": jnp.float32}
            by_head = by_head + jnp.einsum("BAV,BAD->VD", slopes, piece[0], **wide)
        return by_head, ((total, logs), constrain(by_hidden, "B T D"))

    start = jnp.zeros(weights.shape, jnp.float32) if head.perturbed else None
    by_head, (found, by_hidden) = jax.lax.scan(body, start, pieces)
    by_hidden = jnp.moveaxis(by_hidden, 0, 1).reshape(hidden.value.shape)
    by_head = None if by_head is None else by_head.astype(weights.dtype)
    return jax.tree.map(jnp.sum, found), (by_hidden, by_head)


def _backward(visit: Visit, chunk: int, kept: Any, slopes: Any) -> Any:
    by_hidden, by_head = kept
    slope = slopes[0]  # logs have none
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    scaled = lambda x: None if x is None else (slope * x).astype(x.dtype)  # noqa: E731
    return scaled(by_hidden), scaled(by_head), None


summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _split(tree: Any, chunk: int) -> Any:
    """[B, A, ...] -> [A / chunk, B, chunk, ...]."""

    def pieces(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(pieces, tree)
