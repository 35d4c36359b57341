"""Words for machines."""

import pytest

from jaxalign.chips import CHIPS, of_kind
from jaxalign.errors import UserError
from jaxalign.plan import topology
from jaxalign.plan.topology import parse


@pytest.mark.parametrize(
    ("text", "slices", "shape", "chips", "name"),
    [
        ("v5e:4x4", 1, (4, 4), 16, "v5e:4x4"),
        ("v5e:4x4", 2, (4, 4), 32, "2 x v5e:4x4"),
        ("v5p:2x2x1", 1, (2, 2, 1), 4, "v5p:2x2x1"),
        ("h100:8", 1, (8,), 8, "h100:8"),
        ("a100-40:8", 4, (8,), 32, "4 x a100-40:8"),
    ],
)
def test_words_name_machines(text, slices, shape, chips, name):
    place = parse(text, slices)
    assert (place.shape, place.chips, place.name) == (shape, chips, name)
    assert place.tpu == text.startswith("v")


@pytest.mark.parametrize(
    ("text", "slices", "told"),
    [
        ("v9:4x4", 1, "choose among v4, v5e"),
        ("", 1, "names no chip"),
        ("v5e", 1, "2 numbers of chips, as in v5e:4x4"),
        ("v5e:4x4x4", 1, "2 numbers"),
        ("v5p:4x4", 1, "3 numbers of chips, as in v5p:2x2x2"),
        ("h100:2x4", 1, "1 number of chips, as in h100:8"),
        ("v5e:0x4", 1, "above 0"),
        ("v5e:axb", 1, "2 numbers"),
        ("v5e:4x4", 0, "--slices: 0 should be 1 or more"),
    ],
)
def test_other_words_are_refused(text, slices, told):
    with pytest.raises(UserError, match=told):
        parse(text, slices)


def test_a_missing_compiler_is_told_with_the_way_out(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxalign\[tpu\]'"):
        topology.devices(parse("v5e:4x4"))


def test_jax_names_of_devices_lead_to_chips():
    assert of_kind("TPU v5 lite") is CHIPS["v5e"]
    assert of_kind("NVIDIA H200") is CHIPS["h200"]
    assert of_kind("cpu") is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_a_chip_has_more_work_than_it_can_read():
    for name, chip in CHIPS.items():
        assert chip.name == name
        # A machine word: arithmetic intensity of all of them lies in the hundreds.
        assert 100 < chip.flops / chip.bandwidth < 600
        assert chip.bandwidth > chip.link > 0
        assert bool(chip.clock) == name.startswith("v")
