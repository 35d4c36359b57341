"""What a run says about itself: where its time goes, its phases' speed, a trace, a full device."""

import dataclasses
import gzip
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxalign import chips, cli
from jaxalign.commands.train import profile_words
from jaxalign.config import load
from jaxalign.errors import UserError
from jaxalign.train import goodput, loop, metrics, pace, warm
from jaxalign.train.flops import Work
from jaxalign.train.goodput import PARTS, Goodput
from jaxalign.train.pace import Pace
from tests.train.test_log import Arriving
from tests.train.test_loop import assert_equal, lines, use_devices, weights

BACKEND = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture
def now(monkeypatch):
    """A clock that moves when told: now.at += 2."""
    time = SimpleNamespace(at=100.0)
    for module in (goodput, pace):
        monkeypatch.setattr(module.time, "monotonic", lambda: time.at)
    return time


@pytest.fixture
def clock(now):
    made = Goodput()
    yield made
    made.close()


def test_the_parts_are_all_of_the_time(now, clock):
    now.at += 1

    def waiting():
        now.at += 2
        yield "a"
        now.at += 3
        yield "b"

    for item in clock.inputs(waiting()):
        now.at += 10
        if item == "b":
            with clock.during("evaluate"):
                now.at += 4
                with clock.during("save"):
                    now.at += 5
                now.at += 1
    now.at += 6
    seconds = clock.seconds
    assert seconds == {
        "step": 20, "compile": 0, "input": 5, "evaluate": 5, "save": 5, "other": 7,
    }  # fmt: skip
    values = clock.values()
    assert values["goodput/seconds"] == 42 and values["goodput/step"] == pytest.approx(20 / 42)
    assert sum(values[f"goodput/{part}"] for part in PARTS) == pytest.approx(1)
    assert clock.sentence() == "42 s: step 47.6%, other 16.7%, input 11.9%, evaluate 11.9%, save 11.9%"  # fmt: skip  # noqa: E501


def test_a_wait_behind_a_busy_device_is_no_loss(now, clock):
    in_flight = [Arriving(now, at=103.0)]

    def waiting():
        now.at += 2  # the device is busy until 103
        yield "hidden"
        now.at += 2  # and idle now
        yield "seen"

    for _ in clock.inputs(waiting(), in_flight):
        pass
    assert (clock.seconds["step"], clock.seconds["input"]) == (2, 2)


def test_compilation_counts_once_and_wherever_it_happens(now, clock):
    def heard(seconds, event=BACKEND):
        jax.monitoring.record_event_duration_secs(event, seconds)

    with clock.during("evaluate"):
        now.at += 3
        heard(2)  # from 101 to 103, inside the next
        now.at += 1
        heard(4, "/jax/core/compile/jaxpr_trace_duration")  # from 100 to 104
        now.at += 2
        heard(1)
        heard(50, "/jax/compilation_cache/compile_time_saved_sec")  # saved, not spent
    assert (clock.seconds["compile"], clock.seconds["evaluate"]) == (5, 1)


def test_the_compiler_of_this_jax_is_heard():
    clock = Goodput()
    jax.jit(lambda x: jnp.cumsum(jnp.sort(x) * 3))(jnp.arange(7.0)).block_until_ready()
    spent = clock.seconds["compile"]
    assert spent > 0.001
    clock.close()
    jax.jit(lambda x: jnp.cumsum(jnp.sort(x) * 4))(jnp.arange(7.0)).block_until_ready()
    assert clock.seconds["compile"] == spent


def test_updates_of_one_phase_are_timed_where_their_ends_were_seen(now):
    task, align = {"task": Work(8, 1.0)}, {"align": Work(4, 1.0)}
    found = Pace(ahead=1)
    for ready, work in ((101, task), (103, align), (104, task)):
        found.dispatched(Arriving(now, ready), work)
    # The first end has no beginning; the third is in flight.
    assert [(t.phase, t.seconds, t.work.tokens) for t in found.take()] == [("align", 2, 4)]
    now.at = 110  # the host was away: 104 passed unseen
    found.dispatched(Arriving(now, 112), align)
    found.dispatched(Arriving(now, 115), task)  # waits until 112: began nobody knows when
    assert found.take() == []
    found.dispatched(Arriving(now, 116), task | align)
    assert [(t.phase, t.seconds) for t in found.take()] == [("task", 3)]
    found.settle()  # both in one update: not told apart
    assert found.take() == [] and not found.in_flight


@pytest.mark.slow
def test_phases_are_told_apart_by_turns_of_steps(configure, monkeypatch):
    chip = dataclasses.replace(chips.CHIPS["v5e"], flops=1e12)
    monkeypatch.setattr(metrics, "of_kind", lambda kind: chip)
    config = configure("align.every=step", "train.steps=16", "train.eval_every=0")
    loop.train(config)
    rows = lines(config, "train")
    for name in ("task", "align"):
        timed = [row for row in rows if f"{name}/mfu" in row]
        assert timed, f"no {name} update was seen to end"
        for row in timed:
            assert row[f"{name}/tokens_per_second"] > 0 and 0 < row[f"{name}/mfu"] < 1
    assert all("mfu" in row for row in rows)


def test_phases_of_one_update_are_timed_now_and_then(configure, tmp_path):
    plain = configure("train.steps=4", "train.eval_every=0")
    timed = configure("train.steps=4", "train.eval_every=0", "log.time_every=2",
                      f"output={tmp_path / 'timed'}")  # fmt: skip
    loop.train(plain)
    loop.train(timed)
    speeds = [{"task/tokens_per_second", "align/tokens_per_second"} <= row.keys()
              for row in lines(timed, "train")]  # fmt: skip
    assert speeds == [False, True, False, True]
    assert not any("task/tokens_per_second" in row for row in lines(plain, "train"))
    assert_equal(weights(plain), weights(timed))


def test_a_run_logs_its_goodput_and_traces_what_was_asked(configure, capsys):
    config = configure("log.profile=[3,2]", "train.eval_every=3")
    loop.train(config)
    rows = lines(config, "goodput")
    assert [row["step"] for row in rows] == [3, 6, 6]
    for row in rows:
        assert sum(row[f"goodput/{part}"] for part in PARTS) == pytest.approx(1)
    assert all(rows[-1][f"goodput/{part}"] > 0 for part in PARTS if part != "input")
    assert rows[0]["goodput/seconds"] < rows[-1]["goodput/seconds"]
    assert "compile" in capsys.readouterr().out.splitlines()[-1]
    assert traced(config) == {3, 4}
    listeners = jax._src.monitoring.get_event_duration_listeners()
    assert not any(isinstance(getattr(one, "__self__", None), Goodput) for one in listeners)


def traced(config):
    """The updates in the trace."""
    files = list(Path(config.output, "profile").rglob("*.xplane.pb"))
    assert len(files) == 1
    found = set()
    for plane in jax.profiler.ProfileData.from_file(str(files[0])).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name.startswith("update"):
                    found.add(dict(event.stats).get("step_num"))
    return found


def test_a_trace_is_closed_when_the_run_dies(configure, monkeypatch):
    config = configure("log.profile=[2,100]")
    real = loop._batches

    def dying(run, start):
        for number, item in enumerate(real(run, start)):
            if number == 3:
                raise KeyError("a broken row")
            yield item

    monkeypatch.setattr(loop, "_batches", dying)
    with pytest.raises(KeyError):
        loop.train(config)
    assert traced(config) == {2, 3}
    with pytest.raises(RuntimeError, match="No profile started"):
        jax.profiler.stop_trace()


@pytest.mark.parametrize("given", ["3", "0:2", "3:0", "a:b", "3:", "1:2:3", "1.5:2"])
def test_bad_windows_are_refused(given, capsys):
    assert cli.main(["train", "own.yaml", "--profile", given]) == 2
    assert f"--profile: '{given}' should be START:N" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["[3]", "[0,2]", "[3,0]", "[1,2,3]"])
def test_bad_windows_in_settings_are_refused(given):
    with pytest.raises(UserError, match=r"log\.profile.*(as in \[10,3\]|1 or more)"):
        load(None, [f"log.profile={given}"])


def test_the_command_line_window_is_the_setting():
    assert load(None, profile_words("10:3")).config.log.profile == [10, 3]
    assert load(None, profile_words("")).config.log.profile == []


def break_step(monkeypatch, message):
    real = loop.prepare

    def broken(config, *scores):
        run = real(config, *scores)

        def gradient(*_):
            raise jax.errors.JaxRuntimeError(message)

        return dataclasses.replace(run, step=dataclasses.replace(run.step, gradient=gradient))

    monkeypatch.setattr(loop, "prepare", broken)


def test_a_full_device_is_told_and_profiled(configure, monkeypatch):
    config = configure()
    break_step(monkeypatch, "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")
    says = (
        r"out of device memory \(\d+ x cpu.*\), 17179869184 bytes were requested: .*batch\.size.*"
        r"batch\.accumulate.*model\.remat=full.*mesh\.fsdp.*model\.quantize=int8.*jaxalign plan"
    )
    with pytest.raises(UserError, match=says) as told:
        loop.train(config)
    profile = Path(config.output, "memory.prof")
    assert str(profile) in str(told.value)
    assert gzip.decompress(profile.read_bytes())


def test_other_failures_of_the_device_stay_what_they_are(configure, monkeypatch):
    break_step(monkeypatch, "INTERNAL: a broken cable")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a broken cable"):
        loop.train(configure())


PROGRAMS = ("gradient_step", "zeros_step", "add_step", "mean_step", "apply_step")


def test_programs_compiled_ahead_are_not_compiled_again(configure, monkeypatch):
    """Turns of three micro-batches, 2 + 1, then 1 + 2: of task rows of two lengths, each by itself,
    of pairs of one length, stacked."""
    compiled, before, lengths = [], [], set()

    def hear(event, seconds, fun_name="", **_):
        if event == BACKEND:
            compiled.extend(n for n in PROGRAMS if n in fun_name)

    real_warm_up, real_batches = warm.warm_up, loop._batches

    def warm_up(run, state, key):
        assert compiled == []
        took = real_warm_up(run, state, key)
        before.extend(compiled)
        return took

    def batches(run, start):
        for item in real_batches(run, start):
            lengths.add(tuple(one.tokens.shape[2] for one in item[0]["task"]))
            yield item

    monkeypatch.setattr(loop, "warm_up", warm_up)
    monkeypatch.setattr(loop, "_batches", batches)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        loop.train(
            configure(
                *("train.warm_up=ahead", "train.steps=8", "train.eval_every=0", "task.valid=[]"),
                *("batch.accumulate=3", "batch.size=2", "batch.pairs=2", "align.group=2"),
                *("batch.buckets=[48,128]", "align.valid=[]", "lora.targets=[q]"),
            )
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert len(lengths) >= 3, "too few shapes came to prove anything"
    counts = {"gradient_step": 2, "zeros_step": 1, "add_step": 2, "mean_step": 2, "apply_step": 2}
    assert {name: before.count(name) for name in PROGRAMS} == counts
    assert compiled == before
