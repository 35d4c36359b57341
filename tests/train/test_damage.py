"""What was damaged after it was saved is never loaded: the older checkpoint is, or a sentence."""

import collections
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.export.checkpoint import find
from jaxalign.train import loop, setup
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.loop import train
from tests.corrupt import files, sweep
from tests.train.test_loop import assert_equal, lines, use_devices, weights
from tests.train.test_resume import FAST


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return tmp_path_factory.mktemp("damage") / "run"


@pytest.fixture
def trained(configure, shelf):
    """A finished run with the checkpoints 2 and 4 and the best one, 4."""
    config = configure(*FAST)
    if not shelf.exists():
        train(dataclasses.replace(config, output=str(shelf)))
    shutil.copytree(shelf, config.output)
    return config


def furthest(config, run):
    store = Checkpoints(config.output, 2)
    try:
        return store.furthest(run.abstract_state, lambda meta: None)
    finally:
        store.close()


def back(config, shelf):
    shutil.rmtree(config.output)
    shutil.copytree(shelf, config.output)
    shutil.rmtree(Path(config.output, "best"))


def some(folder, flips):
    """All kinds of damage; a quarter of them where it should be quick."""
    return list(sweep(folder, flips))[:: 1 if flips > 100 else 4]


def resume_sweep(config, shelf, flips):
    """What happened, by kind of damage: `same`, `older` or `sentence`; wrong ones are listed."""
    run = setup.prepare(config)
    back(config, shelf)
    truth = {}
    for step in (4, 2):
        found = furthest(config, run)
        assert found.place.step == step and not found.notes
        truth[step] = jax.device_get(found.state), found.meta
        shutil.rmtree(Path(config.output, "checkpoints", str(step)))
    back(config, shelf)
    counts, wrong = collections.Counter(), []
    for alone in (False, True):
        if alone:
            shutil.rmtree(Path(config.output, "checkpoints", "2"))
        for damage in some(Path(config.output, "checkpoints", "4"), flips):
            try:
                with damage:
                    try:
                        found = furthest(config, run)
                        step = found.place.step
                        assert_equal(jax.device_get(found.state), truth[step][0])
                        assert found.meta == truth[step][1]
                        outcome = "same" if step == 4 else "older"
                        assert bool(found.notes) == (outcome == "older")
                        if outcome == "older":
                            aside = Path(config.output, "damaged", "checkpoints-4")
                            aside.rename(Path(config.output, "checkpoints", "4"))
                    except UserError as error:
                        assert "no checkpoint is intact" in str(error) and alone, error
                        outcome = "sentence"
            except Exception as error:
                outcome = "WRONG"
                wrong.append(f"{damage}: {type(error).__name__}: {str(error)[:300]}")
            counts[("alone" if alone else "with an older one", damage.how, outcome)] += 1
    return counts, wrong


def show(title, counts, wrong):
    print(f"\n{title}")
    for key, number in sorted(counts.items()):
        print(f"  {' | '.join(key):50s} {number:5d}")
    print("\n".join(wrong))


SLOW = pytest.param(200, marks=pytest.mark.slow)
# Readers that gave up leave coroutines of Orbax behind, which Python speaks of.
QUIET = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@QUIET
@pytest.mark.parametrize("flips", [24, SLOW])
def test_no_damaged_checkpoint_is_gone_on_from(trained, shelf, flips):
    counts, wrong = resume_sweep(trained, shelf, flips)
    show("resume", counts, wrong)
    assert not wrong


@QUIET
@pytest.mark.parametrize("flips", [16, SLOW])
def test_no_damaged_checkpoint_is_exported(trained, flips):
    whole = find(trained.output, "4")
    truth, meta = whole.tree(), whole.meta
    counts, wrong = collections.Counter(), []
    for damage in some(Path(trained.output, "checkpoints", "4"), flips):
        with damage:
            try:
                found = find(trained.output, "4")
                assert found.meta == meta
                assert_equal(found.tree(), truth)
                outcome = "same"
            except UserError as error:
                assert "is damaged" in str(error) or "no checkpoint" in str(error), error
                outcome = "sentence"
            except Exception as error:
                outcome = "WRONG"
                wrong.append(f"{damage}: {type(error).__name__}: {str(error)[:300]}")
        counts[damage.how, outcome] += 1
    show("export", counts, wrong)
    assert not wrong


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@QUIET
def test_a_run_goes_on_from_the_older_one_and_saves_there_again(trained, shelf, capsys):
    whole = weights(trained)
    (Path(trained.output) / "result.json").unlink()
    shutil.rmtree(Path(trained.output, "best"))
    four = Path(trained.output, "checkpoints", "4")
    flip(largest(four / "state"))
    capsys.readouterr()
    result = train(trained)
    told = capsys.readouterr().out
    assert "checkpoint checkpoints/4 is damaged (" in told
    assert "was moved to damaged/checkpoints-4; going on from checkpoints/2" in told
    assert result.step == 4 and not result.repeated
    assert_equal(weights(trained), whole)
    assert [row["step"] for row in lines(trained, "train")] == [1, 2, 3, 4]
    assert four.is_dir() and Path(trained.output, "damaged", "checkpoints-4").is_dir()
    # Once more at the same step: the older damaged one is not overwritten.
    flip(largest(four / "state"))
    (Path(trained.output) / "result.json").unlink()
    shutil.rmtree(Path(trained.output, "best"))
    train(trained)
    assert Path(trained.output, "damaged", "checkpoints-4-2").is_dir()


@QUIET
def test_a_damaged_run_never_begins_anew(trained):
    (Path(trained.output) / "result.json").unlink()
    for path in files(Path(trained.output)):
        if path.name == "metadata":  # of every checkpoint
            path.write_bytes(path.read_bytes()[:-40])
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint is intact \(best/4: .*; checkpoints/4"):
            train(trained)
    assert not Path(trained.output, "damaged").exists()


@QUIET
def test_damaged_best_weights_are_not_replaced_by_others(configure, monkeypatch, capsys):
    """Step 2 is the best; its regular checkpoint serves while it is kept, then nothing does."""
    monkeypatch.setattr(loop, "validate", lambda _, state: {"eval/loss": float(state.step)})
    config = configure(*FAST)
    train(config)
    whole = weights(config)
    record, adapter = (Path(config.output) / name for name in ("result.json", "adapter"))
    for path in files(Path(config.output, "best", "2")):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    record.unlink()
    shutil.rmtree(adapter)
    assert train(config).best_step == 2
    assert_equal(weights(config), whole)
    record.unlink()
    shutil.rmtree(adapter)
    shutil.rmtree(Path(config.output, "checkpoints", "2"))
    told = (
        r"the best weights \(step 2\) cannot be handed over \(best/2: .*; checkpoints/2 is missing"
    )
    with pytest.raises(UserError, match=told):
        train(config)
    assert not adapter.exists() and not record.exists()


def test_a_record_that_is_damaged_says_nothing(trained):
    record = Path(trained.output, "result.json")
    content = record.read_text("utf-8")
    for text in (content.replace('"step": 4', '"step": 9'), content[:50], "", "[]", "\udcff"):
        record.write_text(text, "utf-8", "surrogateescape")
        result = train(trained)
        assert result.step == 4 and not result.repeated
    assert train(trained).repeated


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_every_single_bit_counts(dtype):
    import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)

    from jaxalign.train.sums import host_sum

    array = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(dtype)
    sums = {host_sum(array)}
    bits = 8 * array.nbytes if dtype != "bool" else array.size
    for bit in range(bits):
        changed = array.copy()
        content = changed.view(np.uint8).reshape(-1)
        if dtype == "bool":
            content[bit] ^= 1
        else:
            content[bit // 8] ^= 1 << bit % 8
        found = host_sum(changed)
        assert found.startswith(f"{dtype}[3,4,5]:")
        sums.add(found)
    assert len(sums) == bits + 1
    lanes = [{text.partition(":")[2][half] for text in sums} for half in (slice(8), slice(8, 16))]
    # A single change always shows in both lanes; two different ones may meet by chance.
    assert all(len(lane) > bits * 0.99 for lane in lanes)


def test_places_count_as_well():
    from jaxalign.train.sums import host_sum

    array = np.zeros((4, 6), np.float32)
    array[1, 2] = 1.0
    assert host_sum(array) != host_sum(array.T) != host_sum(array.reshape(6, 4))
    assert host_sum(array) != host_sum(np.roll(array, 1))
    assert host_sum(np.zeros((0, 3), np.float32)) == "float32[0,3]:0000000000000000"


def test_any_mesh_gives_the_same_sums():
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxalign.sharding import make_mesh
    from jaxalign.train.sums import array_sums, host_sum

    array = np.random.default_rng(1).standard_normal((8, 4, 6)).astype(np.float32)
    expected = host_sum(array)
    for sizes in ((1, 8, 1), (2, 2, 2), (8, 1, 1)):
        mesh = make_mesh(*sizes)
        for axes in ((), ("fsdp",), (("data", "fsdp"), "tensor")):
            placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
            assert array_sums({"x": {"y": placed}}) == {"x/y": expected}


@pytest.mark.slow
def test_all_processes_go_on_from_the_same_checkpoint(configure, tmp_path):
    """Two processes, whose arrays are split: what one cannot read, none goes on from."""
    from tests.train.test_processes import finish
    from tests.train.test_processes import train as together

    whole, parted = (
        configure(*FAST, "mesh.fsdp=4", f"output={tmp_path / name}") for name in ("whole", "parted")
    )
    outputs = finish(together([whole, whole], tmp_path, devices=2))
    assert "finished at step 4; written" in outputs[0]
    shutil.copytree(whole.output, parted.output)
    shutil.rmtree(Path(parted.output, "best"))
    Path(parted.output, "result.json").unlink()
    for path in files(Path(parted.output, "checkpoints", "4", "state")):
        if "process_1" in str(path):  # what the second process wrote
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    outputs = finish(together([parted, parted], tmp_path, devices=2))
    assert "checkpoints/4 is damaged" in outputs[0]
    assert "going on from checkpoints/2" in outputs[0]
    assert_equal(weights(parted), weights(whole))
    # All damaged: both say it and leave.
    shutil.rmtree(Path(parted.output, "best"))
    Path(parted.output, "result.json").unlink()
    for path in files(Path(parted.output, "checkpoints")):
        if path.name == "metadata":
            path.write_bytes(b"{}")
    outputs = finish(together([parted, parted], tmp_path, devices=2), code=1)  # with --debug
    assert all("no checkpoint is intact" in output for output in outputs)
    # A finished run is one for both.
    outputs = finish(together([whole, whole], tmp_path, devices=2))
    assert "nothing was trained or changed" in outputs[0]
