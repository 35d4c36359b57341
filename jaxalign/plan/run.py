"""What a run takes on machines that are not there: every phase compiled, memory and time added up.

found = plan_run(load('configs/llama3_8b_slots_align.yaml').config, parse('v5e:4x4'))
found.fits, found.update_seconds
found.programs[0].peak                           # bytes of one chip
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxalign.chips import of_kind
from jaxalign.errors import UserError
from jaxalign.hf.load import load_spec
from jaxalign.model.spec import ModelSpec
from jaxalign.plan.analytic import estimate_all, pace
from jaxalign.plan.programs import NO_ROWS, PROGRAMS, Program, compile_all, look, micro_batches
from jaxalign.plan.rows import Known, read
from jaxalign.plan.topology import Place, devices
from jaxalign.settings import AUTO, BatchConfig, Config, MeshConfig
from jaxalign.sharding import (
    make_mesh,
    mesh_of_shapes,
    mesh_sizes,
    row_ways,
    shard_tree,
    split_slices,
)
from jaxalign.train.design import Design, adapter_of, check_fit, design, placed
from jaxalign.train.phases import facts_of

MODELS = Path(__file__).parent / "models.yaml"
PADDED = (
    "Planned with padded rows of the longest length: without rows their common prefix and lengths "
    "are unknown; --data reads them."
)
MEASURED = (
    "Programs are of the length nearest to the mean of the run's rows, their peak is of the "
    "longest; an update's time is scaled by tokens to the mean."
)
UPDATES = 1000  # for a price, where the run's length is not known


@dataclass(frozen=True)
class Plan:
    """What one configuration takes on one place."""

    place: Place
    config: Config
    mesh: dict[str, int]
    programs: tuple[Program, ...]
    counts: dict[str, float]  # phase -> micro-batches of one update, in the mean
    notes: tuple[str, ...] = ()
    pace: float = 0.0  # of plans by formula: what orders them by time

    @property
    def fits(self) -> bool:
        """Whether every program fits into a chip's memory."""
        return all(program.fits for program in self.programs)

    @property
    def peak(self) -> float:
        """Bytes that the largest program takes on one chip."""
        return max((program.peak for program in self.programs), default=0.0)

    @property
    def gradients(self) -> list[tuple[Program, float]]:
        """The phases' programs and how often each runs in an update."""
        return [(p, self.counts[p.name]) for p in self.programs if p.name in self.counts]

    def rows(self, phase: str) -> int:
        """Task rows or pairs of one micro-batch."""
        return facts_of(self.config, phase).rows(self.config)

    @property
    def update(self) -> list[tuple[Program, float]]:
        """The programs of one update and how often each runs in it; nothing where one is missing.

        Which together are one joint step: task, alignment, optimiser.
        """
        last = [(program, 1.0) for program in self.programs if program.name == "update"]
        whole = last and len(self.gradients) == len(self.counts)
        return self.gradients + last if whole else []

    @property
    def update_seconds(self) -> float | None:
        """One update by the compiler's estimate; None where it is not known."""
        if not self.update or any(program.seconds is None for program, _ in self.update):
            return None
        return self._sum(lambda program: program.seconds or 0.0)

    @property
    def update_roofline(self) -> float:
        """The same at the roofline."""
        return self._sum(lambda program: program.roofline)

    @property
    def update_tokens(self) -> float:
        """Tokens of one update, padding and both sides of pairs counted, on all chips."""
        return self._sum(lambda program: program.tokens)

    def _sum(self, of: Callable[[Program], float]) -> float:
        """Of an update of mean batches, where their lengths are known."""
        return sum(of(program) * program.mean * times for program, times in self.update)

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation by the estimate: least FLOPs over what the chips could do."""
        seconds = self.update_seconds
        least = self._sum(lambda program: program.least)
        return least / self.place.chip.flops / seconds if seconds else None

    @property
    def updates(self) -> int:
        """Of the run, or as many as a price is given for."""
        return self.config.train.steps or UPDATES

    @property
    def chip_hours(self) -> float | None:
        """Of all `updates`, without evaluations and checkpoints."""
        seconds = self.update_seconds
        return None if seconds is None else seconds * self.updates * self.place.chips / 3600


def plan_run(
    config: Config,
    place: Place,
    only: tuple[str, ...] = PROGRAMS,
    report: Callable[[Program], None] = lambda program: None,
    how: str = "compile",
    data: bool = False,
) -> Plan:
    """The plan of this configuration on this place.

    Args:
      only: programs to compile.
      report: called with every program as it is ready.
      how: `compile`, where that can be done, or `formula` (see `jaxalign.plan.analytic`).
      data: whether the run's rows and tokenizer are read, and batches planned as they will be; else
        every row is padded to the longest length.

    Raises:
      UserError: settings that cannot work there, an unknown model, no TPU compiler; data or
        tokenizer missing.
    """
    spec = find_spec(config)
    config, notes = _settled(config, spec)
    chips = None
    if how == "compile":
        chips = devices(place) if place.tpu else here(place)
    found = _design(config, spec, place, chips)
    rows: Known = NO_ROWS
    if data:
        rows, config.train.steps = read(config, row_ways(found.mesh), found.adapter)
        notes = (*notes, MEASURED)
    elif config.batch.pack != "none":
        notes = (*notes, PADDED)
    programs: list[Program] = []
    speed = 0.0
    if chips is None:
        if how == "compile":  # a formula would not run what the user wrote
            look(found, rows)
        for program in estimate_all(found, place.chip, only, rows):
            report(program)
            programs.append(program)
        speed = pace(found, place.chip, tuple(name for name in only if name in found.active))
    else:
        with jax.set_mesh(found.mesh):
            for program in compile_all(found, place.chip, only, rows):
                report(program)
                programs.append(program)
    counts = {phase: micro_batches(found, phase)[1] for phase in found.active}
    return Plan(place, config, dict(found.mesh.shape), tuple(programs), counts, notes, speed)


def find_spec(config: Config) -> ModelSpec:
    """The model's facts: of a local folder, of `models.yaml`, or else of the hub.

    Raises:
      UserError: none of them knows it.
    """
    path = config.model.path
    if not path:
        raise UserError("model.path is empty; name a folder in Hugging Face layout or a hub model")
    known = _known()
    if path in known and not Path(path).is_dir():
        return ModelSpec.from_hf(known[path])
    try:
        return load_spec(path, config.model.revision)
    except UserError as error:
        raise UserError(
            f"{error}; without a download these are known: {', '.join(known)}"
        ) from error


def here(place: Place) -> Any:
    """The devices of this machine, where they are of that very kind and enough; else None."""
    found = [device for device in jax.devices() if of_kind(device.device_kind) is place.chip]
    return found[: place.chips] if len(found) >= place.chips else None


def _settled(config: Config, spec: ModelSpec) -> tuple[Config, tuple[str, ...]]:
    """The configuration with nothing left open, and what was decided."""
    config = copy.deepcopy(config)
    if config.align.weight > 0 and config.align.layer == AUTO:
        config.align.layer = spec.layers // 2
        return config, (
            f"align.layer=auto: a probe of the base will choose it; planned with layer "
            f"{config.align.layer}, half of the depth",
        )
    return config, ()


def _design(config: Config, spec: ModelSpec, place: Place, chips: Any) -> Design:
    asked = config.mesh
    sizes = (asked.data, asked.fsdp, asked.tensor, asked.seq)
    if chips is not None:
        real = make_mesh(*sizes, devices=chips)
        return design(config, spec, adapter_of(config, spec), real, config.train.steps or UPDATES)
    whole = mesh_sizes(*sizes, place.chips)
    split_slices(whole, place.slices)
    mesh = mesh_of_shapes(whole)
    check_fit(config, spec, mesh)
    plain = copy.deepcopy(config)
    plain.mesh, plain.model.remat = MeshConfig(1, 1, 1, 1), "none"
    plain.batch = dataclasses.replace(BatchConfig(), pack=config.batch.pack)
    shapes = _shapes(_Key(repr((plain, spec)), plain, spec))
    place_on = lambda tree: placed(tree, shard_tree(mesh, tree))  # noqa: E731
    return dataclasses.replace(
        shapes, config=config, mesh=mesh, frozen=place_on(shapes.frozen),
        state=place_on(shapes.state), shardings=shard_tree(mesh, shapes.state),
    )  # fmt: skip


@dataclass(frozen=True)
class _Key:
    """A configuration that can be looked up."""

    text: str
    config: Config = field(compare=False)
    spec: ModelSpec = field(compare=False)


# A search looks at hundreds of meshes and micro-batches over the same few arrays.
@lru_cache(maxsize=8)
def _shapes(key: _Key) -> Design:
    """The design without mesh, batch and remat."""
    mesh = mesh_of_shapes((1, 1, 1, 1))
    return design(key.config, key.spec, adapter_of(key.config, key.spec), mesh, UPDATES)


@lru_cache(maxsize=1)
def _known() -> dict[str, Any]:
    return yaml.safe_load(MODELS.read_text("utf-8"))
