"""jaxalign: fine-tuned LLMs for the languages their task data does not cover.

vectors = jaxalign.states("meta-llama/Meta-Llama-3-8B", ["Guten Morgen"], layers=[16])[16]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__version__ = "0.1.0"


def states(
    model: str,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    adapter: str = "",
    pooling: str = "mean",
    dtype: str = "float32",
    batch_size: int = 32,
) -> dict[int, np.ndarray]:
    """Pooled hidden states of texts.

    Args:
      model: a folder in Hugging Face layout or a hub name.
      texts: any number.
      layers: outputs of these blocks, counted from 1; 0: the embeddings. Blocks above the highest
        are not run.
      adapter: a PEFT folder or hub name; empty: the bare model.
      pooling: mean, last, position (later tokens weigh more), first.
      dtype: of the weights, float32 or bfloat16.
      batch_size: texts of one pass.

    Returns:
      Layer -> [texts, D] float32.

    Raises:
      UserError: no such model, adapter, layer or pooling.
    """
    from jaxalign import multihost

    multihost.settle_platform()
    from jaxalign.base import load_base
    from jaxalign.config import load
    from jaxalign.probe.states import pooled_states

    base = load_base(load(None, [f"model.path={model}", f"model.dtype={dtype}"]).config)
    system = base.wear(adapter) if adapter else base.bare()
    found = pooled_states(base, system, texts, (pooling,), layers, batch_size)[pooling]
    return dict(zip(layers, found, strict=True))
