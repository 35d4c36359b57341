"""What a run takes by formula, where no compiler for the chip is at hand: memory alone, no time.

Weights, optimiser, batches and caches follow exactly from shapes and shardings. What is in memory
while a program runs is the sum of what the backward pass keeps (as `model.decoder` names it), one
layer's weights gathered, the widest arrays of a layer and the loss. Against the TPU compiler's
peak for Llama 3 8B (docs/plan.md) the sum was within PRECISION.

    for program in estimate_all(design(...), CHIPS['h100']):
        program.peak, program.source                 # bytes of one chip, 'formula'
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from jaxalign.chips import Chip
from jaxalign.objectives.chunked import at_once
from jaxalign.plan.programs import (
    EVAL,
    NO_ROWS,
    PROGRAMS,
    Job,
    Program,
    chosen,
    job,
    of_rows,
    resident,
    size,
)
from jaxalign.plan.rows import Known
from jaxalign.train.design import Design
from jaxalign.train.phases import PHASES, facts_of
from jaxalign.train.rules import RULES

PRECISION = 0.3  # of the peak: what `tests/plan/test_analytic.py` holds it to

# FLOPs of a step over the least, by what is computed twice; measured with the compiler.
AGAIN = {"none": 1.02, "dots": 1.03, "names": 1.03, "offload": 1.03, "full": 1.36}
WIDENING = 1.08  # the same of time, of a rounded base on v5e: 284 ms where 262 were (docs/tpu.md)
# What `none` and `dots` keep cannot be listed by name. Numbers a token and layer: of D, of all
# heads' queries (N H), of keys (K H), of F.
KEPT = {
    "full": (1, 0, 0, 0),
    "offload": (2, 3, 2, 0),
    "names": (2, 3, 2, 2),
    "dots": (3, 2, 2, 2),
    "none": (8, 6, 4, 6),
}
# A second derivative keeps what `none` keeps, of each inner step and of the query, whatever is
# recomputed; where nothing is, the first derivative's slopes are kept as well.
TWICE = {"none": 2}
WORKING = (6, 4, 4, 5)  # the same of one layer, whose backward pass is under way
# Arrays of attention scores at once, where no kernel takes them: of a pass; with their slopes (2 by
# the compiler for TPUs, 3 by that for CPUs); of a second derivative (4 and, with the scheduler that
# takes most, 12). Where nothing is recomputed, that keeps two more of each layer: of every inner
# step, of their slopes but the last.
SCORES = {"forward": 2, "once": 2.5, "twice": 5}
SCORES_KEPT = 2
COPIES = 3  # of a chunk of logits: themselves, their powers, the slopes


def estimate_all(
    plan: Design,
    chip: Chip,
    only: tuple[str, ...] = PROGRAMS,
    rows: Known = NO_ROWS,
) -> Iterator[Program]:
    """Every program of the run that is named in `only` and that the run has, by formula."""
    for name in chosen(plan, only):
        yield of_rows(partial(estimate, plan, chip, name), name, rows)


def estimate(plan: Design, chip: Chip, name: str, rows: Known = NO_ROWS) -> Program:
    """One program by formula."""
    asked = job(plan, name, rows)
    arguments = resident(plan) + size(asked.given)
    temporaries = _TEMPORARIES[name](plan, asked, name, chip)
    return Program(
        name=name,
        what=asked.what,
        chip=chip,
        tokens=asked.tokens,
        mean=asked.mean,
        counted=asked.counted,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries,
        least=asked.least / plan.mesh.size,
        source="formula",
    )


def pace(plan: Design, chip: Chip, names: tuple[str, ...]) -> float:
    """A number that orders designs by time, in seconds a row; it is not an estimate to show.

    Work at the chip's peak, during which weights are gathered twice; where that takes longer, so
    does all. Sums over `tensor`, four a layer, wait for products and products for them: half.
    """
    total, rows = 0.0, 0
    link = chip.link or math.inf
    model = plan.config.model
    again = AGAIN[model.remat] * (WIDENING if model.quantize != "none" else 1.0)
    for name in names:
        asked = job(plan, name)
        work = asked.least / plan.mesh.size * again / chip.flops
        total += max(work, _gathers(plan, name) / link) + 0.5 * _sums(plan, name) / link
        rows += facts_of(plan.config, name).rows(plan.config)
    return total / max(rows, 1)


def _gathers(plan: Design, name: str) -> float:
    """Bytes that a chip sends for others to have a layer's weights, there and back."""
    ways = plan.mesh.shape["fsdp"] * plan.mesh.shape["seq"]
    return _layer(plan) * _depth(plan, name) * (ways - 1) * 2 / ways


def _sums(plan: Design, name: str) -> float:
    """Bytes that a chip sends for activations to be summed over `tensor`."""
    tensor = plan.mesh.shape["tensor"]
    once = _tokens(plan, job(plan, name)) * plan.spec.dim * _width(plan)
    return once * 4 * _depth(plan, name) * 2 * (tensor - 1) / tensor


def _width(plan: Design) -> int:
    """Bytes of an activation."""
    return 2 if plan.config.model.dtype == "bfloat16" else 4


def _depth(plan: Design, name: str) -> int:
    phase = plan.phases.get(name.removesuffix(EVAL))
    return phase.blocks(plan.spec) if phase else plan.spec.layers


def _tokens(plan: Design, asked: Job) -> float:
    """Of one chip."""
    shape = plan.mesh.shape
    return asked.tokens / (shape["data"] * shape["fsdp"] * shape["seq"])


def _layer(plan: Design) -> float:
    """Bytes of one layer's weights as they are stored, whole but for `tensor`."""
    base = plan.state.trained if plan.frozen.base is None else plan.frozen.base
    ways = plan.mesh.shape["fsdp"] * plan.mesh.shape["seq"]
    return size(base["blocks"]) * ways / plan.spec.layers


def _numbers(plan: Design, counts: tuple[int, ...]) -> float:
    """Numbers a token on one chip: so many of D, queries, keys and F."""
    spec, tensor = plan.spec, plan.mesh.shape["tensor"]
    dim, query, key, ffn = counts
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return dim * spec.dim + (query * queries + key * keys + ffn * spec.ffn) / tensor


def _working(plan: Design, asked: Job, chip: Chip, way: str = "forward") -> float:
    """One layer at work: its arrays and its weights, gathered."""
    wide = 0.0
    if plan.config.model.quantize != "none":
        wide = 2 * plan.spec.dim * plan.spec.ffn * _width(plan) / plan.mesh.shape["tensor"]
    arrays = _tokens(plan, asked) * _numbers(plan, WORKING) * _width(plan)
    scores = SCORES[way] * asked.attends.scores(plan, chip) if asked.attends else 0.0
    # On the way up scores are gone before the feed-forward layer begins; of a second derivative
    # what is kept of all layers has counted these arrays.
    arrays = arrays + scores if way == "once" else max(arrays, scores)
    return arrays + _layer(plan) + wide


def _loss(plan: Design, asked: Job, name: str, chip: Chip) -> float:
    """Logits of one chunk, and the states before them."""
    if not plan.phases[name.removesuffix(EVAL)].answers:
        return 0.0
    most = at_once(chip.platform, chip.memory)
    logits = min(most, asked.tokens * plan.spec.vocab / plan.mesh.size) * 4
    return COPIES * logits + 3 * _tokens(plan, asked) * plan.spec.dim * _width(plan)


def _gradient(plan: Design, asked: Job, name: str, chip: Chip) -> float:
    built, remat = plan.phases[name], plan.config.model.remat
    rule, steps, depth = RULES[built.rule], built.inner.steps, _depth(plan, name)
    tape = 0.0
    if rule.twice:
        kept = _numbers(plan, KEPT["none"]) * (steps + 1) * TWICE.get(remat, 1)
        if remat == "none" and asked.attends:
            tape = SCORES_KEPT * (2 * steps - 1) * depth * asked.attends.scores(plan, chip)
    else:
        kept = _numbers(plan, KEPT[remat])
    asked = replace(asked, tokens=int(asked.tokens * rule.share))  # at once
    tape += _tokens(plan, asked) * kept * _width(plan) * depth
    slopes = rule.copies(built.inner) * size(plan.state.trained)
    working = _working(plan, asked, chip, "twice" if rule.twice else "once")
    return tape + slopes + max(working, _loss(plan, asked, name, chip))


def _forward(plan: Design, asked: Job, name: str, chip: Chip) -> float:
    return max(_working(plan, asked, chip), _loss(plan, asked, name, chip))


def _update(plan: Design, asked: Job, name: str, chip: Chip) -> float:
    return size(plan.state.trained)


def _prompt(plan: Design, asked: Job, name: str, chip: Chip) -> float:
    return size(asked.made) + _working(plan, asked, chip)


def _token(plan: Design, asked: Job, name: str, chip: Chip) -> float:
    return _working(plan, asked, chip)


_TEMPORARIES = {
    **dict.fromkeys(PHASES, _gradient),
    **{name + EVAL: _forward for name in PHASES},
    "update": _update,
    "prompt": _prompt,
    "token": _token,
}
