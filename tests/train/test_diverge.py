"""A run that diverges: it ends as one, says why, and hands over nothing that is not finite."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import cli
from jaxalign.model.decoder import Decoder
from jaxalign.objectives import Loss
from jaxalign.train import loop
from jaxalign.train.loop import train
from jaxalign.train.resume import Progress
from jaxalign.train.stored import local_places
from tests.tiny import SPEC
from tests.train.test_loop import lines, use_devices

ALONE = ("align.weight=0", "align.train=[]", "align.valid=[]")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def kept(config):
    return [place.name for place in local_places(config.output)]


def test_a_learning_rate_that_destroys_everything(configure):
    config = configure("optim.learning_rate=1e30", "checkpoint.every=1", "train.eval_every=1",
                       "train.steps=20", "train.patience=0", *ALONE)  # fmt: skip
    result = train(config)
    assert (result.stopped, result.exit_code, result.step) == ("diverged", 1, 6)
    assert result.sentence == (
        "diverged: 5 updates in a row were skipped, from update 2 on: no task row has finite "
        "states; no checkpoint is kept; lower optim.learning_rate in another output, or try "
        "model.dtype=float32"
    )
    assert kept(config) == [] and not Path(config.output, "adapter").exists()
    rows = lines(config, "train")
    assert [row["skipped"] for row in rows] == [0] + [1] * (len(rows) - 1)
    assert [row["step"] for row in lines(config, "skipped")] == [2, 3, 4, 5, 6]
    assert all(row["eval/loss"] is None for row in lines(config, "eval"))
    assert (result.best_step, result.metrics) == (None, {})


@pytest.mark.parametrize("valid", ["", "task.valid=[]"])
def test_the_last_update_destroys_everything(configure, valid):
    """No update comes after it, and perhaps no validation: the weights are looked at anyway."""
    words = ("optim.learning_rate=1e30", "train.steps=1", *ALONE, *([valid] if valid else []))
    config = configure(*words)
    result = train(config)
    assert (result.stopped, result.exit_code) == ("diverged", 1)
    assert ("after update 1" if valid else "no validation had finite") in result.sentence
    assert kept(config) == [] and not Path(config.output, "adapter").exists()


def poisoned(monkeypatch, *numbers):
    """Rows with these numbers hold a token without a finite embedding."""
    token, real, embed = SPEC.vocab - 1, loop.put_batch, Decoder.embed

    def poison(batch):
        bad = np.isin(batch.rows, numbers).any(-1)[..., None]
        return batch._replace(tokens=np.where(bad, token, batch.tokens).astype(np.int32))

    def put(mesh, batch, **options):
        return real(mesh, {"task": poison(batch["task"])}, **options)

    def put_nan(self, params, tokens):
        return jnp.where((tokens == token)[..., None], jnp.nan, embed(self, params, tokens))

    monkeypatch.setattr(loop, "put_batch", put)
    monkeypatch.setattr(Decoder, "embed", put_nan)


def test_rows_that_are_not_finite_are_named(configure, monkeypatch, rows):
    poisoned(monkeypatch, 3)
    config = configure(*ALONE, "train.steps=4")  # 64 rows: all of them once
    result = train(config)
    assert result.stopped == "finished"
    (skipped,) = lines(config, "skipped")
    assert skipped["why"].endswith(f"states of task rows are not finite: {rows}/task.jsonl:4")
    assert sum(row["skipped"] for row in lines(config, "train")) == 1
    (number,) = (row["step"] for row in lines(config, "train") if row["skipped"])
    assert skipped["step"] == number


def test_rows_alone_do_not_condemn_the_weights(configure, monkeypatch):
    """Every update has such a row: the run ends, and the state, which is sound, is kept."""
    poisoned(monkeypatch, *range(0, 64, 2))
    config = configure(*ALONE, "train.max_skipped=2", "train.steps=9", "train.eval_every=0",
                       "checkpoint.every=1000")  # fmt: skip
    result = train(config)
    assert (result.stopped, result.step) == ("diverged", 4)
    assert "task.jsonl:13, " in result.sentence and " and 4 more; step 4" in result.sentence
    assert "step 4 is kept; look at these rows" in result.sentence
    assert "checkpoints/4" in kept(config)


def without_slope(states, batch):
    """The usual slip: a norm of 0 has no slope."""
    (source,) = states.source.taps.values()
    lost = jnp.sum(jnp.linalg.norm(source - source, axis=-1))
    return Loss(lost, jnp.float32(len(source)), {})


@pytest.mark.parametrize(("words", "step"), [([], 9), (["train.max_skipped=2"], 6)])
def test_a_phase_that_never_learns_ends_the_run(configure, words, step, capsys):
    """In turns with one that does, no two skipped updates of the run stand in a row."""
    config = configure(f"align.objective={__name__}:without_slope", "align.every=step",
                       "train.steps=9", "train.eval_every=0", *words)  # fmt: skip
    result = train(config)
    assert (result.stopped, result.exit_code, result.step) == ("diverged", 1, step)
    assert "align updates in a row were skipped, from update 2 on" in result.sentence
    said = capsys.readouterr().out  # which rows of a validation are not whole or trained on, too
    assert "align: 64 rows, 2 cut" in said and "align.valid: 64 rows, 2 cut" in said
    assert "align.valid: 64 of 64 rows are in align.train, too" in said
    assert not Path(config.output, "adapter").exists()


def test_what_is_not_finite_is_never_best():
    progress = Progress()
    assert not progress.see(float("nan"), "min", {"eval/loss": float("nan")})
    assert not progress.see(0.0, "max", {"eval/f1": 0.0, "eval/loss": float("inf")})
    assert (progress.best, progress.waited) == (None, 2)
    assert progress.see(3.0, "min", {"eval/loss": 3.0})
    assert not progress.see(float("-inf"), "min", {"eval/loss": float("-inf")})
    assert (progress.best, progress.waited) == (3.0, 1)


@pytest.mark.parametrize("every", ["step", "microbatch"])
def test_no_phase_escapes_the_first_gradient_check(configure, every):
    """With turns by steps the alignment's first update is the run's second."""
    config = configure("align.layer=0", f"align.every={every}", "train.eval_every=0")
    with pytest.raises(cli.UserError, match=r"align: no gradient reaches the adapter"):
        train(config)


def test_blocks_that_are_not_trained_are_no_gradient(configure):
    """Alignment at block 1 with block 3 alone trained: nothing that counts gets a gradient."""
    config = configure("lora.layers=3", "align.layer=1", "train.eval_every=0")
    with pytest.raises(cli.UserError, match=r"align: the first gradient has norm 0\.0"):
        train(config)


def test_the_command_tells_and_fails(configure, tmp_path, capsys):
    from jaxalign.config import to_yaml

    config = configure("optim.learning_rate=1e30", "train.steps=1", *ALONE, "task.valid=[]")
    (tmp_path / "run.yaml").write_text(to_yaml(config), "utf-8")
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 1
    assert "diverged: after update 1" in capsys.readouterr().out
