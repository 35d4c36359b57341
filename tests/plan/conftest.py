"""Runs to plan, at the shapes that docs/tpu.md tells of."""

from jaxalign.config import load
from tests.tiny import base, configure, rows  # noqa: F401  (fixtures)

LLAMA = "meta-llama/Meta-Llama-3-8B"


def config(*words, model=LLAMA):
    """32 x 512 task rows and 128 pairs of 128 tokens an update, no dropout."""
    return load(
        None,
        [
            f"model.path={model}",
            "model.remat=names",
            "lora.dropout=0.0",
            "batch.size=32",
            "batch.max_length=512",
            "batch.pairs=128",
            "batch.pair_max_length=128",
            "batch.accumulate=1",
            "align.every=joint",
            *words,
        ],
    ).config
