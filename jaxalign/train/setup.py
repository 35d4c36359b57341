"""A configuration becomes a run: everything the loop needs, built and checked before any step.

What can be refused is refused here, cheapest first (settings, then data, then weights), so that a
mistake costs seconds and not an hour.

    run = prepare(load('configs/demo.yaml').config)
    run.total, run.phases, run.step                  # what `loop.train` walks over
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxalign.adapters import Adapter
from jaxalign.base import Base, open_base
from jaxalign.checksums import text_digest
from jaxalign.data.loader import Stream
from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec
from jaxalign.multihost import agree, is_main
from jaxalign.objectives import Loss
from jaxalign.objectives.subspace import Subspace
from jaxalign.settings import Config, flatten
from jaxalign.sharding import row_ways
from jaxalign.train.aim import Aim, aim_of, measured_by
from jaxalign.train.design import Design, adapter_of, check_fit, design, heads_of, placed
from jaxalign.train.phases import PHASES, active_phases, facts_of
from jaxalign.train.phases.facts import Facts
from jaxalign.train.phases.measured import check_base, check_languages
from jaxalign.train.rules import RULES
from jaxalign.train.same import began_from, code_of, inputs_of
from jaxalign.train.state import HEADS, Frozen, TrainState


@dataclass
class Run(Design):
    """One prepared run: the design with its arrays and its data."""

    base: Base  # under this run's configuration
    train: dict[str, Stream]
    valid: dict[str, Stream]
    total: int  # updates
    aim: Aim | None  # what chooses the best checkpoint; None where nothing is measured
    inputs: dict[str, str]  # digests of what it reads, from before it was read
    sample: str = ""  # digest of the rows by which a judge of answers judges; empty: there is none
    # Called between the parts of long work (validation, answers); raises where the run should stop.
    look_up: Callable[[], None] = lambda: None

    def alone(self, name: str) -> bool:
        """Whether each micro-batch of a phase is padded and run by itself: an update has several,
        their lengths may differ, and the rule takes them one by one."""
        several = self.micro_batches(name) > 1 and len(self.train[name].lengths) > 1
        return several and RULES[self.phases[name].rule].one is not None

    def batches(self, name: str, numbers: Sequence[int], places: np.ndarray) -> Any:
        """These micro-batches of a phase, as `TrainStep.phase` takes them: this process's rows."""
        stream = self.train[name]
        if self.alone(name):
            return [stream.stack([number], places) for number in numbers]
        return stream.stack(numbers, places)

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored onto."""
        return placed(self.state, self.shardings)


def prepare(
    config: Config,
    scores: Collection[str] | None = (),
    base: Base | None = None,
    sample: str = "",
) -> Run:
    """Reads data and model and builds the jitted step.

    Args:
      config: the run.
      scores: what a judge of answers measures besides; None: not known beforehand.
      base: the base of this configuration, where it is opened already.
      sample: digest of the rows by which a judge of answers judges.

    Raises:
      UserError: anything in the configuration, the data or the checkpoint that cannot work.
    """
    active = active_phases(config)
    for name in active:
        if not PHASES[name].part(config).train:
            raise UserError(
                f"{name}.train is empty; name its files, or set {name}.weight=0 to train without it"
            )
    base = base.under(config) if base else open_base(config)
    inputs = inputs_of(config, base) if is_main() else {}
    mesh, spec = base.mesh, base.spec
    check_fit(config, spec, mesh)
    adapter, start = _adapter(config, base)
    base.opened.check_vocabulary()
    phases, tokenizer = {name: facts_of(config, name) for name in active}, base.tokenizer
    ways = row_ways(mesh)
    train = {name: facts.stream(config, tokenizer, ways=ways) for name, facts in phases.items()}
    valid = {
        name: facts.stream(config, tokenizer, "valid", ways)
        for name, facts in phases.items()
        if facts.part(config).valid
    }
    for name, facts in phases.items():
        _check_positions(facts, [s[name] for s in (train, valid) if name in s], spec, adapter)
    total = config.train.steps or steps_of_epochs(config, train)
    made = design(config, spec, adapter, mesh, total)
    if jax.process_count() > 1:
        agree(_digests(config, train, valid, made.measured))
    for phase, one in made.measured.values():
        check_base(one, base.fingerprint)
        for where, streams in (("train", train), ("valid", valid)):
            if phase in streams:
                check_languages(one, streams[phase].spoken, f"{phase}.{where}")

    with jax.set_mesh(mesh):
        names = measured_by(config, valid, partial(_losses, made))
    aim = aim_of(config, names, scores)
    if adapter is None:
        trained, frozen = base.opened.take(made.held), None
    else:
        frozen = base.opened.weights(made.held)
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        trained = start or jax.jit(partial(adapter.init, spec))(key, frozen)
    if made.heads:
        seed = jax.random.fold_in(jax.random.key(config.seed), 3)
        trained = trained | {HEADS: jax.jit(partial(heads_of, made.phases, spec))(seed)}
    trained = jax.device_put(trained, made.shardings.trained)
    first = None
    if kept := made.frozen.start:  # arrays of its own: the state's are given away at each update
        shardings = jax.tree.map(lambda leaf: leaf.sharding, kept)
        first = jax.device_put(jax.tree.map(np.array, start), shardings)
    create = partial(TrainState.create, optimiser=made.optimiser)
    state = jax.jit(create, out_shardings=made.shardings)(trained)
    return Run(
        **vars(made) | {"frozen": Frozen(frozen, made.frozen.standards, first), "state": state},
        base=base,
        train=train,
        valid=valid,
        total=total,
        aim=aim,
        inputs=inputs,
        sample=sample,
    )


def _check_positions(
    facts: Facts, streams: Sequence[Stream], spec: ModelSpec, adapter: Adapter | None
) -> None:
    """Whether the rows of a phase, behind the adapter's virtual tokens, are within the model.

    Raises:
      UserError: one is longer than the model has positions.
    """
    longest = max(stream.longest for stream in streams)
    room = spec.max_position - (adapter.taken if adapter else 0)
    if longest > room:
        raise UserError(
            f"{facts.length_key}: the longest row of {facts.name} has {longest} tokens, and the "
            f"model has positions for {room}; set {facts.length_key}={room}"
        )


def _losses(made: Design, phase: str, batch: Any) -> dict[str, Loss]:
    step = made.evaluate[phase]
    return jax.eval_shape(step, made.state.trained, made.frozen, batch)[0]


# Of a process, not of the run: where things are found and logged, and what follows training.
OWN = ("output", "model.path", "log.", "evaluate.", "generate.", "adapter.start")
FILES = ("task.train", "task.valid", "align.train", "align.valid")  # whose rows are compared


def _digests(
    config: Config,
    train: dict[str, Stream],
    valid: dict[str, Stream],
    measured: dict[str, tuple[str, Subspace]],
) -> dict[str, str]:
    """What must be the same in every process, for `agree`."""
    settings = flatten(dataclasses.asdict(config))
    shared = [one for one in settings if not one[0].startswith((*OWN, *FILES))]
    rows = {f"the rows of {name}.train": stream.digest() for name, stream in train.items()}
    rows |= {f"the rows of {name}.valid": stream.digest() for name, stream in valid.items()}
    rows |= {f"the file of the option {name}": one.digest for name, (_, one) in measured.items()}
    rows |= {f"the code of {key}": digest for key, digest in code_of(config).items()}
    if config.adapter.start:
        rows["the weights of adapter.start"] = began_from(config)
    return {"the settings": text_digest(repr(shared))} | rows


def _adapter(config: Config, base: Base) -> tuple[Adapter | None, Any]:
    """What is trained next to the base, and the weights to start from, if any."""
    wanted = adapter_of(config, base.spec)
    if wanted is None or not config.adapter.start:
        return wanted, None
    trained, found = base.opened.adapter(config.adapter.start)
    return wanted.following(found, config.adapter.start), trained


def steps_of_epochs(config: Config, train: dict[str, Stream]) -> int:
    """Updates of `train.epochs` passes over the leading stream (the task's, where it is on)."""
    leading = next(iter(train))
    every, accumulate = config.align.every, config.batch.accumulate
    per_update = accumulate if every == "joint" else accumulate / len(train)
    return max(1, math.ceil(config.train.epochs * train[leading].epoch_batches / per_update))
