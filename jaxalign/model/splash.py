"""Splash attention: JAX's block-sparse flash kernel for TPUs, over a mesh.

The kernel skips blocks of scores that nobody sees and keeps one number a query for the way back
(Dao et al. 2022; `jax.experimental.pallas.ops.tpu.splash_attention`). It knows nothing of meshes:
rows, heads and queries are cut by `shard_map`, keys and values of a sequence are whole.

    y = attend(q, k, v, segments, window=0, scale=0.1, cap=0.0)     # [B, T, N, H]
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxalign.sharding import activation_spec, platform

LEAST = 256  # tokens of a row from which the kernel gains more than its layouts cost
LANES = 128  # queries and keys come in multiples of it
BLOCK = 512  # queries, and keys, that one visit of the kernel holds
SAVED = "splash"  # checkpoint name of the kernel's output and its normalisers

# Products of a query block with a key block in each kernel: scores and mix; scores, their slopes,
# and the gradient by queries; the same with those by keys and values.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def refusal(q: Any, cap: float, capability: str = "") -> str:
    """Why the kernel cannot take these shapes in the mesh in use; empty where it can."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["seq"]
    if q.shape[1] % (LANES * ways):
        return f"takes rows of a multiple of {LANES * ways} tokens, not {q.shape[1]}"
    if q.shape[-1] % 64:
        return f"takes heads of a multiple of 64 numbers, not {q.shape[-1]}"
    return ""


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
    q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))  # [B, heads, T, H]
    mesh = jax.sharding.get_abstract_mesh()
    options: dict[str, Any] = {"window": window, "cap": cap, "interpret": platform() != "tpu"}
    if mesh.empty or mesh.size == 1:
        kernel = _kernel(q.shape[1], q.shape[2], 1, 1, **options)
        return _rows(kernel, q, k, v, segments, segments).swapaxes(1, 2)

    specs = {
        "q": activation_spec("B N T H", q.shape, mesh),
        "k": activation_spec("B K - H", k.shape, mesh),
        "segments": activation_spec("B T", (q.shape[0], q.shape[2]), mesh),
    }
    if specs["k"][1] is None:  # fewer key heads than ways to split them: heads stay together
        specs["q"] = P(specs["q"][0], None, *specs["q"][2:])
    heads, places = specs["q"][1], specs["q"][2]
    kernel = _kernel(q.shape[1], q.shape[2], _ways(mesh, heads), _ways(mesh, places), **options)
    kernel_specs = kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, P(heads, places)))
    keys = None if segments is None else P(specs["q"][0], None)
    own = None if segments is None else specs["segments"]

    mixed = jax.shard_map(
        _rows,
        mesh=mesh,
        in_specs=(kernel_specs, specs["q"], specs["k"], specs["k"], own, keys),
        out_specs=specs["q"],
        check_vma=False,
    )(kernel, q, k, v, segments, segments)
    return mixed.swapaxes(1, 2)


def flops(name: str, shapes: list[list[int]]) -> float | None:
    """FLOPs of one call of the kernel, causal blocks alone; None for another kernel.

    Args:
      name: the kernel's in a compiled program: `splash_mha_fwd_residuals.1`.
      shapes: of its operands; behind tables of blocks come queries [B, N, T, H] and keys, where a
        single row has no axis B.
    """
    found = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    if not found:
        return None
    arrays = [shape for shape in shapes if len(shape) > 2 and shape[-1] % 64 == 0]
    if len(arrays) < 2:
        return None
    (*rows, heads, length, width), keys = arrays[:2]
    side = math.gcd(BLOCK, length)
    blocks = keys[-2] // side
    seen = (blocks + 1) / (2 * blocks)  # of all pairs of blocks: those up to the diagonal
    products = 2.0 * math.prod(rows) * heads * length * keys[-2] * width
    return PRODUCTS[found[1]] * products * seen


def _rows(
    kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, mine: Any, theirs: Any
) -> jax.Array:
    """[B, N, T, H]: the kernel on every row, with segments of queries (mine), keys (theirs)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    if mine is None:
        return jax.vmap(lambda q, k, v: kernel(q, k, v))(q, k, v)
    ids = SegmentIds(mine, theirs)
    return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, ids)


def _kernel(
    heads: int,
    length: int,
    head_ways: int,
    place_ways: int,
    *,
    window: int,
    cap: float,
    interpret: bool,
) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        LocalMask,
        MultiHeadMask,
        make_splash_mha,
    )

    shape = (length, length)
    # A window of w tokens holds the query itself and w - 1 before it.
    causal: Any = CausalMask(shape, shard_count=place_ways)
    if window:
        causal = LocalMask(shape, (window - 1, 0), 0, shard_count=place_ways)
    side = math.gcd(BLOCK, length // place_ways)
    sizes = BlockSizes(
        block_q=side,
        block_kv=side,
        block_q_dkv=side,
        block_kv_dkv=side,
        block_q_dq=side,
        block_kv_dq=side,
    )
    return make_splash_mha(
        MultiHeadMask([causal] * heads),
        block_sizes=sizes,
        head_shards=head_ways,
        q_seq_shards=place_ways,
        attn_logits_soft_cap=cap or None,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def _ways(mesh: Any, axes: Any) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)
