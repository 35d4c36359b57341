"""Which settings are best on a place: many by formula, the most promising compiled.

found = search(config, parse('v5e:4x4'), tries=8)
found[0].text                                    # 'mesh.fsdp=8 mesh.tensor=2 ...'
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec
from jaxalign.plan.advice import Words, changed, split, text
from jaxalign.plan.analytic import PRECISION
from jaxalign.plan.run import Plan, find_spec, plan_run
from jaxalign.plan.topology import Place
from jaxalign.settings import Config
from jaxalign.train.phases import PHASES, active_phases, facts_of

REMATS = ("full", "names", "none")
BASES = ("none", "int8")
SPLITS = (1, 2, 4)  # micro-batches of an update, times as many as now


@dataclass(frozen=True)
class Found:
    """One try."""

    words: Words
    plan: Plan
    best: bool = False  # nothing tried is both faster and smaller

    @property
    def text(self) -> str:
        """What to put into the configuration."""
        return text(self.words)

    @property
    def seconds_a_row(self) -> float | None:
        """By the estimate: gradients of the planned phases over their rows; None: unknown."""
        seconds, rows = 0.0, 0.0
        for program, times in self.plan.gradients:
            if program.seconds is None:
                return None
            seconds += program.seconds * times
            rows += self.plan.rows(program.name) * times
        return seconds / rows if rows else None

    @property
    def exposed(self) -> float:
        """Seconds of an update's traffic that nothing hides, at the links' full speed."""
        return sum(program.exposed * times for program, times in self.plan.gradients)

    @property
    def ratio(self) -> float | None:
        """FLOPs over the least, of the largest program."""
        return max((p.ratio for p, _ in self.plan.gradients if p.ratio), default=None)


def search(
    config: Config,
    place: Place,
    only: tuple[str, ...] = tuple(PHASES),
    tries: int = 8,
    report: Callable[[str, int, int], None] = lambda words, number, of: None,
    compile: Callable[[Config, Place, tuple[str, ...]], Plan] = plan_run,
) -> list[Found]:
    """What was compiled, the fastest that fits first, what does not fit last.

    Args:
      only: programs that a try compiles.
      tries: how many candidates are compiled, the configuration as it is among them.
      report: called before each.
      compile: makes a plan of a configuration.

    Raises:
      UserError: nothing can be laid over this place.
    """
    chosen = promising(config, place, only, tries)
    if not chosen:
        raise UserError(
            f"--search: by formula nothing fits on {place.name}; try a larger slice, fewer rows "
            "(batch.size, batch.pairs), or rows that its chips divide"
        )
    found = []
    for number, words in enumerate(chosen, 1):
        report(text(words), number, len(chosen))
        found.append(Found(words, compile(changed(config, words), place, only)))
    return ordered(found)


def ordered(found: list[Found]) -> list[Found]:
    """Those that fit by time, unknown times behind, then the rest by peak; Pareto ones marked."""

    def key(one: Found) -> tuple:
        seconds = one.seconds_a_row
        if not one.plan.fits:
            return (2, one.plan.peak)
        return (1, one.plan.pace or one.plan.peak) if seconds is None else (0, seconds)

    marked: list[Found] = []
    smallest = math.inf
    for one in sorted(found, key=key):
        best = one.plan.fits and one.seconds_a_row is not None and one.plan.peak < smallest
        smallest = min(smallest, one.plan.peak) if best else smallest
        marked.append(replace(one, best=best))
    return marked


def promising(config: Config, place: Place, only: tuple[str, ...], tries: int) -> list[Words]:
    """At most `tries` candidates: as configured, then those that are best by formula."""
    spec = find_spec(config)
    rated = []
    for words in candidates(config, place, spec):
        try:
            plan = plan_run(changed(config, words), place, only, how="formula")
        except UserError:  # rows that this mesh does not divide, and the like
            continue
        if plan.peak <= place.chip.memory * (1 + PRECISION):
            rated.append((plan.pace, plan.peak, words))
    first = [words for _, _, words in rated if not words]
    # Rounding the base changes what is computed: each kind of base gets its share of tries.
    bases: dict[object, list[tuple[float, float, Words]]] = {}
    for one in rated:
        if one[2]:
            bases.setdefault(one[2].get("model.quantize"), []).append(one)
    turns = itertools.zip_longest(*map(fronts, bases.values()))
    return (first + [words for turn in turns for words in turn if words])[:tries]


def fronts(rated: list[tuple[float, float, Words]]) -> list[Words]:
    """All of them: first those that nothing beats in both numbers, by the first of them; then the
    same of the rest."""
    left, order = sorted(rated, key=lambda one: one[:2]), list[Words]()
    while left:
        smallest, front = math.inf, list[tuple[float, float, Words]]()
        for one in left:
            if one[1] < smallest:
                front.append(one)
                smallest = one[1]
        order += [words for _, _, words in front]
        left = [one for one in left if one not in front]
    return order


def candidates(config: Config, place: Place, spec: ModelSpec) -> Iterator[Words]:
    """Every combination of mesh, remat, micro-batch and base, as changes of the configuration;
    none at all comes first. What is configured is among the values of each.
    """
    yield {}
    remats = dict.fromkeys((config.model.remat, *REMATS))
    rounded = BASES if config.trainable == "lora" else ()
    bases = dict.fromkeys((config.model.quantize, *rounded))
    splits = [split(config, ways) if ways > 1 else {} for ways in SPLITS]
    meshes = list(_meshes(config, place, spec))
    for mesh, remat, batch, base in itertools.product(meshes, remats, splits, bases):
        if batch is None:
            continue
        words: Words = {**mesh, "model.remat": remat, **batch, "model.quantize": base}
        own = {key: value for key, value in words.items() if value != _value(config, key, place)}
        if own:
            yield own


def _value(config: Config, key: str, place: Place) -> object:
    part, name = key.split(".")
    value = getattr(getattr(config, part), name)
    if part == "mesh" and value == -1:
        sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.seq)
        return place.chips // math.prod(size for size in sizes if size > 0)
    return value


def _meshes(config: Config, place: Place, spec: ModelSpec) -> Iterator[Words]:
    rows = [facts_of(config, name).rows(config) for name in active_phases(config)]
    chips = place.chips
    for data, tensor, seq in itertools.product(_divisors(chips), repeat=3):
        if chips % (data * tensor * seq) or data % place.slices:
            continue
        if spec.heads % tensor or spec.kv_heads % tensor or spec.ffn % tensor:
            continue
        # A row is split only where there are fewer rows than chips to give them to.
        if seq > 1 and min(rows) >= chips:
            continue
        fsdp = chips // (data * tensor * seq)
        if all(row % (data * fsdp) == 0 for row in rows):
            yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "mesh.seq": seq}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
