"""The programs of a run, compiled for machines that are not there, and what each of them takes.

They are the run's own (`train.design`, `generate.loop`), on shapes instead of arrays.

    for program in compile_all(design(config, spec, adapter, mesh, 1000), CHIPS['v5e']):
        program.peak, program.seconds                # bytes and seconds of one micro-batch
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.chips import Chip
from jaxalign.model import splash
from jaxalign.plan import attends, writing
from jaxalign.plan.cost import Cost, measure
from jaxalign.plan.hlo import dims
from jaxalign.plan.job import Job
from jaxalign.plan.rows import Known, Rows
from jaxalign.sharding import batch_sharding, replicated
from jaxalign.train.design import Design
from jaxalign.train.phases import PHASES, facts_of
from jaxalign.train.rules import RULES

NO_ROWS: Known = {}
ALWAYS = ("update", "prompt", "token")  # of every run
EVAL = "_eval"  # ends the name of a phase's evaluation
PROGRAMS = (*PHASES, "update", *(name + EVAL for name in PHASES), "prompt", "token")


@dataclass(frozen=True)
class Program:
    """One program; everything is of one chip, and of one micro-batch or call."""

    name: str
    what: str  # rows x tokens
    chip: Chip
    tokens: int = 0  # in all rows, on all chips
    mean: float = 1.0  # work of a micro-batch in the mean, over that of this one
    counted: float | None = None  # the share of tokens that count, where rows are known
    arguments: float = 0.0  # bytes
    temporaries: float = 0.0
    beside: float = 0.0  # what is in memory at the same time and is not an argument
    peak: float = 0.0  # of everything
    least: float = 0.0  # FLOPs that cannot be saved
    cost: Cost = field(default_factory=Cost)
    took: float = 0.0  # seconds to compile
    error: str = ""  # why it cannot run; then nothing else is known but `peak`, perhaps
    source: str = "compiler"  # or `formula`

    @property
    def ratio(self) -> float | None:
        """FLOPs over the least; None where some are not known."""
        if any(name.startswith("kernel") for name in self.cost.unknown):
            return None
        return self.cost.flops / self.least if self.least and self.cost.flops else None

    @property
    def seconds(self) -> float | None:
        """The compiler's cycles, kernels at the chip's peak; None where it says too little."""
        if self.error or self.cost.unknown or not self.chip.clock or not self.cost.cycles:
            return None
        return self.cost.cycles / self.chip.clock + self.cost.kernel_flops / self.chip.flops

    @property
    def roofline(self) -> float:
        """Seconds that no program can beat: least FLOPs at the peak, arguments read once."""
        return max(self.least / self.chip.flops, self.arguments / self.chip.bandwidth)

    @property
    def exposed(self) -> float:
        """Seconds of traffic during which nothing is computed, at the links' full speed."""
        open_ = sum(traffic.bytes - traffic.hidden for traffic in self.cost.collectives.values())
        return open_ / self.chip.link if self.chip.link else 0.0

    @property
    def fits(self) -> bool:
        """Whether one chip's memory is enough."""
        return not self.error and self.peak <= self.chip.memory


def compile_all(
    plan: Design,
    chip: Chip,
    only: tuple[str, ...] = PROGRAMS,
    rows: Known = NO_ROWS,
) -> Iterator[Program]:
    """Every program of the run that is named in `only` and that the run has, as it is compiled.

    Args:
      rows: of each phase and of answers, where they are known; else padded ones of the longest
        length are planned.
    """
    for name in chosen(plan, only):
        yield of_rows(partial(_compile, plan, chip, name), name, rows)


def of_rows(make: Callable[[Known], Program], name: str, rows: Known) -> Program:
    """The program of usual batches, which takes the memory of the longest."""
    found, phase = make(rows), name.removesuffix(EVAL)
    if phase not in rows or rows[phase] == rows[phase].longest:
        return found
    longest = make({phase: rows[phase].longest})
    if longest.error:
        return longest
    return replace(found, peak=max(found.peak, longest.peak), took=found.took + longest.took)


def chosen(plan: Design, only: tuple[str, ...]) -> list[str]:
    """The programs in `only` that the run has."""
    return [name for name in only if name.removesuffix(EVAL) in (*plan.active, *ALWAYS)]


def job(plan: Design, name: str, rows: Known = NO_ROWS) -> Job:
    """What this program is called with; `rows` as of `compile_all`."""
    if name in PHASES:
        return _gradient(plan, name, rows.get(name))
    if (phase := name.removesuffix(EVAL)) in PHASES:
        return _evaluation(plan, phase, rows.get(phase))
    return _JOBS[name](plan, rows.get(name))


def resident(plan: Design) -> float:
    """Bytes of one chip that a run occupies from its first to its last update."""
    return size(plan.frozen) + size(plan.state)


def size(tree: Any) -> float:
    """Bytes that one chip keeps of these arrays."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += math.prod(shape) * bits(leaf.dtype) / 8
    return total


def bits(dtype: Any) -> int:
    """Of one number; two of four bits share a byte."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return 8 * dtype.itemsize


def _compile(plan: Design, chip: Chip, name: str, rows: Known) -> Program:
    began = time.monotonic()
    asked = job(plan, name, rows)
    common: dict[str, Any] = {
        "name": name, "what": asked.what, "chip": chip, "tokens": asked.tokens, "mean": asked.mean,
        "counted": asked.counted,
    }  # fmt: skip
    whole = resident(plan) + size(asked.given)
    try:
        compiled = asked.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        took = time.monotonic() - began
        return Program(**common, peak=wanted(str(error)), error="out of memory", took=took)
    memory = compiled.memory_analysis()
    # Only a loop over new tokens stops when it will; one turn of it is what is planned.
    turns = {"token": 1}.get(name)
    rate = chip.flops / chip.clock if chip.clock else 0.0
    found = measure(compiled.as_text(), kernels, turns, rate)
    cost = Cost(unknown=found.unknown)
    cost.add(found, 1 / asked.times)
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Arguments that a program does not read are none of it, and yet somewhere.
    beside = max(0.0, whole - arguments)
    peak = getattr(memory, "peak_memory_in_bytes", 0) or arguments + temporaries + outputs
    return Program(
        **common,
        arguments=arguments,
        temporaries=temporaries,
        beside=beside,
        peak=peak + beside,
        least=asked.least / plan.mesh.size,
        cost=cost,
        took=time.monotonic() - began,
    )


def wanted(error: str) -> float:
    """Bytes that a program would have needed, by the compiler's words; 0 where it does not say."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", error)
    if not found:
        return 0.0
    number, unit = (word for word in found.groups() if word)
    return float(number) * 1024.0 ** " KMGT".index(unit)


def kernels(op: Any, operands: list[str]) -> float | None:
    """FLOPs of the kernels that our programs call, for `cost.measure`."""
    given = [dims(shape) for shape in operands]
    if "$fmha" in op.attributes:  # cuDNN's: 2 products on the way up, 5 on the way down, causal
        rows, length, heads, width = given[0]
        products = 5 if "Backward" in op.attributes else 2
        return products * rows * heads * length**2 * width
    return splash.flops(op.name, given)


def micro_batches(plan: Design, phase: str) -> tuple[int, float]:
    """How many micro-batches of this phase one update takes: at most, and in the mean."""
    updates = range(len(plan.active))  # then turns repeat
    counts = [len(plan.turns(update).get(phase, ())) for update in updates]
    return plan.micro_batches(phase), sum(counts) / len(counts)


def _batch(plan: Design, phase: str, rows: Rows | None, number: int) -> Any:
    """So many stacked micro-batches, as shapes."""
    sharding = batch_sharding(plan.mesh, stacked=True)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    if rows:
        return jax.tree.map(place, rows.shapes(number))
    ids = jax.ShapeDtypeStruct((number, *_size(plan, phase)), jnp.int32)
    return jax.tree.map(place, facts_of(plan.config, phase).batch(ids))


def _size(plan: Design, phase: str) -> tuple[int, int]:
    """Rows (or pairs) of a micro-batch, and their length."""
    facts = facts_of(plan.config, phase)
    return facts.rows(plan.config), facts.longest(plan.config)


def _shape(plan: Design, phase: str, rows: Rows | None) -> str:
    number, length = _size(plan, phase)
    built = plan.phases[phase]
    what = rows.what if rows else f"{number}{facts_of(plan.config, phase).unit} x {length}"
    stops = "" if built.whole else f", layer {built.blocks(plan.spec)}"
    return f"{what}{stops}"


def _key(plan: Design) -> Any:
    if not plan.drops:
        return None
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(plan.mesh))


def _gradient(plan: Design, phase: str, rows: Rows | None) -> Job:
    number, _ = micro_batches(plan, phase)
    first = phase == plan.active[0]
    # The gradient of the phase before waits for this one's.
    waiting = None if first else plan.state.trained
    lengths = rows.stream.lengths if rows else plan.config.batch.buckets
    same = len(lengths) == 1 or (not rows and facts_of(plan.config, phase).packed(plan.config))
    together = number == 1 or same or RULES[plan.phases[phase].rule].one is None
    number = number if together else 1
    batch = _batch(plan, phase, rows, number)
    arguments = phase, plan.state, plan.frozen, batch, _key(plan)
    if together:
        lower = partial(plan.step.gradient.lower, *arguments)
        given: Any = (batch, waiting)
    else:  # each micro-batch by itself, as its length may differ from the others'
        total = plan.state.trained
        given = (batch, waiting, total)
        lower = partial(plan.step.add.lower, *arguments, total, np.int32(0))
    work = plan.work(phase, batch)
    return Job(
        lower=lower,
        what=_shape(plan, phase, rows),
        given=given,
        attends=attends.of_batch(plan, phase, batch),
        tokens=work.tokens // number,
        times=number,
        least=work.flops / number,
        mean=rows.mean(number) if rows else 1.0,
        counted=rows.counted if rows else None,
    )


def _update(plan: Design, _: None) -> Job:
    gradients = dict.fromkeys(plan.active, plan.state.trained)
    sizes = tuple((phase, micro_batches(plan, phase)[0]) for phase in plan.active)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=plan.shardings.step)
    losses = dict.fromkeys(plan.active, number)
    lower = partial(plan.step.apply.lower, plan.state, gradients, losses, sizes)
    return Job(lower, f"{plan.trained_count:,} trained", gradients)


def look(plan: Design, rows: Known = NO_ROWS) -> None:
    """Runs the user's own terms on shapes, where no compiler will.

    Raises:
      UserError: one of them fails.
    """
    for phase, built in plan.phases.items():
        if any(term.objective.own for term in built.terms):
            batch = _one(plan, phase, rows.get(phase))
            jax.eval_shape(plan.evaluate[phase], plan.state.trained, plan.frozen, batch)


def _one(plan: Design, phase: str, rows: Rows | None) -> Any:
    """A micro-batch, as shapes."""
    sharding = batch_sharding(plan.mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding),
        _batch(plan, phase, rows, 1),
    )


def _evaluation(plan: Design, phase: str, rows: Rows | None) -> Job:
    batch = _one(plan, phase, rows)
    work = plan.work(phase, batch, passes="forward")
    return Job(
        lower=partial(plan.evaluate[phase].lower, plan.state.trained, plan.frozen, batch),
        what=_shape(plan, phase, rows),
        given=batch,
        attends=attends.of_batch(plan, phase, batch, forward=True),
        tokens=work.tokens,
        least=work.flops,
        mean=rows.mean() if rows else 1.0,
        counted=rows.counted if rows else None,
    )


_JOBS: dict[str, Callable[[Design, Any], Job]] = {
    "update": _update,
    "prompt": writing.prompt,
    "token": writing.token,
}
