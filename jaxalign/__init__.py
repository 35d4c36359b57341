"""jaxalign: fine-tuned LLMs for the languages their task data does not cover.

result = jaxalign.train(load("configs/demo.yaml", ["align.layer=auto"]).config)
vectors = jaxalign.states("meta-llama/Meta-Llama-3-8B", ["Guten Morgen"], layers=[16])[16]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

# Loaded first, or its first import later would give the name `train` to the package.
from jaxalign import train as _train  # noqa: F401

if TYPE_CHECKING:
    import numpy as np

    from jaxalign.base import Base
    from jaxalign.settings import Config
    from jaxalign.train.finish import Result

__version__ = "0.1.0"


def train(config: Config, *, base: Base | None = None, title: str = "training") -> Result:
    """Trains as `jaxalign train` does; an earlier run in the same output is continued.

    Args:
      config: the run, from `jaxalign.config.load`. `align.layer: auto` is measured on the base
        first, whose weights are then the ones that are trained on.
      base: the base of this configuration, where it is opened already (`jaxalign.base.open_base`);
        it stays usable afterwards.
      title: of the progress bar.

    Returns:
      What came out: `result.adapter` is a PEFT folder.

    Raises:
      UserError: anything in the configuration, the data or the base that cannot work.
    """
    from jaxalign import multihost

    multihost.settle_platform()
    import dataclasses

    from jaxalign.base import open_base
    from jaxalign.evaluate.during import sample_judge
    from jaxalign.paths import Desk
    from jaxalign.settings import AUTO
    from jaxalign.terminal import say
    from jaxalign.train import loop

    judge = sample_judge(config)
    if config.align.layer == AUTO:
        # Under full fine-tuning the probe rounds the weights that the training changes.
        held = "float32" if config.trainable == "full" else ""
        base = base.under(config) if base else open_base(config, held)
        with Desk(config.output) as desk:  # what cannot be written costs no probe
            from jaxalign.probe.auto import settle

            layer, sentence = settle(base, desk.output)
        say(sentence)
        config = dataclasses.replace(config, align=dataclasses.replace(config.align, layer=layer))
    return loop.train(config, title, judge, base)


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
    """Pooled hidden states of texts; of a long one those of its first 512 tokens.

    One line counts the texts that were cut.

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
    from jaxalign.base import open_base
    from jaxalign.config import load
    from jaxalign.probe.states import cut_note, pooled_states
    from jaxalign.terminal import say

    base = open_base(load(None, [f"model.path={model}", f"model.dtype={dtype}"]).config)
    for note in cut_note(base, texts, "texts"):
        say(note)
    system = base.wear(adapter) if adapter else base.bare()
    found = pooled_states(base, system, texts, (pooling,), layers, batch_size)[pooling]
    return dict(zip(layers, found, strict=True))
