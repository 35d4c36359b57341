"""Adapters that differ in everything they may differ in, and what their updates are."""

import jax
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.hf.peft import save_peft
from jaxalign.merge.methods import Weighted
from tests.evaluate.conftest import adapters, golds, judged  # noqa: F401  (fixtures)
from tests.hf.conftest import LLAMA, random_lora
from tests.tiny import base  # noqa: F401  (a fixture)

# (what it is, seed): ranks 4, 2, 3; scales 2, 3/sqrt(2), 4; other targets and blocks.
KINDS = {
    "plain": (Lora(4, 8.0, 0.1), 1),
    "stabilised": (Lora(2, 3.0, 0.0, ("q", "v", "down"), (1, 3), rank_stabilised=True), 2),
    "upper": (Lora(3, 12.0, 0.0, ("v", "up"), (2, 3)), 3),
    "equal": (Lora(4, 4.0, 0.0), 4),
}


def tree(adapter: Lora, seed: int, scale: float = 0.1, spec=LLAMA):
    """Random factors; zero where this adapter has none."""
    lora = random_lora(spec, adapter.r, adapter.targets, adapter.layers, seed)
    return jax.tree.map(lambda leaf: (scale * leaf).astype(np.float32), lora)


def part(kind: str, weight: float = 1.0) -> Weighted:
    """One of KINDS with a weight."""
    adapter, seed = KINDS[kind]
    return Weighted(tree(adapter, seed), adapter, weight, kind)


def update(lora, adapter: Lora, target: str, block: int) -> np.ndarray:
    """[in, out] float64, the slow way; zeros where the adapter has none."""
    site = "attention" if target in "qkvo" else "mlp"
    a = np.asarray(lora["blocks"][site][target]["a"][block - 1], np.float64)
    b = np.asarray(lora["blocks"][site][target]["b"][block - 1], np.float64)
    product = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
    return adapter.scale_of(target, block) * product


def updates(lora, adapter: Lora, spec=LLAMA) -> dict:
    """(target, block) -> update, where the adapter has one."""
    return {
        (target, block): update(lora, adapter, target, block)
        for target in adapter.targets
        for block in range(1, spec.layers + 1)
        if adapter.rank_of(target, block)
    }


def weighted_sum(parts) -> dict:
    """(target, block) -> Σ w s A B over all modules of the base; zeros where nobody has one."""
    shapes = updates(*(lambda p: (p.lora, p.adapter))(part("plain")))
    found = {cell: np.zeros_like(whole) for cell, whole in shapes.items()}
    for one in parts:
        for cell, whole in updates(one.lora, one.adapter).items():
            found[cell] += one.weight * whole
    return found


def assert_same_updates(merged, expected, rtol=1e-6):
    """Every module's update, against the largest number in it."""
    found = updates(merged.lora, merged.adapter)
    for cell, whole in expected.items():
        ours = found.get(cell, np.zeros_like(whole))
        worst = np.abs(ours - whole).max()
        assert worst <= rtol * max(np.abs(whole).max(), 1e-6), (cell, worst)
    assert set(found) <= set(expected)


@pytest.fixture
def folders(tmp_path):
    """kind -> a PEFT folder of it, beside the base they name."""
    from jaxalign.hf.save import save_base
    from tests.hf.conftest import random_params

    small = jax.tree.map(lambda leaf: 0.05 * leaf, random_params(LLAMA))
    save_base(tmp_path / "model", small, LLAMA)
    found = {}
    for kind, (adapter, seed) in KINDS.items():
        found[kind] = tmp_path / kind
        save_peft(
            found[kind], tree(adapter, seed), LLAMA, adapter, base_name=str(tmp_path / "model")
        )
    return found
