"""What XLA is asked for, by device."""

from types import SimpleNamespace

import pytest

from jaxalign.chips import of_kind
from jaxalign.compiler import FUSION_MEMORY, OPTIONS, options


def device(platform, kind):
    return SimpleNamespace(platform=platform, device_kind=kind)


@pytest.mark.parametrize("kind", FUSION_MEMORY)
def test_chips_get_their_share_beside_what_all_get(kind):
    asked = options(device("tpu", kind))
    assert asked.pop("xla_tpu_scoped_vmem_limit_kib") == str(FUSION_MEMORY[kind])
    assert asked == OPTIONS["tpu"]
    assert of_kind(kind) is not None  # a name that JAX gives to a device


def test_other_tpus_get_what_all_get_and_other_platforms_nothing():
    assert options(device("tpu", "TPU v4")) == OPTIONS["tpu"]
    assert options(device("gpu", "NVIDIA H200")) is options(device("cpu", "cpu")) is None
