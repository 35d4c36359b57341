"""Machines that are not there: TPU slices as the compiler knows them.

place = parse('v5e:4x4', slices=2)               # 2 slices of 16 chips
mesh = make_mesh(2, 16, devices=devices(place))
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from jaxalign.chips import CHIPS, Chip
from jaxalign.errors import UserError, missing_extra

FORMS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of a generation's slices
# The TPU compiler looks for the machine around it, and says so on stderr where there is none.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    # It runs nothing, so that many processes may load it at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Place:
    """Slices of a TPU, or so many GPUs."""

    chip: Chip
    shape: tuple[int, ...]  # of one slice
    slices: int = 1

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """`v5e:4x4`, or `2 x v5e:4x4`."""
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return one if self.slices == 1 else f"{self.slices} x {one}"

    @property
    def tpu(self) -> bool:
        """Whether the TPU compiler knows it."""
        return self.chip.name in FORMS


def parse(text: str, slices: int = 1) -> Place:
    """The machines that a word such as `v5e:4x4` or `h100:8` names.

    Raises:
      UserError: another word.
    """
    name, _, form = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--topology: {text!r} names no chip known here; choose among {', '.join(CHIPS)}, as "
            "in v5e:4x4 or h100:8"
        )
    wanted = FORMS.get(name, 1)
    if not re.fullmatch(r"\d+(x\d+)*", form) or form.count("x") + 1 != wanted:
        example = {1: "8", 2: "4x4", 3: "2x2x2"}[wanted]
        raise UserError(
            f"--topology: {text!r} needs {wanted} number{'s' if wanted > 1 else ''} of chips, as "
            f"in {name}:{example}"
        )
    shape = tuple(int(n) for n in form.split("x"))
    if not all(shape):
        raise UserError(f"--topology: {text!r} should have numbers above 0")
    if slices < 1:
        raise UserError(f"--slices: {slices} should be 1 or more")
    return Place(CHIPS[name], shape, slices)


def devices(place: Place) -> Any:
    """The devices of a TPU topology, for a mesh that programs are compiled for.

    Raises:
      UserError: the TPU compiler is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise missing_extra("libtpu", "tpu")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    form = "x".join(map(str, place.shape))
    more: dict[str, Any] = {"num_slices": place.slices} if place.slices > 1 else {}
    if place.chip.name == "v4":
        more["chip_config_name"] = "megacore"  # a chip's two cores as one device
    if place.chips < 4 * place.slices:  # a part of one host; more come in hosts of 2 x 2
        more["chips_per_host_bounds"] = [*place.shape, 1, 1][:3]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{place.chip.name}:{form}", **more
        )
    except Exception as error:  # the compiler's own kinds of error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--topology: the TPU compiler does not know {place.name} ({reason}); shapes that "
            "exist: docs/tpu.md"
        ) from error
    return found.devices
