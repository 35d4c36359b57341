"""Attention: who sees whom, and how it is computed.

A query sees the keys of its own segment up to its own place. Rows that are only padded on the
right need no segments: no real token ever looks right, so causality alone is exact. A layer with a
window sees only the latest of them.

    mask = causal(T, segments)                     # [B or 1, T, T] bool
    mask &= near(places, places, window=512)
    y = attend(q, k, v, mask, backend='reference') # [B, T, N, H]
    y = attend(q, k, v, mask, 'auto', sight=Sight(segments))

The reference reads the mask. A kernel reads the same facts from `sight` and never forms the
[T, S] scores; where there is none (a cache), or where a kernel cannot take the shapes and `auto`
chose it, the reference does the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxalign.errors import UserError
from jaxalign.model import cudnn, splash
from jaxalign.sharding import Array, platform

KERNELS = {"splash": splash, "cudnn": cudnn}
FASTEST = {"tpu": "splash", "gpu": "cudnn"}  # platform -> kernel


@partial(
    jax.tree_util.register_dataclass, data_fields=("segments", "kind"), meta_fields=("windows",)
)
@dataclass(frozen=True)
class Sight:
    """Who sees whom in a pass over whole causal rows, as a kernel wants to know it."""

    segments: Array | None = None  # [B, T] int, 0 for padding; None: one text a row
    windows: tuple[int, ...] = (0,)  # the windows that layers have; 0: none
    kind: Array | int = 0  # which of them this layer has


def causal(length: int, segments: Array | None = None) -> jax.Array:
    """Which key each query sees, [B or 1, T, T] bool.

    Args:
      length: T.
      segments: [B, T] int, 0 for padding; None where rows hold one text and right padding.
    """
    place = jnp.arange(length)
    before = (place[:, None] >= place[None, :])[None]  # [1, T, T]
    if segments is None:
        return before
    return before & (segments[:, :, None] == segments[:, None, :])


def near(queries: Array, keys: Array, window: Array | int) -> jax.Array:
    """Whether a key is less than `window` places before a query, [B or 1, T, S] bool.

    Args:
      queries: [B or 1, T] int, their places in the text.
      keys: [B or 1, S] int.
      window: tokens a query sees, its own included.
    """
    return jnp.asarray(queries[:, :, None] - keys[:, None, :] < window)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(x / cap), which stays within ±cap (Gemma 2, section 2.2); `x` where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    mask: jax.Array,  # [B or 1, T, S] bool
    backend: str = "auto",
    scale: float | None = None,
    cap: float = 0.0,
    sight: Sight | None = None,
) -> jax.Array:  # [B, T, N, H]
    """Softmax attention with grouped heads; softmax in float32.

    Args:
      backend: `reference`; `splash` (TPU) or `cudnn` (GPU); `auto`: the kernel of this platform
        where it can, else the reference.
      scale: of the scores; None: 1/sqrt(H).
      cap: of the scores, see `soft_cap`.
      sight: what the mask says, for kernels.

    Raises:
      UserError: a kernel asked for by name that cannot take these shapes.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = FASTEST.get(platform(), "reference") if backend == "auto" else backend
    if name == "reference" or sight is None:
        return _reference(q, k, v, mask, scale, cap)
    kernel = KERNELS[name]
    refusal = kernel.refusal(q, cap)
    if backend == "auto" and (refusal or q.shape[1] < kernel.LEAST):
        return _reference(q, k, v, mask, scale, cap)
    if refusal:
        raise UserError(f"model.attention={name} {refusal}; use model.attention=auto")
    runs = [partial(kernel.attend, window=window, scale=scale, cap=cap) for window in sight.windows]
    if len(runs) == 1:
        return runs[0](q, k, v, sight.segments)
    return jax.lax.switch(sight.kind, runs, q, k, v, sight.segments)


# The backward pass computes the [T, S] scores again instead of keeping them for every layer.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5))
def _reference(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, cap: float
) -> jax.Array:
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    # Heads are moved in front here, where arrays are [.., H] wide; the [T, S] scores never move.
    q = q.reshape(batch, length, groups, -1, width) * scale
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, width)  # [B, K, G·T, H]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, S, H]
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups, -1, length, k.shape[2])  # [B, K, G, T, S]
    scores = soft_cap(scores, cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, groups, -1, k.shape[2])  # [B, K, G·T, S]
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v)
    out = out.reshape(batch, groups, -1, length, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, width)
