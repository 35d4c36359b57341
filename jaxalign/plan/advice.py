"""What to change where a run does not fit: settings in the order of what they cost.

for advice in advise(plan): advice.text, advice.peak       # 'model.remat=full', bytes
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxalign.errors import UserError
from jaxalign.plan.run import Plan, find_spec, plan_run
from jaxalign.settings import Config, check
from jaxalign.train.phases import active_phases, facts_of
from jaxalign.train.schedule import turns

Words = dict[str, Any]  # key -> value
LIGHTER: dict[str, tuple[str, ...]] = {
    "none": ("names", "full"),
    "dots": ("names", "full"),
    "names": ("full",),
    "offload": ("full",),
    "full": (),
}


@dataclass(frozen=True)
class Advice:
    """One change."""

    words: Words
    peak: float  # bytes of a chip; by formula, scaled to what the compiler said of the plan

    @property
    def text(self) -> str:
        """As the command line takes it."""
        return text(self.words)


def text(words: Words) -> str:
    """`model.remat=full batch.size=16`."""
    return " ".join(f"{key}={value}" for key, value in words.items())


def changed(config: Config, words: Words) -> Config:
    """The configuration with these settings.

    Raises:
      UserError: settings that contradict each other.
    """
    config = copy.deepcopy(config)
    for key, value in words.items():
        part, _, name = key.rpartition(".")
        setattr(getattr(config, part) if part else config, name, value)
    check(config)
    return config


def split(config: Config, ways: int) -> Words | None:
    """Micro-batches of 1/ways the rows and as many more of them; None where that is another run.

    Rows of an update stay what they are.
    """
    words: Words = {"batch.accumulate": config.batch.accumulate * ways}
    for name in active_phases(config):
        if (own := facts_of(config, name).divided(config, ways)) is None:
            return None
        words |= own
    return words if _rows(changed(config, words)) == _rows(config) else None


def _rows(config: Config) -> list[dict[str, int]]:
    """The rows of each phase in the first updates, after which they repeat."""
    phases = {name: facts_of(config, name).rows(config) for name in active_phases(config)}
    return [
        {name: len(micro) * phases[name] for name, micro in served.items()}
        for served in (
            turns(config.align.every, update, config.batch.accumulate, [*phases])
            for update in range(len(phases))
        )
    ]


def advise(plan: Plan) -> list[Advice]:
    """Changes after which the run should fit, or else those that help most; at most four."""
    spec = find_spec(plan.config)
    names = tuple(program.name for program in plan.programs)
    before = plan_run(plan.config, plan.place, names, how="formula").peak
    scale = plan.peak / before if plan.peak and before else 1.0
    memory = plan.place.chip.memory
    found: list[Advice] = []
    for words in _ideas(plan, spec.heads, spec.kv_heads):
        if any(one.peak <= memory and one.words.items() <= words.items() for one in found):
            continue  # less is enough
        try:
            other = plan_run(changed(plan.config, words), plan.place, names, how="formula")
        except UserError:  # the mesh does not divide these rows, and the like
            continue
        if other.peak < 0.98 * before:
            found.append(Advice(words, other.peak * scale))
    enough = [advice for advice in found if advice.peak <= memory]
    return enough[:4] or sorted(found, key=lambda advice: advice.peak)[:4]


def _ideas(plan: Plan, heads: int, kv_heads: int) -> Iterator[Words]:
    config, mesh = plan.config, plan.mesh
    single = list(_single(config, mesh, heads, kv_heads))
    yield from single
    for number, first in enumerate(single):
        for second in single[number + 1 :]:
            if not set(first) & set(second):
                yield first | second


def _single(config: Config, mesh: dict[str, int], heads: int, kv_heads: int) -> Iterator[Words]:
    for remat in LIGHTER[config.model.remat]:
        yield {"model.remat": remat}
    if mesh["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": mesh["data"] * mesh["fsdp"]}
    for ways in (2, 4, 8):
        words = split(config, ways)
        if words:
            yield words
    if config.trainable == "lora" and config.model.quantize == "none":
        yield {"model.quantize": "int8"}
    for ways in (2, 4, 8):
        tensor = mesh["tensor"] * ways
        if mesh["fsdp"] % ways == 0 and heads % tensor == 0 and kv_heads % tensor == 0:
            yield {"mesh.tensor": tensor, "mesh.fsdp": mesh["fsdp"] // ways}


def reason(plan: Plan) -> str:
    """Which program does not fit, and by how much; empty where all do."""
    worst = max(
        (program for program in plan.programs if not program.fits),
        key=lambda program: program.peak,
        default=None,
    )
    if worst is None:
        return ""
    memory = worst.chip.memory
    where = f"{worst.name} ({worst.what})"
    if not worst.peak:
        return f"{where}: {worst.error}"
    return (
        f"{where} needs {worst.peak / 1e9:.1f} GB of a chip, {(worst.peak - memory) / 1e9:.1f} GB "
        f"more than its {memory / 1e9:.1f} GB"
    )


def seen(config: Config) -> dict[str, Any]:
    """The settings that a plan depends on, for its JSON."""
    parts = ("model", "lora", "align", "batch", "mesh", "generate")
    whole = dataclasses.asdict(config)
    return {"trainable": config.trainable, **{part: whole[part] for part in parts}}
