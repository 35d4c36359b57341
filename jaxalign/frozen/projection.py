"""One frozen projection of a block, and what a pass asks of the adapter next to it.

`jaxalign.model` runs projections and knows no adapter; `jaxalign.adapters` changes projections and
knows no block. Both know this file.

    q = Projection(kernel, bias, inputs=1, letters='D N H')
    q(x)                                             # x W + b
    sites = {'q': q, 'k': k, 'v': v}
    adapter.project(x, {name: site(x) for name, site in sites.items()}, sites, own, key)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxalign.frozen.quantised import Quantised
from jaxalign.sharding import constrain


class Projection(NamedTuple):
    """The frozen weights of one projection in one block."""

    kernel: jax.Array | Quantised  # [in..., out...]
    bias: jax.Array | None  # [out...]
    inputs: int  # how many axes of the kernel are inputs
    letters: str | None = None  # the kernel's axes, by which a quantised one is gathered

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x W + b`: [..., in...] -> [..., out...]."""
        return self.shifted(self.product(x))

    def shifted(self, y: jax.Array) -> jax.Array:
        """`y + b`."""
        return y if self.bias is None else y + self.bias

    def product(self, x: jax.Array) -> jax.Array:
        """`x W`."""
        ends = tuple(range(x.ndim - self.inputs, x.ndim))
        axes = ((ends, tuple(range(self.inputs))), ((), ()))
        if not isinstance(self.kernel, Quantised):
            return jax.lax.dot_general(x, self.kernel, axes)
        letters = self.letters
        assert letters is not None  # the table of tensors has every projection

        # Kept for the backward pass as it is stored, and widened again there. What was split for
        # storage is gathered as it is stored: wide, it would be two to four times the bytes.
        @partial(jax.checkpoint, prevent_cse=False)
        def widened(x: jax.Array, kernel: Quantised) -> jax.Array:
            kernel = jax.tree.map(lambda leaf: constrain(leaf, letters), kernel)
            return jax.lax.dot_general(x, kernel.widen(x.dtype), axes)

        return widened(x, self.kernel)


class Attached(Protocol):
    """The part of `jaxalign.adapters.Adapter` that a decoder uses, and who runs it."""

    @property
    def dropout(self) -> float:
        """The share of its input that training drops; 0: a pass needs no random key for it."""
        ...

    @property
    def prefix_length(self) -> int:
        """How many keys and values `per_block` puts in front of every block's.

        They take as many positions: a text begins behind them.
        """
        return 0

    @property
    def prompt_length(self) -> int:
        """How many vectors `prompt` puts in front of the embeddings, P."""
        return 0

    @property
    def taken(self) -> int:
        """Positions in front of a text: those of both."""
        return self.prefix_length + self.prompt_length

    @property
    def by_input(self) -> bool:
        """Whether these depend on the text, so that a sequence holds one text alone."""
        return False

    def prompt(self, trained: Any, x: jax.Array, asked: jax.Array) -> jax.Array:
        """[B or 1, P, D]: vectors in front of embeddings x [B, T, D].

        Args:
          asked: [B, T] bool: the tokens that they may depend on; at least one in each text.
        """
        return jnp.zeros((1, self.prompt_length, x.shape[-1]))

    def per_block(self, params: Any, trained: Any, blocks: int | None = None) -> Any:
        """What a scan over the first `blocks` blocks (None: all) reads: leaves [blocks, ...].

        A block gets its slice as `{'attention': {'q': ..., ...}, 'mlp': {'up': ..., ...}}`. Below
        the name of a projection stands whatever `project` wants there. More keys and values for a
        block's attention are `{'attention': {'prefix': {'k': [P, K, H], 'v': [P, K, H]}}}`, which
        `model.layers.Attention` gets with the rest.
        """
        ...

    def project(
        self,
        x: jax.Array,  # [..., in...]
        outputs: Mapping[str, jax.Array],  # of each site, as the base has them: x W + b
        sites: Mapping[str, Projection],  # projections of this one input
        own: Mapping[str, Any],  # of those that have something in `per_block`: this block's
        key: jax.Array | None,  # for dropout; None: nothing is dropped
    ) -> Mapping[str, jax.Array]:
        """The outputs of the sites in `own`, adapted."""
        ...

    def settle(self, params: Any, trained: Any) -> Any:
        """The tree for passes in which it no longer changes: what can be computed once, is."""
        ...

    def merge(self, params: Any, trained: Any) -> Any:
        """The base with the update: a tree like `params`, in its dtype.

        Raises:
          UserError: the base is quantised, or this kind is not a change of weights.
        """
        ...
