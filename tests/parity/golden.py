"""Finds and reads the golden cases: values computed by the paper's own PyTorch code."""

import json
import os
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxalign.adapters.peft import adapter_rows
from jaxalign.data.batch import NO_TARGET, PairBatch, TaskBatch
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec.tensors import get_leaf, sizes

REPO = Path(__file__).resolve().parents[2]


def golden_folders() -> list[Path]:
    """JAXALIGN_GOLDEN (folders, separated like PATH), else the copy and a neighbouring folder."""
    named = os.environ.get("JAXALIGN_GOLDEN", "")
    if named:
        return [Path(folder) for folder in named.split(os.pathsep)]
    return [REPO / "tests" / "data" / "golden", REPO.parent / "shared" / "golden"]


def find(pattern: str) -> dict[str, Path]:
    """Name of the containing folder -> file, the first golden folder that has a name wins."""
    found: dict[str, Path] = {}
    for folder in golden_folders():
        for file in sorted(folder.rglob(pattern)):
            found.setdefault(file.parent.name, file)
    return found


class Case:
    """One model case: base, adapter and everything that was computed with them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts = json.loads((folder / "case.json").read_text())

    def __repr__(self) -> str:
        return self.folder.name

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / name) as file:
            return dict(file)

    @cached_property
    def spec(self):
        return load_spec(self.folder / "model")

    @cached_property
    def params(self):
        return load_params(self.folder / "model", self.spec, jnp.float32)

    @cached_property
    def peft(self):
        return load_peft(self.folder / "adapter", self.spec)

    @property
    def lora(self):
        return self.peft[0]

    @property
    def adapter(self):
        return self.peft[1]

    def decoder(self, **options) -> Decoder:
        return Decoder(self.spec, self.adapter, **options)

    def to_peft(self, tree) -> dict[str, np.ndarray]:
        """An adapter-shaped tree under the golden's tensor names."""
        size = sizes(self.spec, self.adapter.r)
        found = {}
        for target in self.adapter.targets:
            for row in adapter_rows(target):
                leaf = get_leaf(tree, row.path)
                for layer in range(self.spec.layers):
                    found[row.name(layer)] = row.to_hf(np.asarray(leaf[layer]), size)
        return found


def task_batch(arrays: dict[str, np.ndarray], prefix: str = "") -> TaskBatch:
    """The original's right-padded batch in our form."""
    tokens, labels = arrays[prefix + "input_ids"], arrays[prefix + "labels"]
    mask = arrays[prefix + "attention_mask"]
    shifted = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], NO_TARGET)], axis=1)
    place = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return TaskBatch(tokens, mask, place, place, shifted)


def pair_batch(arrays: dict[str, np.ndarray], prefix: str = "") -> PairBatch:
    """Both sides, padded to the same length."""
    sides = [
        arrays[f"{prefix}{what}_parallel_{side}"]
        for side in (0, 1)
        for what in ("input_ids", "attention_mask")
    ]
    length = max(side.shape[1] for side in sides)
    return PairBatch(*(np.pad(side, ((0, 0), (0, length - side.shape[1]))) for side in sides))


CASES = [Case(file.parent) for file in find("case.json").values()]
