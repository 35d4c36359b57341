"""How a pool of prompts is used: whether languages get prompts of their own or the same mixture.

entropies(pool, trained, means)              # [G]: of the shares of prompts, mean over sentences

The entropy is at most ln M, where every prompt counts alike. The query of a sentence is the mean of
its embeddings, which is its state at layer 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.adapters.pool import Pool
from jaxalign.generate import System


def entropies(pool: Pool, trained: Any, means: np.ndarray) -> np.ndarray:
    """Of the shares of each sentence, [G] in nats; means [G, N, D] of embeddings."""
    found = []
    for rows in means:
        shares = np.asarray(jax.device_get(pool.retrieved(trained, rows.astype(np.float32))))
        logs = np.log(np.maximum(shares, np.finfo(np.float32).tiny))
        found.append(-(shares * logs).sum(axis=-1).mean())
    return np.array(found)


def pool_note(
    name: str, system: System, languages: Sequence[str], means: np.ndarray
) -> tuple[str, ...]:
    """A note on a system whose adapter is a pool, none on others; means as of `entropies`."""
    pool = system.decoder.adapter
    if not isinstance(pool, Pool):
        return ()
    found = zip(languages, entropies(pool, system.lora, means), strict=True)
    each = ", ".join(f"{language} {value:.2f}" for language, value in found)
    most = np.log(pool.pool_size)
    return (f"{name}: entropy of the shares of its prompts (at most {most:.2f}): {each}.",)
