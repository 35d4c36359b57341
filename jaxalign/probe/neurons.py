"""NeuronXA: MEXA's rule on the feed-forward neurons instead of the hidden states.

nasca(activations, pivot=0)                  # [G]: which neurons fire
navca(activations, pivot=0)                  # [G]: how strongly, whatever the sign
found = measure_neurons(base, system, corpus, 'en', rows=100)
found['nasca']['cy'][16]                     # of block 16; 0 is NaN, embeddings have no neurons
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxalign.base import Base
from jaxalign.generate import System
from jaxalign.probe.corpus import Parallel
from jaxalign.probe.mexa import mexa
from jaxalign.probe.states import pooled_states
from jaxalign.probe.vectors import States, floats, shape_of

ROWS = 100  # sentences, as in the paper


def nasca(activations: States, pivot: int = 0) -> np.ndarray:
    """Share of sentences whose set of firing neurons is mutually nearest to the pivot's, [G].

    A neuron fires where its activation is above 0; sets are compared by cosine and counted by
    MEXA's rule (Huang et al. 2025, arXiv 2507.14900, NASCA).

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


RULES = {"nasca": nasca, "navca": navca}


def measure_neurons(
    base: Base,
    system: System,
    corpus: Parallel,
    pivot: str,
    rows: int = ROWS,
    batch_size: int = 32,
    report: Callable[[int], None] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """NASCA and NAVCA of every language with the pivot, at every block.

    A neuron's activation is that of its gate, act(x W_gate), averaged over the tokens with later
    ones weighing more (`position`, the paper's). One language and the pivot are in memory.

    Returns:
      nasca and navca -> language -> [L+1], layer 0 NaN.
    """

    def of(language: str) -> np.ndarray:  # [L, N, F]
        texts = corpus.sentences[language][:rows]
        return pooled_states(
            base, system, texts, ("position",), None, batch_size, report, what="neurons"
        )["position"]

    first = of(pivot)
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in RULES}
    for language in corpus.languages:
        if language == pivot:
            continue
        other = of(language)
        for name, rule in RULES.items():
            scores = [rule(np.stack(pair))[1] for pair in zip(first, other, strict=True)]
            found[name][language] = np.array([np.nan, *scores])
    return found
