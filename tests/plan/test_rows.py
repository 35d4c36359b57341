"""A plan with the run's own rows: the batches that the run will have, and what of them counts."""

from dataclasses import replace

import jax
import pytest

from jaxalign.base import decoding_of, open_base
from jaxalign.cli import main
from jaxalign.config import to_yaml
from jaxalign.data.sources import read_all
from jaxalign.data.tasks import render
from jaxalign.generate import run, shapes
from jaxalign.plan.programs import Program, compile_all, job, of_rows
from jaxalign.plan.rows import Rows, read
from jaxalign.plan.run import PADDED, plan_run
from jaxalign.plan.topology import parse
from jaxalign.sharding import make_mesh
from jaxalign.train import setup
from jaxalign.train.design import adapter_of, design
from tests.plan.test_programs import HERE, check
from tests.tiny import SPEC

SYSTEM = "prompt.system='Answer with the intent and the slots of what the user says.'"
ANSWERS = ("generate.batch=8", "generate.max_new_tokens=8")
FREE = ("batch.buckets=[]", "batch.max_length=256", SYSTEM, "lora.dropout=0")


def planned(config, data=True, only=("task", "align")):
    return plan_run(config, parse("h100:1"), only, how="formula", data=data)


@pytest.mark.parametrize("layout", ["auto", "none"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_batches_are_those_of_the_run(configure, one_device, layout, accumulate):
    words = (*FREE, f"batch.pack={layout}", f"batch.accumulate={accumulate}", "align.every=joint")
    config = configure(*words)
    plan, run = planned(config), setup.prepare(config)
    for program in plan.programs:
        stream = run.train[program.name]
        batch = stream.blank(Rows.usual(stream, "").length, 1)
        work = run.work(program.name, batch)
        assert (program.tokens, program.least) == (work.tokens, work.flops)
        assert program.counted == pytest.approx(stream.share())
        assert (program.counted > 0.8) == (layout == "auto")
        computed = [stream.tokens(index)[1] for index in range(256)]
        assert program.mean * program.tokens == pytest.approx(sum(computed) / 256)
    assert plan.update == []  # the optimiser was not asked for
    assert plan.config.train.steps == run.total


def test_rows_behind_a_stem_are_less_work(configure):
    one, other = (planned(configure(*FREE, f"batch.pack={pack}")) for pack in ("auto", "none"))
    for shared, padded in zip(one.programs, other.programs, strict=True):
        assert shared.least * shared.mean < 0.6 * padded.least * padded.mean
    assert one.programs[0].what.startswith("8 rows in 1 x ")
    assert one.programs[1].what.startswith("8 pairs in 1 x ")
    assert other.programs[0].what.startswith("8 x ")


def test_an_update_is_of_mean_batches(configure):
    config = configure(*FREE, "align.every=joint", "batch.accumulate=1")
    plan = planned(config, only=("task", "align", "update"))
    tokens = sum(program.tokens * program.mean for program in plan.programs)
    assert plan.update_tokens == pytest.approx(tokens)
    assert 0.9 < plan.programs[0].mean < 1.1


def test_memory_is_that_of_the_longest(configure):
    stream = read(configure(*FREE, "align.weight=0"), 1)[0]["task"].stream
    few, most = Rows(stream, "", min(stream.lengths)), Rows(stream, "", max(stream.lengths))
    assert few.length < most.length and few.longest == most

    def make(rows):
        peak = rows["task"].length
        return Program("task", rows["task"].what, HERE, tokens=peak, peak=peak, took=1.0)

    for name in ("task", "task_eval"):
        found = of_rows(make, name, {"task": few})
        assert (found.tokens, found.peak, found.took) == (few.length, most.length, 2.0)
    assert of_rows(make, "task", {"task": most}).took == 1.0
    lost = of_rows(lambda rows: replace(make(rows), error="no" * (rows["task"] == most)),
                   "task", {"task": few})  # fmt: skip
    assert lost.error == "no" and not lost.fits


def test_micro_batches_of_one_length_are_as_long_as_their_longest(configure):
    config = configure(*FREE)
    rows, _ = read(config, 1)
    task = rows["task"]
    assert task.mean(4) > task.mean(1) > 0.5
    assert task.mean(1) == Rows.usual(task.stream, "").mean()


def test_updates_are_those_of_the_epochs(configure):
    config = configure(*FREE, "train.steps=0", "train.epochs=3", "batch.accumulate=1",
                       "align.every=joint")  # fmt: skip
    assert planned(config).updates == 3 * 64 // 8


@pytest.mark.parametrize("layout", ["auto", "none"])
def test_programs_of_real_batches_compile(configure, layout):
    config = configure(*FREE, f"batch.pack={layout}", "batch.accumulate=1")
    mesh = make_mesh(1, 2, devices=jax.devices()[:2])
    found = design(config, SPEC, adapter_of(config, SPEC), mesh, 100)
    rows, _ = read(config, 2)
    with jax.set_mesh(mesh):
        programs = {
            one.name: one for one in compile_all(found, HERE, ("align", "align_eval"), rows)
        }
    assert all(one.counted == rows["align"].counted for one in programs.values())
    check({"align": programs["align"]} if layout == "none" else {})
    assert all(one.fits and one.cost.flops > 0 for one in programs.values())


def test_a_plan_without_rows_says_so(configure):
    assert PADDED in planned(configure(*FREE), data=False).notes
    assert PADDED not in planned(configure(*FREE, "batch.pack=none"), data=False).notes
    assert PADDED not in planned(configure(*FREE)).notes


def test_the_command_reads_rows(configure, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(to_yaml(configure(*FREE)), "utf-8")
    words = ["plan", str(tmp_path / "run.yaml"), "--topology", "h100:1", "--phases", "task"]
    assert main([*words, "--data"]) == 0
    shown = capsys.readouterr().out
    assert "tokens that count" in shown and "8 rows in 1 x" in shown
    assert main(words) == 0
    assert "--data reads them" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("task.train=[]",), "--data: task.train is empty"),
        (("task.train=[no/such.jsonl]",), "no/such.jsonl"),
        (("model.path=meta-llama/Meta-Llama-3-8B", "model.revision=none"), "--data needs the tok"),
        (("--search",), "leave out --data or --search"),
    ],
)
def test_what_is_missing_is_told_in_one_sentence(
    configure, tmp_path, capsys, monkeypatch, words, told
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "run.yaml").write_text(to_yaml(configure(*FREE)), "utf-8")
    command = ["plan", str(tmp_path / "run.yaml"), "--topology", "h100:1", "--data", *words]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxalign: ") and error.count("\n") == 1
    assert told in error


@pytest.mark.parametrize("share", ["auto", "off"])
def test_prompts_are_planned_as_answers_are_written(configure, monkeypatch, share):
    config = configure(*FREE, *ANSWERS, f"generate.share_prefix={share}", "align.weight=0")
    base, started = open_base(config), []
    examples = [render(config.task.kind, record) for record in read_all(config.task.train)]
    prompts, _ = base.encode(examples)

    def begin(model, tokens, *given):
        started.append((model.shared, tokens))
        raise InterruptedError

    monkeypatch.setattr(run, "start", begin)
    with pytest.raises(InterruptedError):
        base.bare().write(prompts, decoding_of(config), config.generate.batch)
    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    rows, _ = read(config, 1)
    one = design(config, SPEC, adapter_of(config, SPEC), mesh, 100)
    tokens, shared = job(one, "prompt", {"prompt": rows["prompt"].longest}).given
    seen = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert [seen((shared, tokens))] == seen(started)
    assert (shared is None) == (share == "off")


def test_a_start_that_prompts_share_is_no_work_of_theirs(configure):
    only, spec = ("prompt", "token"), SPEC
    words = (*FREE, *ANSWERS, "align.weight=0")
    one, other = (
        planned(configure(*words, f"generate.share_prefix={how}"), only=only).programs
        for how in ("auto", "off")
    )
    layout = read(configure(*words), 1)[0]["prompt"].layout
    assert layout.ahead > 16 and one[0].what.endswith(f" behind {layout.ahead}")
    rows, width = (int(n) for n in one[0].what.split(" behind ")[0].split(" x "))
    assert one[0].tokens == rows * width < 0.7 * other[0].tokens
    assert one[0].least < 0.75 * other[0].least
    # Keys and values of the start are there once.
    slots = [int(program.what.split(", ")[1].split()[0]) for program in (one[1], other[1])]
    assert slots[1] - slots[0] == other[0].tokens // rows - width
    cached = 2 * spec.layers * spec.kv_heads * spec.head_dim * 4
    saved = rows * (slots[1] - slots[0]) - shapes.padded(layout.ahead)
    assert other[1].arguments - one[1].arguments == pytest.approx(cached * saved, abs=16)
    assert layout.counted == layout.asked - (layout.rows - 1) * layout.ahead
    assert one[0].counted == pytest.approx(layout.counted / layout.computed)


def test_prompts_behind_a_shared_start_compile(configure):
    config = configure(*FREE, *ANSWERS, "align.weight=0")
    mesh = make_mesh(1, 2, devices=jax.devices()[:2])
    found = design(config, SPEC, adapter_of(config, SPEC), mesh, 100)
    rows, _ = read(config, 2)
    with jax.set_mesh(mesh):
        programs = {one.name: one for one in compile_all(found, HERE, ("prompt", "token"), rows)}
    check(programs)
