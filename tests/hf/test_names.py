"""The name table: every row is a bijection, and adapters follow from it."""

import numpy as np
import pytest

from jaxalign.adapters.peft import adapter_rows
from jaxalign.adapters.peft_config import peft_module
from jaxalign.model.spec.tensors import BASE, TARGETS, sizes
from tests.hf.conftest import LLAMA

SIZE = sizes(LLAMA, rank=5)


@pytest.mark.parametrize("row", BASE, ids=lambda row: "/".join(row.path))
def test_there_and_back(row):
    tensor = np.arange(np.prod(row.hf_shape(SIZE))).reshape(row.hf_shape(SIZE))
    ours = row.to_ours(tensor, SIZE)
    assert ours.shape == row.shape(SIZE)[row.stacked :]
    assert np.shares_memory(ours, tensor)  # a view: loading copies once, into the leaf
    np.testing.assert_array_equal(row.to_hf(ours, SIZE), tensor)


def test_heads_are_rows_of_q_and_columns_of_o():
    q, o = TARGETS["q"], TARGETS["o"]
    weight = np.random.default_rng(0).standard_normal(q.hf_shape(SIZE))
    x = np.random.default_rng(1).standard_normal(LLAMA.dim)
    heads = np.einsum("D,DNH->NH", x, q.to_ours(weight, SIZE))
    np.testing.assert_allclose(heads.reshape(-1), weight @ x)
    out = np.random.default_rng(2).standard_normal(o.hf_shape(SIZE))
    np.testing.assert_allclose(
        np.einsum("NH,NHD->D", heads, o.to_ours(out, SIZE)), out @ heads.reshape(-1)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_adapter_update_is_b_times_a(target):
    kernel = TARGETS[target]
    a_row, b_row = adapter_rows(target)
    numbers = np.random.default_rng(0)
    a = numbers.standard_normal(a_row.hf_shape(SIZE))
    b = numbers.standard_normal(b_row.hf_shape(SIZE))
    ours_a, ours_b = a_row.to_ours(a, SIZE), b_row.to_ours(b, SIZE)
    product = np.tensordot(ours_a, ours_b, axes=1)  # contracts R, last of a and first of b
    np.testing.assert_allclose(product, kernel.to_ours(b @ a, SIZE), atol=1e-12)


def test_peft_names():
    a, b = adapter_rows("down")
    assert a.name(7) == "base_model.model.model.layers.7.mlp.down_proj.lora_A.weight"
    assert b.path == ("blocks", "mlp", "down", "b")
    assert [peft_module(target) for target in TARGETS] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert a.hf_shape(SIZE) == (5, LLAMA.ffn)
    assert b.shape(SIZE) == (LLAMA.layers, 5, LLAMA.dim)
