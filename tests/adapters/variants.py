"""Adapters of every kind that can be described, for the tiny models of `tests.hf.conftest`."""

import numpy as np

from jaxalign.adapters.dora import Dora
from jaxalign.adapters.lora import Lora
from jaxalign.adapters.peft import tensor_rows
from jaxalign.model.spec.tensors import TARGETS, set_leaf, sizes

LAYERS = 3
EVERYWHERE = {(target, block): (4, 8.0) for target in TARGETS for block in range(1, LAYERS + 1)}
MIXED = {
    # One rank for all blocks, another in each block, an alpha of its own, and the plain case.
    **{("q", block): (2, 8.0) for block in (1, 2, 3)},
    **{("o", block): (block, 8.0) for block in (1, 2, 3)},
    **{("up", block): (6, 8.0) for block in (1, 2, 3)},
    **{("down", block): (4, 4.0 * block) for block in (1, 2, 3)},
    **{("v", block): (4, 8.0) for block in (1, 2, 3)},
}
UNEVEN = {
    ("q", 1): (4, 8.0),
    ("q", 2): (4, 8.0),
    ("gate", 2): (3, 8.0),
    **{("down", block): (4, 8.0) for block in (1, 2, 3)},
}


def some(blocks):
    return {place: own for place, own in EVERYWHERE.items() if place[1] in blocks}


VARIANTS = {
    "lora": Lora.of_table(EVERYWHERE, LAYERS, dropout=0.1),
    "rslora": Lora.of_table(EVERYWHERE, LAYERS, rank_stabilised=True),
    "layers": Lora.of_table(some((1, 3)), LAYERS),
    "same_scale": Lora.of_table(
        {place: (r, 2.0 * r) for place, (r, _) in MIXED.items()}, LAYERS
    ),  # ranks differ, alpha / rank does not
    "patterns": Lora.of_table(MIXED, LAYERS),
    "patterns_rslora": Lora.of_table(MIXED, LAYERS, rank_stabilised=True),
    "patterns_layers": Lora.of_table({p: own for p, own in MIXED.items() if p[1] != 2}, LAYERS),
    "uneven": Lora.of_table(UNEVEN, LAYERS),
    "dora": Dora.of_table(EVERYWHERE, LAYERS),
    "dora_layers": Dora.of_table(some((2,)), LAYERS),
    "dora_patterns": Dora.of_table(MIXED, LAYERS, rank_stabilised=True),
    "dora_uneven": Dora.of_table(UNEVEN, LAYERS),
}


def random_tree(adapter, spec, seed=0, size=0.2):
    """A NumPy tree of this adapter: numbers within each projection's rank, zeros elsewhere."""
    numbers = np.random.default_rng(seed)
    lora = {}
    for target in adapter.targets:
        for row in tensor_rows(target, adapter.dora):
            leaf = numbers.standard_normal(row.shape(sizes(spec, adapter.r))) * size
            for block in range(1, spec.layers + 1):
                rank, one = adapter.rank_of(target, block), leaf[block - 1]
                if row.path[-1] == "m":
                    one[...] = 1 + np.abs(one) if rank else 0
                elif row.path[-1] == "a":
                    one[..., rank:] = 0
                else:
                    one[rank:] = 0
            set_leaf(lora, row.path, leaf.astype(np.float32))
    return lora
