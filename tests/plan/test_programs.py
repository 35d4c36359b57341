"""Programs of a run, compiled for the devices that are here, and what is read off them."""

import dataclasses

import jax
import pytest

from jaxalign.chips import CHIPS
from jaxalign.plan.cost import Cost, Traffic
from jaxalign.plan.programs import PROGRAMS, Program, compile_all, wanted
from jaxalign.sharding import make_mesh
from jaxalign.train.design import adapter_of, design
from tests.plan.conftest import config
from tests.tiny import SPEC

HERE = dataclasses.replace(CHIPS["v5e"], name="cpu", clock=0.0)


def designed(*words, fsdp=4):
    given = config("model.dtype=float32", "align.layer=2", "lora.r=4", "batch.size=8",
                   "batch.max_length=32", "batch.pairs=8", "batch.pair_max_length=16",
                   "generate.batch=4", "generate.max_new_tokens=8", *words)  # fmt: skip
    mesh = make_mesh(1, fsdp, devices=jax.devices()[:fsdp])
    return design(given, SPEC, adapter_of(given, SPEC), mesh, 100)


def compiled(only, *words):
    plan = designed(*words)
    with jax.set_mesh(plan.mesh):
        return {program.name: program for program in compile_all(plan, HERE, only)}


@pytest.fixture(scope="module")
def programs():
    return compiled(("align", "update", "token"), "batch.accumulate=2")


def check(programs):
    for program in programs.values():
        assert program.fits and program.peak >= program.arguments > 0
        assert program.seconds is None  # nobody tells cycles here
        assert not program.cost.unknown
        if program.name != "update":
            # Scores above the diagonal and the whole cache are computed, too; layers are tiny.
            assert 0.95 < program.ratio < 1.7


def test_work_is_near_the_least(programs):
    assert tuple(programs) == ("align", "update", "token")
    check(programs)


@pytest.mark.slow
def test_every_program_of_a_run_compiles():
    programs = compiled(PROGRAMS, "batch.accumulate=2")
    assert tuple(programs) == PROGRAMS
    check(programs)


def test_work_is_told_of_one_micro_batch(programs):
    alone = compiled(("align",), "batch.accumulate=1")["align"]
    assert programs["align"].cost.flops == pytest.approx(alone.cost.flops, rel=0.02)
    assert programs["align"].tokens == alone.tokens == 2 * 8 * 16


def test_what_a_program_does_not_read_lies_beside_it(programs):
    # An update reads no frozen weight, an alignment phase no head: they are in memory all the same.
    assert programs["update"].beside > 0
    least = min(program.arguments + program.beside for program in programs.values())
    assert programs["update"].peak >= least


def test_seconds_add_cycles_and_kernels():
    chip = CHIPS["v5e"]
    cost = Cost(flops=3e12, kernel_flops=1.97e12, cycles=1.5e9)
    program = Program("task", "", chip, cost=cost, least=2e12)
    assert program.seconds == pytest.approx(1.0 + 0.01)
    assert program.ratio == pytest.approx(1.5)
    for name in ("loop while.3", "estimate fusion.7"):
        assert dataclasses.replace(program, cost=Cost(cycles=1, unknown=[name])).seconds is None
    unknown = Cost(flops=3e12, cycles=1, unknown=["kernel mystery"])
    assert dataclasses.replace(program, cost=unknown).ratio is None


def test_exposed_traffic_takes_the_links():
    cost = Cost(collectives={"all-gather": Traffic(2, 30e9, 10e9), "all-reduce": Traffic(1, 1e9)})
    assert Program("task", "", CHIPS["v5e"], cost=cost).exposed == pytest.approx(21e9 / 200e9)


@pytest.mark.parametrize(
    ("error", "bytes_"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. "
         "Exceeded hbm capacity by 4.75G.", 20.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (240.00G) exceeds available HBM (15.75G).", 240 * 2**30),
        ("RESOURCE_EXHAUSTED: something else", 0),
    ],
)  # fmt: skip
def test_what_a_program_wanted_is_read_from_the_compilers_words(error, bytes_):
    assert wanted(error) == bytes_
