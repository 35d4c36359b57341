"""Turns against a simulation of the original's flag, and learning rates against their formulas."""

import math

import numpy as np
import pytest

from jaxalign.train.phases import PHASES as FACTS
from jaxalign.train.schedule import learning_rate, phase_of, turns, warmup_steps

UPDATES = 7
PHASES = tuple(FACTS)
EVERY = ("microbatch", "step", "joint")


def simulate(every: str, accumulate: int) -> list[dict[str, list[int]]]:
    """Per update, which batches of each stream were drawn, told one micro-batch after another."""
    streams = {phase: iter(range(10_000)) for phase in PHASES}
    align, updates = False, []
    for _ in range(UPDATES):
        drawn: dict[str, list[int]] = {}
        for _ in range(accumulate):
            phases = PHASES if every == "joint" else (PHASES[align],)
            for phase in phases:
                drawn.setdefault(phase, []).append(next(streams[phase]))
            if every == "microbatch":
                align = not align  # after every micro-batch; never reset
        if every == "step":
            align = not align
        updates.append(drawn)
    return updates


def as_lists(found: dict[str, range]) -> dict[str, list[int]]:
    return {phase: list(indices) for phase, indices in found.items()}


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 5, 8])
def test_turns(every, accumulate):
    found = [as_lists(turns(every, update, accumulate, PHASES)) for update in range(UPDATES)]
    assert found == simulate(every, accumulate)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("phase", PHASES)
def test_one_phase_takes_every_turn(every, phase):
    found = [as_lists(turns(every, update, 3, (phase,))) for update in range(UPDATES)]
    assert found == [{phase: [3 * update + i for i in range(3)]} for update in range(UPDATES)]


@pytest.mark.parametrize("every", ["microbatch", "step"])
@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_phase_of_agrees_with_turns(every, accumulate):
    for update in range(UPDATES):
        here = range(update * accumulate, (update + 1) * accumulate)
        found = turns(every, update, accumulate, PHASES)
        sizes = {phase: len(indices) for phase, indices in found.items()}
        phases = [phase_of(micro, every, accumulate, PHASES) for micro in here]
        assert sizes == {phase: phases.count(phase) for phase in set(phases)}


def test_one_micro_batch_per_update_alternates_by_update():
    assert [phase_of(micro, "microbatch", 1, PHASES) for micro in range(4)] == ["task", "align"] * 2
    # Odd accumulation: the flag is not reset, so that updates open in turn with task and align.
    sizes = [{p: len(r) for p, r in turns("microbatch", u, 3, PHASES).items()} for u in range(2)]
    assert sizes == [{"task": 2, "align": 1}, {"task": 1, "align": 2}]


@pytest.mark.parametrize("every", ["microbatch", "step"])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_three_phases_take_turns(every, accumulate):
    names = ("a", "b", "c")
    drawn = dict.fromkeys(names, 0)
    for update in range(UPDATES):
        here = range(update * accumulate, (update + 1) * accumulate)
        phases = [phase_of(micro, every, accumulate, names) for micro in here]
        for name, numbers in turns(every, update, accumulate, names).items():
            assert list(numbers) == [drawn[name] + i for i in range(phases.count(name))]
            drawn[name] += len(numbers)
    assert sum(drawn.values()) == UPDATES * accumulate


# --- learning rates -----------------------------------------------------------------------------

PEAK = 5e-4


def rates(name: str, steps: int, warmup: int) -> np.ndarray:
    rate = learning_rate(name, PEAK, steps, warmup)
    return np.array([float(rate(step)) for step in range(steps + 3)])


def closed_form(name: str, step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return PEAK * step / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    timescale = warmup or 10_000
    return (
        PEAK
        * {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "inverse_sqrt": math.sqrt(timescale / (step - warmup + timescale)),
        }[name]
    )


NAMES = ("constant", "linear", "cosine", "inverse_sqrt")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(20, 4), (12, 0), (9, 1), (5, 5)])
def test_rates(name, steps, warmup):
    expected = [closed_form(name, step, steps, warmup) for step in range(steps + 3)]
    np.testing.assert_allclose(rates(name, steps, warmup), expected, rtol=1e-5, atol=1e-10)


def test_the_papers_rate():
    # peak·sqrt(w/s) past the warm-up, here of 9 updates.
    found = rates("inverse_sqrt", 40, 9)
    assert found[0] == 0
    np.testing.assert_allclose(found[[9, 36]], [PEAK, PEAK / 2], rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(20, 4), (12, 0), (9, 1)])
def test_rates_of_transformers(name, steps, warmup):
    import torch
    from transformers import get_scheduler

    theirs = {"constant": "constant_with_warmup"}.get(name, name)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(theirs, optimiser, warmup, steps)
    expected = []
    for _ in range(steps + 3 if name != "cosine" else steps + 1):  # theirs rises again past the end
        expected.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    np.testing.assert_allclose(
        rates(name, steps, warmup)[: len(expected)], expected, rtol=1e-5, atol=1e-10
    )


@pytest.mark.parametrize(
    ("steps", "warmup", "ratio", "found"),
    [(1000, 0, 0.03, 30), (20, 0, 0.03, 1), (34, 0, 0.03, 2), (100, 7, 0.03, 7), (100, 0, 0.0, 0)],
)
def test_warmup(steps, warmup, ratio, found):
    assert warmup_steps(steps, warmup, ratio) == found
