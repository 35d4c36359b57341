"""`output: gs://bucket/run` against an emulator of Google Cloud Storage on this machine."""

import dataclasses
import json
import os

import pytest

from jaxalign import cli
from jaxalign.errors import UserError
from jaxalign.paths import Desk, check_local
from jaxalign.train import loop
from tests.train.test_loop import Killed, assert_equal, kill_after, use_devices, weights


def names(bucket, folder):
    return {name.removeprefix(f"bucket/{folder}/") for name in bucket.find(f"bucket/{folder}")}


def read_log(bucket, folder):
    return [json.loads(line) for line in bucket.cat(f"bucket/{folder}/log.jsonl").splitlines()]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_in_a_folder(bucket, configure, monkeypatch, tmp_path):
    use_devices(monkeypatch, 1)
    local = configure()
    loop.train(local)
    config = configure("output=gs://bucket/run")
    monkeypatch.chdir(tmp_path)
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        loop.train(config)
    # What a dying run can still send.
    assert {"config.yaml", "log.jsonl"} <= names(bucket, "run")
    assert not any(name.startswith("adapter/") for name in names(bucket, "run"))
    monkeypatch.undo()
    use_devices(monkeypatch, 1)
    monkeypatch.chdir(tmp_path)
    result = loop.train(config)
    assert result.step == 6 and result.adapter == "gs://bucket/run/adapter"
    updates = [row["step"] for row in read_log(bucket, "run") if row["event"] == "train"]
    assert updates == [1, 2, 3, 4, 5, 6]
    steps = {name.split("/")[1] for name in names(bucket, "run") if name.startswith("checkpoints/")}
    # The save of step 3 may have died with the run: best/3, as far as it, is gone on from then, and
    # no checkpoint is written twice at one step.
    assert "6" in steps and steps <= {"3", "6"}
    before = {name: bucket.cat(f"bucket/run/{name}") for name in names(bucket, "run")}
    again = loop.train(config)
    assert again.repeated and again.step == 6
    assert {name: bucket.cat(f"bucket/run/{name}") for name in names(bucket, "run")} == before
    # What is damaged there is set aside there.
    bucket.rm("bucket/run/result.json")
    for name in before:
        if name.startswith(("checkpoints/6/state/d/", "best/6/state/d/")):
            bucket.pipe(f"bucket/run/{name}", before[name][:40])
    assert loop.train(config).step == 6
    assert any(name.startswith("damaged/checkpoints-6/") for name in names(bucket, "run"))
    assert any(name.startswith("checkpoints/6/") for name in names(bucket, "run"))
    fetched = tmp_path / "fetched"
    bucket.get("bucket/run/adapter", str(fetched / "adapter"), recursive=True)
    assert_equal(weights(local), weights(dataclasses.replace(local, output=str(fetched))))
    assert "gs:" not in os.listdir(tmp_path)


def test_base_and_adapter_are_read_where_they_are(bucket, configure, base, monkeypatch, tmp_path):
    use_devices(monkeypatch, 1)
    monkeypatch.chdir(tmp_path)
    bucket.put(f"{base}/", "bucket/base/", recursive=True)
    result = loop.train(configure("model.path=gs://bucket/base", "train.steps=2"))
    bucket.put(f"{result.adapter}/", "bucket/short/adapter/", recursive=True)
    (tmp_path / "own.yaml").write_text("model: {path: gs://bucket/base, dtype: float32}\n")
    words = ["own.yaml", "generate.max_new_tokens=4", "--prompt", "Wake me"]
    for adapter in ("gs://bucket/short/adapter", "gs://bucket/short/adapter/"):
        assert cli.main(["generate", *words, "--adapter", adapter]) == 0
    assert "gs:" not in os.listdir(tmp_path)


def test_files_are_sent_when_they_changed_and_the_marker_last(bucket, monkeypatch):
    sent = []
    from jaxalign import paths

    real = paths._put
    monkeypatch.setattr(
        paths, "_put", lambda file, target: (sent.append(file.name), real(file, target))
    )
    with Desk("gs://bucket/desk/") as desk:
        assert desk.output == "gs://bucket/desk"
        (desk.folder / "log.jsonl").write_text("1\n")
        (desk.folder / "adapter").mkdir()
        (desk.folder / "adapter" / "adapter_config.json").write_text("{}")
        (desk.folder / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 100)
        assert desk.publish() and desk.publish()
        with (desk.folder / "log.jsonl").open("a") as file:
            file.write("2\n")
        kept = desk.folder
    assert sent == ["adapter_model.safetensors", "log.jsonl", "adapter_config.json", "log.jsonl"]
    assert not kept.exists()
    assert bucket.cat("bucket/desk/log.jsonl") == b"1\n2\n"
    with Desk("gs://bucket/desk") as again:  # a process that writes no log sends none back
        assert (again.folder / "log.jsonl").read_text() == "1\n2\n"
    assert len(sent) == 4


def test_a_bucket_that_does_not_answer_costs_no_training(bucket, monkeypatch, capsys):
    from jaxalign import paths

    def gone(file, target):
        raise ConnectionError("unreachable")

    desk = Desk("gs://bucket/gone")
    (desk.folder / "log.jsonl").write_text("1\n")
    monkeypatch.setattr(paths, "_put", gone)
    assert not desk.publish()
    assert "log.jsonl could not be written (ConnectionError" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"it is in .* on this machine"), desk:
        pass
    assert (desk.folder / "log.jsonl").exists()


def test_a_folder_is_its_own_desk(tmp_path):
    with Desk(str(tmp_path / "run")) as desk:
        assert desk.folder == tmp_path / "run" and desk.publish()


def test_what_cannot_work_is_refused_at_once(bucket, monkeypatch):
    with pytest.raises(UserError, match="s3://b/x is unknown here; name a folder, or gs://"):
        Desk("s3://b/x")
    with pytest.raises(UserError, match="names no folder in the bucket"):
        Desk("gs://bucket")
    with pytest.raises(UserError, match="output: gs://absent/run cannot be written"):
        Desk("gs://absent/run")
    from jaxalign import paths

    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gcsfs is missing; .*'jaxalign\[gcs\]'"):
        Desk("gs://bucket/run")


@pytest.mark.parametrize(
    "words",
    [
        ("probe", "model", "--parallel", "x", "--out", "gs://b/probe"),
        ("demo", "--out", "gs://b/demo"),
        ("merge", "a", "b", "--out", "gs://b/merged"),
    ],
)
def test_other_commands_write_to_folders(words, capsys):
    assert cli.main([*words]) == 2
    assert "is in the cloud, where only `jaxalign train` writes" in capsys.readouterr().err


def test_answers_need_a_folder_beside_a_run_in_a_bucket(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text("output: gs://bucket/run\n")
    for command in ("evaluate", "generate"):
        assert cli.main([command, str(file)]) == 2
        assert "--out: gs://bucket/run" in capsys.readouterr().err
    assert check_local("runs/x", "--out") == "runs/x"
