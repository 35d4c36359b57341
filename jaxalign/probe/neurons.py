"""NeuronXA: MEXA's rule on the states of feed-forward neurons instead of hidden states.

nasca(activations, pivot=0)                  # [G]: which neurons fire
navca(activations, pivot=0)                  # [G]: how strongly, whatever the sign
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxalign.probe.mexa import mexa
from jaxalign.probe.vectors import States, floats, shape_of


def nasca(activations: States, pivot: int = 0) -> np.ndarray:
    """Share of sentences whose set of firing neurons is mutually nearest to the pivot's, [G].

    A neuron fires where its activation is above 0; sets are compared by cosine and counted by
    MEXA's rule (Huang et al. 2025, arXiv 2507.14900, NASCA). The paper pools activations over
    tokens weighted by position; whoever thresholds token by token pools those 0s and 1s and gives
    them to `mexa` itself.

    Args:
      activations: [G, N, F] floating point, pooled activations of one layer's neurons.
      pivot: number of the pivot language.

    Raises:
      UserError: as `mexa`.
    """
    languages, _, _ = shape_of(activations)
    fires = [(floats(activations, g) > 0).astype(jnp.float32) for g in range(languages)]
    return mexa(fires, pivot)


def navca(activations: States, pivot: int = 0) -> np.ndarray:
    """Share of sentences whose absolute activations are mutually nearest to the pivot's, [G].

    As `nasca`, on |activation| (Huang et al. 2025, arXiv 2507.14900, NAVCA).

    Args:
      activations: [G, N, F] floating point, pooled activations of one layer's neurons.
      pivot: number of the pivot language.

    Raises:
      UserError: as `mexa`.
    """
    languages, _, _ = shape_of(activations)
    return mexa([jnp.abs(floats(activations, g)) for g in range(languages)], pivot)
