"""Which candidates are tried, and how they are ordered; nothing is compiled."""

import dataclasses
from collections import Counter

import pytest

from jaxalign.errors import UserError
from jaxalign.plan.cost import Cost
from jaxalign.plan.run import find_spec, plan_run
from jaxalign.plan.search import Found, candidates, fronts, ordered, promising, search
from jaxalign.plan.topology import parse
from tests.plan.conftest import config

PLACE = parse("v5e:4x4")


def fake(config, place, only, seconds=0.1, peak=None):
    """The formula's plan, with a time."""
    plan = plan_run(config, place, only, how="formula")
    programs = tuple(
        dataclasses.replace(
            program,
            cost=Cost(cycles=seconds * place.chip.clock),
            peak=peak or program.peak,
            source="compiler",
        )
        for program in plan.programs
    )
    return dataclasses.replace(plan, programs=programs)


def found(words, seconds, peak):
    plan = fake(config("align.weight=0"), PLACE, ("task",), seconds, peak)
    return Found(words, plan)


def test_the_fastest_that_fits_comes_first_and_the_pareto_front_is_marked():
    tries = [
        found({"n": 1}, 0.3, 4e9),
        found({"n": 2}, 0.2, 9e9),
        found({"n": 3}, 0.4, 5e9),  # slower and larger than the first
        found({"n": 4}, 0.1, 99e9),  # does not fit
        found({"n": 5}, 0.5, 2e9),
    ]
    assert [(one.words["n"], one.best) for one in ordered(tries)] == [
        (2, True), (1, True), (3, False), (5, True), (4, False),
    ]  # fmt: skip


def test_time_is_told_a_row_and_unknown_times_come_behind():
    known = found({"n": 1}, 0.32, 4e9)
    assert known.seconds_a_row == pytest.approx(0.32 / 32)
    unknown = Found(
        {"n": 2},
        dataclasses.replace(
            known.plan,
            programs=tuple(dataclasses.replace(p, cost=Cost()) for p in known.plan.programs),
        ),
    )
    assert unknown.seconds_a_row is None
    assert [one.words["n"] for one in ordered([unknown, known])] == [1, 2]


def test_candidates_keep_rows_heads_and_the_rows_of_an_update():
    given = config("align.weight=0", "batch.size=16", "batch.accumulate=2")
    spec = find_spec(given)
    all_ = list(candidates(given, PLACE, spec))
    assert all_[0] == {}
    assert len({tuple(sorted(words.items())) for words in all_}) == len(all_)
    for words in all_[1:]:
        data, tensor = words.get("mesh.data", 1), words.get("mesh.tensor", 1)
        seq = words.get("mesh.seq", 1)
        fsdp = words.get("mesh.fsdp", 16)
        assert data * fsdp * tensor * seq == 16
        assert spec.kv_heads % tensor == 0
        assert 16 % (data * fsdp) == 0
        rows = words.get("batch.size", 16) * words.get("batch.accumulate", 2)
        assert rows == 32
    assert any("model.quantize" in words for words in all_)
    assert {words.get("model.remat", "names") for words in all_} == {"names", "full", "none"}


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("model.quantize=nf4", {"nf4", "none", "int8"}),
        ("model.quantize=int8", {"int8", "none"}),
        ("model.remat=dots", {"dots", "full", "names", "none"}),
    ],
)
def test_what_is_configured_is_combined_with_everything_else(word, values):
    given, (key, configured) = config("align.weight=0", word), word.split("=")
    all_ = list(candidates(given, PLACE, find_spec(given)))
    counts = Counter(words.get(key, configured) for words in all_)
    assert set(counts) == values and len(set(counts.values())) == 1, counts
    chosen = [one.get(key, configured) for one in promising(given, PLACE, ("task",), 8)]
    assert key != "model.quantize" or set(chosen) == values


def test_rows_are_split_over_tokens_only_where_there_are_too_few():
    def seqs(*words):
        given = config("align.weight=0", *words)
        return {one.get("mesh.seq", 1) for one in candidates(given, PLACE, find_spec(given))}

    assert seqs("batch.size=32") == {1}
    assert {2, 4} <= seqs("batch.size=4")


def test_slices_lie_along_data():
    two = parse("v5e:4x4", slices=2)
    given = config("align.weight=0", "mesh.data=2")
    assert all(one.get("mesh.data", 2) % 2 == 0 for one in candidates(given, two, find_spec(given)))


def test_fronts_come_one_after_the_other():
    rated = [(1.0, 9.0, {"a": 1}), (2.0, 5.0, {"a": 2}), (1.5, 9.5, {"a": 3}), (3.0, 5.5, {"a": 4})]
    assert fronts(rated) == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]
    rated = [(1.0, 5.0, {"a": 1}), (2.0, 6.0, {"a": 2}), (3.0, 4.0, {"a": 3})]
    assert fronts(rated) == [{"a": 1}, {"a": 3}, {"a": 2}]


def test_few_are_compiled_the_configuration_as_it_is_first():
    given, place = config("align.weight=0"), parse("v5e:2x2")
    chosen = promising(given, place, ("task",), 6)
    assert len(chosen) == 6 and chosen[0] == {}
    assert {words.get("model.quantize", "none") for words in chosen} == {"none", "int8"}

    compiled = []

    def compile(config, place, only):
        compiled.append(config)
        return fake(config, place, only, seconds=1 / len(compiled))

    told = []
    result = search(given, place, ("task",), 6, lambda *words: told.append(words), compile)
    assert len(compiled) == len(result) == 6
    assert told[0] == ("", 1, 6)
    assert result[0].seconds_a_row == min(one.seconds_a_row for one in result)


def test_the_best_of_the_tables_is_among_the_first():
    """docs/tpu.md: 32 x 512 on 16 chips are fastest under fsdp alone, whose gathers are hidden."""
    given = config("align.weight=0", "model.remat=full")
    chosen = promising(given, parse("v5e:4x4"), ("task",), 6)
    words = {"model.remat": "names"}
    assert words in chosen, chosen


def test_a_place_that_is_too_small_is_told():
    with pytest.raises(UserError, match="nothing fits on v5e:1x1"):
        search(config(model="meta-llama/Meta-Llama-3-70B"), parse("v5e:1x1"), ("task",))
