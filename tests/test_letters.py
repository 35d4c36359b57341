"""One table of tensors: everything that spells axes is read off its rows."""

import jax

from jaxalign.adapters import Lora
from jaxalign.adapters.peft import adapter_rows
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec.tensors import BASE, TARGETS, base_rows, parameter_count, sizes
from jaxalign.sharding import LETTERS, letters_of, path_name
from tests.hf.conftest import LLAMA


def test_a_path_has_one_layout():
    """Families may call a tensor differently; ours is the same."""
    for row in BASE:
        path = "/".join(row.path)
        assert letters_of(path) == row.letters, path
        assert letters_of(f"trained/{path}/.values") == row.letters, path
    assert len(LETTERS) == len({row.path for row in BASE})


def test_the_rows_are_the_models_leaves():
    params = jax.eval_shape(Decoder(LLAMA).init, jax.random.key(0))
    found = {
        path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert found == {"/".join(row.path): row.shape(sizes(LLAMA)) for row in base_rows(LLAMA)}
    assert parameter_count(LLAMA) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_sites_are_read_off_the_kernels():
    q, o = TARGETS["q"], TARGETS["o"]
    assert (q.half, q.letters, q.inputs, q.outputs) == ("attention", "L D N H", ("D",), ("N", "H"))
    assert (o.half, o.letters, o.inputs, o.outputs) == ("attention", "L N H D", ("N", "H"), ("D",))
    for target, row in TARGETS.items():
        assert row.path == ("blocks", row.half, target, "kernel")
        assert row.letters.split() == ["L", *row.inputs, *row.outputs]


def test_an_adapter_has_the_shapes_of_its_rows():
    lora = jax.eval_shape(lambda key: Lora(r=5).init(LLAMA, key), jax.random.key(0))
    for target, row in TARGETS.items():
        own = lora["blocks"][row.half][target]
        for name, peft in zip("ab", adapter_rows(target), strict=True):
            assert peft.path == (*row.path[:-1], name)
            assert own[name].shape == peft.shape(sizes(LLAMA, rank=5))
            assert letters_of("/".join(peft.path)) is None  # adapters are not split
