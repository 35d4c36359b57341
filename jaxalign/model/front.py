"""What stands in front of the texts of a sequence and runs in the same pass.

Texts may share their start, a `Stem`, whose tokens are computed once. An adapter may put vectors in
front of all, where no token is: texts begin behind them, and what comes out is cut off again.

    entered = Entered(x, positions, segments, stem, weights).behind(vectors)
    entered.x                                        # [B, P + T, D]
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.model.attention import causal
from jaxalign.model.layers import Front
from jaxalign.sharding import Array, constrain

VECTORS = np.int32(-(2**31))  # the bit of an adapter's vectors; a stem's nodes have the others


@flax.struct.dataclass
class Stem:
    """The first P tokens of each sequence: the shared starts of its texts, each computed once.

    A start may go on in branches: it is a tree of up to 31 nodes, and each node has a bit.
    """

    nodes: Array  # [B or 1, P] int32: the bit of each token's node
    sees: Array  # [B, T] int32: the bits of all nodes that a token sees; P + texts

    def front(self, positions: jax.Array) -> Front:
        """Who sees whom; positions [B, T]."""
        count = self.nodes.shape[1]
        seen = (self.sees[:, :, None] & self.nodes[:, None]) != 0  # [B, T, P]
        seen &= causal(seen.shape[1])[:, :, :count]
        return Front(seen, (positions, positions[:, :count]))


@dataclasses.dataclass(frozen=True)
class Entered:
    """Sequences as they enter the first block."""

    x: jax.Array  # [B, T, D]
    positions: Array  # [B or 1, T] int
    segments: Array | None  # [B, T] int
    stem: Stem | None
    weights: jax.Array | None  # [P, B, T] or [P, B, R, T]: of pooling

    def behind(self, vectors: jax.Array) -> Entered:
        """The same behind vectors [B or 1, P, D], which all their texts see."""
        rows, count = self.x.shape[0], vectors.shape[1]
        # First one for each row and then rounded: gradients of all rows are summed in float32.
        wide = jnp.broadcast_to(vectors, (rows, *vectors.shape[1:])).astype(self.x.dtype)
        x = constrain(jnp.concatenate([wide, self.x], axis=1), "B T D")
        before = jnp.broadcast_to(jnp.arange(count), (self.positions.shape[0], count))
        positions = jnp.concatenate([before, count + jnp.asarray(self.positions)], axis=1)
        later = lambda a: jnp.pad(a, (*[(0, 0)] * (a.ndim - 1), (count, 0)))  # noqa: E731
        weights = None if self.weights is None else later(self.weights)
        if self.segments is None:
            return Entered(x, positions, None, None, weights)
        # Several texts share a sequence: the vectors are the first of what they have in common.
        nodes = jnp.full((rows, count), VECTORS)
        sees = jnp.full(x.shape[:2], VECTORS)
        if self.stem is not None:
            own = jnp.broadcast_to(self.stem.nodes, (rows, self.stem.nodes.shape[1]))
            nodes = jnp.concatenate([nodes, own], axis=1)
            sees |= later(jnp.asarray(self.stem.sees))
        return Entered(x, positions, later(jnp.asarray(self.segments)), Stem(nodes, sees), weights)
