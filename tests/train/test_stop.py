"""Stopping on request: what is saved, when it is noticed, and what the shell is told."""

import os
import signal
import threading
from pathlib import Path

import pytest

from jaxalign.cli import main
from jaxalign.config import to_yaml
from jaxalign.interrupts import heard_interrupts
from jaxalign.train import loop
from jaxalign.train.finish import Result
from jaxalign.train.loop import train
from jaxalign.train.stop import Request, stop_signal
from jaxalign.train.stored import Place, local_places, read_meta
from tests.tiny import few
from tests.train.test_loop import assert_equal, lines, use_devices, weights
from tests.train.test_resume import FAST


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture(autouse=True)
def interruptible():
    """A shell hands SIGINT to its background jobs as ignored, and so to tests that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def at_batch(monkeypatch, number, action):
    """Does something when the `number`-th update's batch is asked for."""
    real = loop._batches

    def batches(run, start):
        for count, item in enumerate(real(run, start), start + 1):
            if count == number:
                action()
            yield item

    monkeypatch.setattr(loop, "_batches", batches)


@pytest.mark.parametrize(
    ("number", "stopped", "code"),
    few(
        [(signal.SIGINT, "interrupt", 130), (signal.SIGTERM, "signal", 143)],
        (signal.SIGTERM, "signal", 143),
    ),
)
def test_either_signal_saves_and_the_same_command_goes_on(
    configure, monkeypatch, number, stopped, code, capfd
):
    whole = configure(*FAST)
    train(whole)
    config = configure(*FAST, "checkpoint.every=1000", f"output={whole.output}_parted")
    at_batch(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    result = train(config)
    assert (result.step, result.stopped, result.exit_code) == (3, stopped, code)
    assert result.sentence == "stopped on request at step 3; the same command goes on from there"
    assert Path(config.output, "checkpoints", "3").is_dir()
    # Half a run hands nothing over, and is not recorded as one that is over.
    assert not Path(config.output, "adapter").exists()
    assert not Path(config.output, "result.json").exists()
    assert ("Ctrl-C once more stops at once" in capfd.readouterr().err) == (stopped == "interrupt")
    monkeypatch.undo()
    use_devices(monkeypatch, 1)
    assert train(config).exit_code == 0
    assert_equal(weights(config), weights(whole))
    assert [row["step"] for row in lines(config, "train")] == [1, 2, 3, 4]


def test_a_second_ctrl_c_stops_at_once(configure, monkeypatch, tmp_path, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_batch(monkeypatch, 3, twice)
    file = tmp_path / "own.yaml"
    file.write_text(to_yaml(configure(*FAST)), "utf-8")
    assert main(["train", str(file)]) == 130
    assert (
        "interrupted; the same command goes on from the last checkpoint" in capsys.readouterr().err
    )


def test_an_interrupt_inside_a_callback_is_not_lost():
    """Python forgets what the garbage collector's callbacks raise."""
    import time
    import weakref

    class Thing:
        pass

    def callback(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), heard_interrupts():
        thing = Thing()
        kept = weakref.ref(thing, callback)
        del thing
        assert kept() is None
        time.sleep(5)


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signal() as asked:
        assert signal.getsignal(signal.SIGTERM) == asked.hear
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    found = []
    thread = threading.Thread(target=lambda: found.extend(_asked_elsewhere()))
    thread.start()
    thread.join()
    assert found == [False]


def _asked_elsewhere():
    with stop_signal() as asked:  # not the main thread: signals are the caller's
        yield asked(1)


def test_the_checkpoint_comes_before_the_validation_which_can_be_left(configure, monkeypatch):
    """A machine that goes away in the middle of a validation: its update is on disk already."""
    config = configure(*FAST, "train.eval_batches=3", "train.eval_every=2", "checkpoint.every=2")
    whole = configure(*FAST, "train.eval_batches=3", f"output={config.output}_whole")
    train(whole)
    seen = []
    real = Request.leave

    def leave(self, step):
        seen.append((step, [place.name for place in local_places(config.output)]))
        if len(seen) == 2:  # between the second step's first and second batch
            self.hear(signal.SIGTERM)
        real(self, step)

    monkeypatch.setattr(Request, "leave", leave)
    result = train(config)
    assert (result.step, result.stopped) == (2, "signal")
    assert [step for step, _ in seen] == [2, 2]
    assert lines(config, "eval") == []
    assert read_meta(Place(config.output, "checkpoints", 2))["evaluated"] is False
    monkeypatch.undo()
    use_devices(monkeypatch, 1)
    result = train(config)
    assert result.exit_code == 0
    assert [row["step"] for row in lines(config, "eval")] == [2, 4]
    assert [row["eval/loss"] for row in lines(config, "eval")] == [
        row["eval/loss"] for row in lines(whole, "eval")
    ]
    assert_equal(weights(config), weights(whole))


def test_what_each_end_is_called():
    ends = {
        stopped: Result("out/adapter", 5, None, stopped=stopped)
        for stopped in ("finished", "patience", "signal", "interrupt")
    }
    assert {name: end.exit_code for name, end in ends.items()} == {
        "finished": 0, "patience": 0, "signal": 143, "interrupt": 130,
    }  # fmt: skip
    assert ends["patience"].sentence == "stopped early at step 5; written: out/adapter"
    repeated = Result("out/adapter", 5, None, stopped="patience", repeated=True)
    assert "raise train.patience to continue" in repeated.sentence
