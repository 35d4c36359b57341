"""A base with NaN or infinity is refused while it is read, wherever the number is."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.hf.load import abstract_params, load_params
from jaxalign.hf.save import save_base
from jaxalign.model.spec.tensors import base_rows, get_leaf
from jaxalign.sharding import make_mesh, shard_tree
from tests.hf.conftest import LLAMA, random_params

LEAVES = {"/".join(row.path): row for row in base_rows(LLAMA)}


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_kind_of_tensor(tmp_path, leaf):
    row = LEAVES[leaf]
    params = random_params(LLAMA, jnp.bfloat16)
    get_leaf(params, row.path).reshape(-1)[-1] = [np.nan, np.inf, -np.inf][len(leaf) % 3]
    save_base(tmp_path / "m", params, LLAMA)
    name = row.name(LLAMA.layers - 1 if row.stacked else 0)
    with pytest.raises(UserError, match=rf"model\.safetensors: tensor {name} holds NaN"):
        load_params(tmp_path / "m", LLAMA, jnp.float32)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_on_a_mesh_and_quantised(tmp_path, quantize):
    params = random_params(LLAMA)
    params["blocks"]["mlp"]["up"]["kernel"][1, 5, 40] = np.nan
    save_base(tmp_path / "m", params, LLAMA)
    shardings = (
        shard_tree(make_mesh(1, 4, 2), abstract_params(LLAMA, jnp.float32))
        if quantize == "none"
        else None
    )
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_params(tmp_path / "m", LLAMA, jnp.float32, shardings, quantize=quantize)
