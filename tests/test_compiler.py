"""What XLA is asked for, by device."""

from types import SimpleNamespace

import pytest

from jaxalign import compiler
from jaxalign.chips import CHIPS, of_kind
from jaxalign.compiler import OPTIONS, options


def device(platform, kind):
    return SimpleNamespace(platform=platform, device_kind=kind)


@pytest.mark.parametrize("kind", compiler.CHIPS)
def test_chips_get_their_own_beside_what_all_get(kind):
    assert options(device("tpu", kind)) == OPTIONS["tpu"] | compiler.CHIPS[kind]
    assert of_kind(kind) is not None  # a name that JAX gives to a device


def test_other_tpus_get_what_all_get_and_other_platforms_nothing():
    assert options(device("tpu", "TPU v4")) == OPTIONS["tpu"]
    assert options(device("gpu", "NVIDIA H200")) is options(device("cpu", "cpu")) is None


def test_no_chip_gets_what_may_give_wrong_results():
    """Continuation fusion: refused by newer TPU compilers on all chips but v5e, where it is on."""
    kinds = [kind for chip in CHIPS.values() if chip.platform == "tpu" for kind in chip.kinds]
    asked = {name for kind in kinds for name in options(device("tpu", kind))}
    assert asked and not [name for name in asked if "async_collective_fusion" in name]
