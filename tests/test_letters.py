"""One alphabet: every table that spells axes agrees with the name table."""

import pytest

from jaxalign.adapters.lora import SITES
from jaxalign.hf.names import BASE, TARGETS, adapter_rows
from jaxalign.sharding import LETTERS, letters_of


def ours(row) -> str:
    """The axis letters of our leaf, its L included."""
    return "L " * row.stacked + row.axes.split(" -> ")[1]


@pytest.mark.parametrize("row", BASE, ids=lambda row: "/".join(row.path))
def test_sharding_knows_every_weight(row):
    assert letters_of("/".join(row.path)) == ours(row)


def test_sharding_knows_no_weight_besides():
    paths = {"/".join(row.path).removeprefix("blocks/") for row in BASE}
    assert set(LETTERS) == paths


@pytest.mark.parametrize("target", TARGETS)
def test_adapter_sites(target):
    part, inputs, outputs = SITES[target]
    kernel = TARGETS[target]
    assert kernel.path == ("blocks", part, target, "kernel")
    assert ours(kernel) == f"L {inputs} {outputs}"
    assert [ours(row) for row in adapter_rows(target)] == [f"L {inputs} R", f"L R {outputs}"]
    assert [row.path for row in adapter_rows(target)] == [
        ("blocks", part, target, "a"),
        ("blocks", part, target, "b"),
    ]


def test_every_site_is_a_target():
    assert tuple(SITES) == tuple(TARGETS)  # the order, too: it is that of saved adapters


def test_adapters_are_not_split():
    for target in TARGETS:
        for row in adapter_rows(target):
            assert letters_of("/".join(row.path)) is None
