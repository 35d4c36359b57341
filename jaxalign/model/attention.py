"""Attention: who sees whom, and how it is computed.

A query sees the keys of its own segment up to its own place. Rows that are only padded on the
right need no segments: no real token ever looks right, so causality alone is exact. A layer with a
window sees only the latest of them.

    mask = causal(T, segments)                     # [B or 1, T, T] bool
    mask &= near(places, places, window=512)
    y = attend(q, k, v, mask, backend='reference') # [B, T, N, H]
    y = attend(q, k, v, mask, 'auto', sight=Sight(segments))

Short texts end to end in a long sequence look no further than one of them reaches: `local` is then
the mask, and scores are formed with the own and a few previous chunks of C tokens alone.

    y = attend(q, k, v, local(segments, *cut(reach)))        # no text has more than `reach` tokens

Keys and values that come before all of these, and that several rows share, are a `Before`: the
start that all prompts have in common, a cache of it, or a prefix that is trained.

    y = attend(q, k, v, mask, before=Before(keys, values, seen))

The reference reads the mask. A kernel reads the same facts from `sight` and never forms the
[T, S] scores; where there is none (a cache, something before), or where a kernel cannot take the
shapes and `auto` chose it, the reference does the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxalign.errors import UserError
from jaxalign.model import cudnn, splash
from jaxalign.sharding import Array, platform

KERNELS = {"splash": splash, "cudnn": cudnn}
FASTEST = {"tpu": "splash", "gpu": "cudnn"}  # platform -> kernel
MIXED = "mixed"  # checkpoint name of what `attend` gives, unless the kernel's own result is kept


@partial(
    jax.tree_util.register_dataclass, data_fields=("segments", "kind"), meta_fields=("windows",)
)
@dataclass(frozen=True)
class Sight:
    """Who sees whom in a pass over whole causal rows, as a kernel wants to know it."""

    segments: Array | None = None  # [B, T] int, 0 for padding; None: one text a row
    windows: tuple[int, ...] = (0,)  # the windows that layers have; 0: none
    kind: Array | int = 0  # which of them this layer has


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Before:
    """More keys and values, in front of those of a sequence."""

    keys: jax.Array  # [B or 1, P, K, H]
    values: jax.Array  # [B or 1, P, K, H]
    seen: jax.Array  # [B or 1, T, P] bool: which of them each query sees

    def behind(self, first: Before | None) -> Before:
        """These, with `first` in front of them."""
        if first is None:
            return self
        rows = max(first.keys.shape[0], self.keys.shape[0])
        wide = lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:]))  # noqa: E731
        keys, values = (
            jnp.concatenate([wide(a), wide(b)], axis=1)
            for a, b in ((first.keys, self.keys), (first.values, self.values))
        )
        rows = max(first.seen.shape[0], self.seen.shape[0])
        return Before(keys, values, jnp.concatenate([wide(first.seen), wide(self.seen)], axis=2))


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


def local(segments: Array, chunk: int, back: int = 1) -> jax.Array:
    """`causal` of short texts end to end, [B, n, C, (back + 1) C] bool for n chunks of C tokens.

    The keys of a chunk are those of the chunks before and its own.

    Args:
      segments: [B, T] int; neighbours of one number are a text.
      chunk: C.
      back: chunks before; no text has more than back · C + 1 tokens.
    """
    place = jnp.arange(segments.shape[1])[None] + 1  # 0: in front of the first chunk
    (mine, theirs), (here, there) = chunks(segments, chunk, back), chunks(place, chunk, back)
    same = mine[..., :, None] == theirs[..., None, :]
    before = here[..., :, None] >= there[..., None, :]
    return same & before & (there > 0)[..., None, :]


def chunks(x: Array, chunk: int, back: int = 1) -> tuple[jax.Array, jax.Array]:
    """x [B, T, ...] by chunks, [B, n, C, ...], and each behind those before, [B, n, S, ...]."""
    number = -(-x.shape[1] // chunk)
    rest = ((0, 0), (0, number * chunk - x.shape[1]), *[(0, 0)] * (x.ndim - 2))
    own = jnp.pad(x, rest).reshape(x.shape[0], number, chunk, *x.shape[2:])
    before = jnp.pad(own, ((0, 0), (back, 0), *[(0, 0)] * (own.ndim - 2)))
    return own, jnp.concatenate([before[:, i : i + number] for i in range(back + 1)], axis=2)


def cut(reach: int) -> tuple[int, int]:
    """Tokens of a chunk, and chunks before it that are seen, where texts have up to `reach` tokens.

    Short chunks form fewer scores in vain; of fewer than 32 tokens they make thin products. A chip
    holds scores in tiles of 8 or 16 queries by 128 keys: where a chunk ends within a tile, all of
    its numbers are moved.
    """
    ways = [(max(-(-(reach - 1) // (16 * back)) * 16, 32), back) for back in range(1, 5)]
    keys = {way: way[0] * (way[1] + 1) for way in ways}
    return min(ways, key=lambda way: (-(-keys[way] // 128), keys[way], way[1]))


def cut_of(length: int, reach: int) -> tuple[int, int] | None:
    """`cut` of sequences of so many tokens; None where they are not cut.

    Args:
      reach: tokens of the longest text in them; 0: unknown.
    """
    return cut(reach) if 0 < 2 * reach < length else None


def near(queries: Array, keys: Array, window: Array | int) -> jax.Array:
    """Whether a key is less than `window` places before a query, [..., T, S] bool.

    Args:
      queries: [..., T] int, their places in the text.
      keys: [..., S] int.
      window: tokens a query sees, its own included.
    """
    return jnp.asarray(queries[..., :, None] - keys[..., None, :] < window)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(x / cap), which stays within ±cap (Gemma 2, section 2.2); `x` where cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    mask: jax.Array,  # [B or 1, T, S] bool, or [B or 1, n, C, S] of `local`
    backend: str = "auto",
    scale: float | None = None,
    cap: float = 0.0,
    sight: Sight | None = None,
    before: Before | None = None,
) -> jax.Array:  # [B, T, N, H]
    """Softmax attention with grouped heads; softmax in float32.

    Args:
      backend: `reference`; `splash` (TPU) or `cudnn` (GPU); `auto`: the kernel of this platform
        where it can, else the reference.
      scale: of the scores; None: 1/sqrt(H).
      cap: of the scores, see `soft_cap`.
      sight: what the mask says, for kernels.
      before: more keys and values, for the reference.

    Raises:
      UserError: a kernel asked for by name that cannot take these shapes.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    told = sight is not None and before is None
    kernel = kernel_of(q, backend, cap, platform(), cudnn.capability()) if told else None
    if kernel is None or sight is None:
        return checkpoint_name(_reference(q, k, v, mask, before, scale, cap), MIXED)
    runs = [partial(kernel.attend, window=window, scale=scale, cap=cap) for window in sight.windows]
    if len(runs) == 1:
        mixed = runs[0](q, k, v, sight.segments)
    else:
        mixed = jax.lax.switch(sight.kind, runs, q, k, v, sight.segments)
    return mixed if kernel is cudnn else checkpoint_name(mixed, MIXED)


def kernel_of(q: Any, backend: str, cap: float, platform: str, capability: str) -> Any:
    """The kernel that runs attention of these shapes; None: the reference does.

    Args:
      q: [B, T, N, H], an array or its shape and dtype.
      backend: as of `attend`, and so is `cap`.
      platform: `tpu`, `gpu` or `cpu`; `capability` as of `cudnn.capability`, of a GPU.

    Raises:
      UserError: it was asked for by name and cannot.
    """
    name = FASTEST.get(platform, "reference") if backend == "auto" else backend
    if name == "reference":
        return None
    kernel = KERNELS[name]
    refusal = kernel.refusal(q, cap, capability)
    if backend == "auto":
        return None if refusal or q.shape[1] < kernel.LEAST else kernel
    if refusal:
        raise UserError(f"model.attention={name} {refusal}; use model.attention=auto")
    return kernel


# The backward pass computes the [T, S] scores again instead of keeping them for every layer.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(5, 6))
def _reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    before: Before | None,
    scale: float,
    cap: float,
) -> jax.Array:
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    # Chunks are an axis n of their own, where there are any; then T is a chunk's length.
    n = "n" if mask.ndim == 4 else ""
    # Heads are moved in front here, where arrays are [.., H] wide; the scores never move.
    k, v = (x.swapaxes(1, 2) for x in (k, v))  # [B, K, S, H]
    if n:
        chunk, back = mask.shape[2], mask.shape[3] // mask.shape[2] - 1
        q = _of_heads((q * scale).swapaxes(1, 2), chunk)[0]
        q = q.reshape(batch, groups, -1, *q.shape[2:]).swapaxes(2, 3)
        k, v = (_of_heads(x, chunk, back)[1] for x in (k, v))
    else:
        q = q.reshape(batch, length, groups, -1, width) * scale
        q = q.transpose(0, 2, 3, 1, 4)
    each = q.shape[:-1]  # [B, K, n, G, T]
    q = q.reshape(*q.shape[:-3], -1, width)  # [B, K, n, G·T, H]

    def part(product: str, keys: jax.Array, q: jax.Array, seen: jax.Array) -> jax.Array:
        """Scores [B, K, n, G, T, keys], capped, the least number where nobody looks."""
        scores = jnp.einsum(product, q, keys, preferred_element_type=jnp.float32)
        scores = soft_cap(scores.reshape(*each, keys.shape[-2]), cap)
        return jnp.where(jnp.expand_dims(seen, (1, -3)), scores, jnp.finfo(jnp.float32).min)

    scores = [part(f"BK{n}QH,BK{n}SH->BK{n}QS", k, q, mask)]
    if before is not None:
        keys, values = (x.swapaxes(1, 2).astype(v.dtype) for x in (before.keys, before.values))
        one = keys.shape[0] == 1 and batch > 1  # the same for all rows: one product
        by, keys, values = ("", keys[0], values[0]) if one else ("B", keys, values)
        rows = q.reshape(batch, groups, -1, width)
        seen = chunks(before.seen, chunk)[0] if n else before.seen
        scores.append(part(f"BKQH,{by}KSH->BKQS", keys, rows, seen))
    shares = softmax(scores) if before is not None else [jax.nn.softmax(scores[0], axis=-1)]
    weights = [part.astype(v.dtype).reshape(*q.shape[:-1], -1) for part in shares]
    out = jnp.einsum(f"BK{n}QS,BK{n}SH->BK{n}QH", weights[0], v)
    if before is not None:
        ahead = weights[1].reshape(*rows.shape[:-1], -1)
        out += jnp.einsum(f"BKQS,{by}KSH->BKQH", ahead, values).reshape(out.shape)
    out = out.reshape(*each, width)
    if n:
        out = out.swapaxes(2, 3).reshape(batch, heads, -1, width)
        return out.swapaxes(1, 2)[:, :length]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def _of_heads(x: jax.Array, chunk: int, back: int = 0) -> tuple[jax.Array, jax.Array]:
    """`chunks` of x [B, N, T, H]: [B, N, n, C, H] and [B, N, n, S, H]."""
    return jax.vmap(partial(chunks, chunk=chunk, back=back), in_axes=1, out_axes=1)(x)


@jax.custom_jvp
def softmax(parts: list[jax.Array]) -> list[jax.Array]:
    """Softmax over the last axes of all parts together.

    They are never put next to one another: a chip's memory holds the last axis in lines of 128
    numbers, and to begin a part within a line moves all of it.
    """
    least = jnp.finfo(parts[0].dtype).min  # of a part without keys
    top = reduce(jnp.maximum, [jnp.max(p, axis=-1, keepdims=True, initial=least) for p in parts])
    shares = [jnp.exp(part - top) for part in parts]
    total = reduce(jnp.add, [jnp.sum(share, axis=-1, keepdims=True) for share in shares])
    return [share / total for share in shares]


@softmax.defjvp
def _softmax_jvp(primals: Any, tangents: Any) -> Any:
    shares = softmax(*primals)
    pairs = list(zip(shares, tangents[0], strict=True))
    mean = reduce(jnp.add, [jnp.sum(share * x, axis=-1, keepdims=True) for share, x in pairs])
    return shares, [share * (x - mean) for share, x in pairs]
