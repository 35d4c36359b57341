"""launch/tpu against a stand-in of gcloud: what it calls, in which order, in every state."""

import shlex
import tarfile
from pathlib import Path

import pytest

BASE = ("--name", "align", "--zone", "us-west4-a")
RUN = (*BASE, "--accelerator", "v5litepod-16", "--bucket", "gs://my-bucket", "--poll", "0")
WORDS = ("--", "train", "own.yaml", "align.layer=16")
QR = ["compute", "tpus", "queued-resources"]
HERE = "--zone=us-west4-a"
ALL = ["--worker=all", "--node=all"]


def verbs(calls):
    """`create`, `describe`, ...; of ssh the worker's action."""
    assert all(call["program"] == "gcloud" and call["argv"][:3] == QR for call in calls)
    found = []
    for call in calls:
        verb = call["argv"][3]
        if verb == "ssh":
            verb = command(call).split()[2]
        found.append(verb)
    return found


def command(call):
    return next(a for a in call["argv"] if a.startswith("--command=")).removeprefix("--command=")


def one_sentence(done, code):
    assert done.returncode == code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("launch/tpu: ")
    return last


def test_from_nothing_to_a_finished_run(stand_ins, work):
    stand_ins.tell(states=["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert done.returncode == 0, done.stderr
    assert "a line of the log" in done.stdout
    assert "costs money" in done.stderr and "launch/tpu delete --name align" in done.stderr
    calls = stand_ins.calls()
    looks = ["describe"] * 3
    assert verbs(calls) == ["describe", "create", *looks, "scp", "setup", "start", "follow"]
    assert calls[0]["argv"][3:] == ["describe", "align", HERE, "--format=value(state.state)"]
    assert calls[1]["argv"][3:] == [
        *("create", "align", HERE, "--accelerator-type=v5litepod-16"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--node-id=align"),
    ]
    scp, setup, start, follow = (call["argv"][4:] for call in calls[-4:])
    assert [Path(source).name for source in scp[:2]] == ["bundle.tar.gz", "tpu_worker"]
    assert scp[2:] == ["align:", HERE, *ALL]
    assert setup == ["align", HERE, *ALL, "--command=bash tpu_worker setup my-bucket"]
    words = "train run/own.yaml align.layer=16 output=/mnt/bucket/align"
    assert start == ["align", HERE, *ALL, f"--command=bash tpu_worker start v5e {words}"]
    first = ["--worker=0", "--node=0"]
    assert follow == ["align", HERE, *first, "--command=bash tpu_worker follow"]


@pytest.mark.parametrize("ended", ["SUSPENDED", "FAILED"])
def test_a_preempted_request_is_deleted_made_anew_and_runs_the_same(stand_ins, work, ended):
    stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    before = stand_ins.calls()
    assert "create" not in verbs(before)
    stand_ins.tell(states=[ended, "WAITING_FOR_RESOURCES", "ACTIVE"])
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert done.returncode == 0, done.stderr
    after = stand_ins.calls()
    order = ["describe", "delete", "create", "describe", "describe"]
    assert verbs(after) == [*order, "scp", "setup", "start", "follow"]
    assert after[1]["argv"][3:] == ["delete", "align", HERE, "--force", "--quiet"]
    assert command(after[-2]) == command(before[-2])


def test_suspending_is_waited_for(stand_ins, work):
    stand_ins.tell(states=["SUSPENDING", "SUSPENDING", "SUSPENDED", "ACTIVE"])
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert done.returncode == 0
    assert verbs(stand_ins.calls())[:6] == [*["describe"] * 3, "delete", "create", "describe"]


def test_taken_away_during_the_run(stand_ins, work):
    stand_ins.tell(states=["ACTIVE", "SUSPENDED"], ends=["lost", "0"])
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert "the same command makes it anew and resumes" in one_sentence(done, 75)
    assert verbs(stand_ins.calls())[-2:] == ["follow", "describe"]

    stand_ins.tell(states=["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"], ends=["lost", "0"])
    done = stand_ins.run("tpu", "run", *RUN, "--restarts", "1", *WORDS, cwd=work)
    assert done.returncode == 0, done.stderr
    calls = stand_ins.calls()
    once = ["scp", "setup", "start", "follow"]
    again = ["describe", "describe", "delete", "create", "describe"]
    assert verbs(calls) == ["describe", *once, *again, *once]
    starts = [command(call) for call in calls if "ssh" in call["argv"]][1::3]
    assert len(starts) == 2 and starts[0] == starts[1]


def test_a_request_that_cannot_be_filled_is_not_made_again_and_again(stand_ins, work):
    stand_ins.tell(states=["ABSENT", "FAILED"])
    done = stand_ins.run("tpu", "run", *RUN, "--restarts", "5", *WORDS, cwd=work)
    assert "the request failed; why:" in one_sentence(done, 1)
    assert verbs(stand_ins.calls()) == ["describe", "create", "describe"]


def test_a_lost_connection_is_no_preemption(stand_ins, work):
    once = ["follow", *["describe"] * 3]
    stand_ins.tell(states="ACTIVE", ends=["lost", "lost", "0"])
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert done.returncode == 0, done.stderr
    assert verbs(stand_ins.calls())[4:] == [*once, *once, "follow"]

    stand_ins.tell(ends="lost")
    done = stand_ins.run("tpu", "run", *RUN, "--restarts", "5", *WORDS, cwd=work)
    assert "the same command follows it again" in one_sentence(done, 1)
    assert verbs(stand_ins.calls())[4:] == 5 * once


def test_a_run_ended_by_the_preemption_is_no_failure(stand_ins, work):
    """The state changes only after the run was asked to stop."""
    for ended in ("143", "1"):
        stand_ins.tell(states=["ACTIVE", "ACTIVE", "SUSPENDING"], ends=ended)
        done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
        assert "was taken away (SUSPENDING)" in one_sentence(done, 75)
        stand_ins.calls()
    stand_ins.tell(states="ACTIVE", ends="143")
    done = stand_ins.run("tpu", "run", *RUN, "--restarts", "3", *WORDS, cwd=work)
    assert "the run was stopped; the same command resumes it" in one_sentence(done, 1)
    assert "delete" not in verbs(stand_ins.calls())


def test_a_step_that_fails(stand_ins, work):
    """With the TPU there it is told at once; with the TPU gone it was the preemption."""
    (stand_ins.folder / "workers" / "0").mkdir()
    (stand_ins.folder / "bin" / "sha256sum").write_text("#!/bin/sh\nexit 1\n")
    (stand_ins.folder / "bin" / "sha256sum").chmod(0o755)
    stand_ins.tell(states="ACTIVE")
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert "a step failed, see above" in one_sentence(done, 1)
    stand_ins.tell(states=["ACTIVE", "SUSPENDED"])
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert "was taken away (SUSPENDED)" in one_sentence(done, 75)


def test_after_the_run(stand_ins, work):
    done = stand_ins.run("tpu", "run", *RUN, "--when-done", "delete", *WORDS, cwd=work)
    assert done.returncode == 0
    assert verbs(stand_ins.calls())[-1] == "delete"
    stand_ins.tell(ends="2")
    done = stand_ins.run("tpu", "run", *RUN, "--when-done", "delete", *WORDS, cwd=work)
    assert "ended with exit code 2" in one_sentence(done, 1)
    assert "delete" not in verbs(stand_ins.calls())


def test_every_kind_of_request(stand_ins, work):
    more = ("--slices=2", "--capacity", "spot", "--valid-until", "6h", "--gcloud=--internal-ips")
    more += ("--service-account", "a@b.iam", "--project", "p")
    for kind, runtime in (
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ):
        stand_ins.tell(states=["ABSENT", "ACTIVE"])
        words = (*BASE, "--accelerator", kind, "--poll", "0", *more)
        assert stand_ins.run("tpu", "create", *words, cwd=work).returncode == 0
        calls = stand_ins.calls()
        assert verbs(calls) == ["describe", "create", "describe"]
        assert calls[1]["argv"][4:] == [
            *("align", HERE, "--project=p", f"--accelerator-type={kind}"),
            *(f"--runtime-version={runtime}", "--node-count=2", "--node-prefix=align", "--spot"),
            *("--valid-until-duration=6h", "--service-account=a@b.iam", "--internal-ips"),
        ]
    stand_ins.tell(states=["ABSENT", "ACTIVE"])
    words = (*BASE, "--accelerator", "v6e-8", "--capacity", "reserved", "--poll", "0")
    stand_ins.run("tpu", "create", *words, cwd=work)
    assert stand_ins.calls()[1]["argv"][-1] == "--reserved"


def test_single_steps(stand_ins, work):
    for action, verb in (("logs", "follow"), ("stop", "stop"), ("status", "describe")):
        assert stand_ins.run("tpu", action, *BASE, cwd=work).returncode == 0
        assert verbs(stand_ins.calls()) == [verb]
    assert stand_ins.run("tpu", "delete", *BASE, cwd=work).returncode == 0
    assert verbs(stand_ins.calls()) == ["delete"]
    assert stand_ins.run("tpu", "setup", *BASE, cwd=work).returncode == 0
    assert verbs(stand_ins.calls()) == ["scp", "setup"]
    stand_ins.run("tpu", "each", *BASE, "--", "df -h | tail", cwd=work)
    assert command(stand_ins.calls()[0]) == "df -h | tail"


def test_dry_run_runs_nothing(stand_ins, work):
    done = stand_ins.run("tpu", "run", *RUN, "--dry-run", *WORDS, "prompt.system=a b", cwd=work)
    assert done.returncode == 0
    assert stand_ins.calls() == []
    printed = [line[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]
    argv = [shlex.split(line) for line in printed]
    assert all(words[:4] == ["gcloud", *QR] for words in argv)
    assert [words[4] for words in argv] == [
        *("describe", "delete", "create", "scp", "ssh", "ssh", "ssh")
    ]
    remote = argv[5][-1].removeprefix("--command=")
    assert shlex.split(remote)[-3:] == ["align.layer=16", "prompt.system=a b",
                                        "output=/mnt/bucket/align"]  # fmt: skip


def test_gcloud_says_no(stand_ins, work):
    stand_ins.tell(states="DENIED")
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert "PERMISSION_DENIED" in one_sentence(done, 1)
    assert verbs(stand_ins.calls()) == ["describe"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("walk", *BASE), "unknown command 'walk'"),
        (("run", *BASE, *WORDS), "--accelerator is missing"),
        (("run", "--name", "a", *WORDS), "--zone is missing"),
        (("run", "--zone", "z", *WORDS), "--name is missing"),
        (("run", "--name", "My Run", "--zone", "z", *WORDS), "--name: 'My Run'"),
        (("run", *BASE, "--accelerator", "h100-8", *WORDS), "--accelerator: 'h100-8'"),
        (("run", *BASE, "--accelerator", "v6e-12", *WORDS), "--accelerator: v6e-12"),
        (("run", *BASE, "--accelerator", "v5p-12", *WORDS), "--accelerator: v5p-12"),
        (("run", *RUN, "--slices", "two", *WORDS), "--slices: 'two'"),
        (("run", *RUN, "--capacity", "cheap", *WORDS), "--capacity: 'cheap'"),
        (("run", *RUN, "--bucket", "s3://x", *WORDS), "--bucket: 's3://x'"),
        (("run", *RUN, "--speed", "9", *WORDS), "unknown option --speed"),
        (("run", *BASE, "--accelerator"), "--accelerator needs a value"),
        (("run", *RUN), "nothing to run"),
        (("run", *RUN, "--", "trian", "own.yaml"), "'trian'"),
        (("run", *RUN, "--", "train"), "train needs a configuration file"),
        (("run", *RUN, "--", "train", "absent.yaml"), "absent.yaml: "),
        (("run", *RUN, *WORDS, "output=s3://b/x"), "output=s3://b/x: "),
        (("run", *RUN, *WORDS, "output=gs://b"), "output=gs://b: "),
        (("run", *RUN, "--", "evaluate", "own.yaml", "output=gs://b/x"), "--out FOLDER"),
        (("run", *RUN, *WORDS, "output=runs/x"), "output=runs/x "),
        (("run", *RUN, "--", "probe", "b", "--out", "gs://b/x"), "--out: gs://b/x is in the cloud"),
        (("run", *RUN, "--", "probe", "b", "--out=../x"), "--out: ../x leaves /mnt/bucket/align"),
        (("run", *RUN, "--", "probe", "b", "--out"), "--out needs a value"),
        (("run", *BASE, "--accelerator", "v6e-16", *WORDS), "4 machines"),
        (("status", *BASE, *WORDS), "status takes"),
        (("each", *BASE, "--", "ls", "-l"), "each takes"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(stand_ins, work, words, says):
    done = stand_ins.run("tpu", *words, cwd=work)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr
    assert stand_ins.calls() == []


def test_the_files_that_a_configuration_goes_on_from_travel(stand_ins, work, companions):
    home = stand_ins.folder / "workers" / "0"
    home.mkdir()
    stand_ins.run("tpu", "run", *RUN, "--", "compare", "studies/study.yaml", cwd=work)
    with tarfile.open(home / "bundle.tar.gz") as bundle:
        names = {name for name in bundle.getnames() if name.startswith("./run/")}
    assert names == {f"./run/{name}" for name in companions}
    done = stand_ins.run("tpu", "run", *RUN, "--dry-run", "--", "train", "method.yaml", cwd=work)
    assert "tpu_worker start v5e train run/method.yaml" in done.stdout
    # It inherits the output, too.
    assert "output=" not in done.stdout
    (work / "base.yaml").unlink()
    done = stand_ins.run("tpu", "run", *RUN, "--", "train", "method.yaml", cwd=work)
    assert done.returncode == 2 and "method.yaml goes on from" in done.stderr
    assert "base.yaml: no such file" in done.stderr


def test_outputs_that_need_no_bucket(stand_ins, work):
    for words in (
        (*BASE, "--accelerator", "v6e-16", *WORDS, "output=/nfs/own"),
        (*BASE, "--accelerator", "v6e-8", *WORDS),
        (*BASE, "--accelerator", "v6e-16", *WORDS, "output=gs://my-bucket/own"),
    ):
        done = stand_ins.run("tpu", "run", *words, cwd=work)
        assert done.returncode == 0, done.stderr
        start = command(stand_ins.calls()[-2])
        assert "output=/mnt" not in start
    (work / "own.yaml").write_text("output: s3://my-bucket/own  # away\n")
    done = stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    assert done.returncode == 2 and "output=s3://my-bucket/own: name a folder" in done.stderr


HERE_ON = "/mnt/bucket/align"  # where the bucket keeps what the run of this name writes


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        ("probe base --parallel par", f"--out={HERE_ON}/probe"),
        ("probe base --parallel par --out report", f"--out {HERE_ON}/report"),
        ("compare study.yaml", f"--out={HERE_ON}/compare"),
        ("compare kept.yaml", "run/kept.yaml"),
        ("compare study.yaml --out=a/b", f"--out={HERE_ON}/a/b"),
        ("compare study.yaml --ou c", f"--ou {HERE_ON}/c"),  # argparse takes it for --out
        ("evaluate own.yaml --base --out ev", f"--out {HERE_ON}/ev output={HERE_ON}"),
        ("evaluate own.yaml --base", f"--base output={HERE_ON}"),
        ("generate own.yaml --out=a.jsonl", f"--out={HERE_ON}/a.jsonl output={HERE_ON}"),
        ("export me/slots", f"--out={HERE_ON}/export"),
        ("export /mnt/bucket/run", "export /mnt/bucket/run"),  # beside it
        ("export me/slots --out=/nfs/slots", "--out=/nfs/slots"),
        ("merge a b --weights 1,1 --out both", f"--out {HERE_ON}/both"),
        ("import me/slots --base b --out it", f"--out {HERE_ON}/it"),
        ("prepare subspace base --parallel par --out x.npz", f"--out {HERE_ON}/x.npz"),
        ("demo", f"demo --out={HERE_ON}/demo"),
        ("plan own.yaml --topology v5e:4x4 --json p.json", f"--json {HERE_ON}/p.json"),
        ("plan own.yaml --topology v5e:4x4", "--topology v5e:4x4"),
        ("data show own.yaml", "run/own.yaml"),
    ],
)
def test_what_every_command_writes_goes_to_the_bucket(stand_ins, work, words, sent):
    """Or it would be deleted with the machines."""
    (work / "study.yaml").write_text("output: runs/study\n")
    (work / "kept.yaml").write_text("output: /nfs/study\n")
    more = ("--when-done", "delete", "--dry-run", "--", *words.split())
    done = stand_ins.run("tpu", "run", *RUN, *more, cwd=work)
    assert done.returncode == 0, done.stderr
    (start,) = [line for line in done.stdout.splitlines() if "tpu_worker start" in line]
    assert start.rstrip("'").endswith(f" {sent}")


def test_workers_that_really_run_the_command(stand_ins, work):
    """The same, with two folders as workers in which the sent files are run."""
    homes = [stand_ins.folder / "workers" / name for name in ("0", "1")]
    for home in homes:
        home.mkdir()
    # The launcher follows the first worker only; the others end soon after.
    codes = [home / "jaxalign-run" / "code" for home in homes]
    run = (*BASE, "--accelerator", "v6e-16", "--bucket", "my-bucket", "--poll", "0")
    done = stand_ins.run("tpu", "run", *run, *WORDS, cwd=work)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "hello from jaxalign" in done.stdout and "jaxalign ended with 0" in done.stdout

    def trained(calls):
        return sorted((c for c in calls if c["program"] == "jaxalign"), key=lambda c: c["cwd"])

    stand_ins.wait_for(*codes)
    calls = stand_ins.calls()
    assert [call["cwd"] for call in trained(calls)] == [str(home / "jaxalign") for home in homes]
    for call in trained(calls):
        assert call["argv"] == ["train", "run/own.yaml", "align.layer=16",
                                "output=/mnt/bucket/align"]  # fmt: skip
        assert call["env"]["LIBTPU_INIT_ARGS"] == "--xla_tpu_scoped_vmem_limit_kib=98304"
        assert Path(call["cwd"], "run/own.yaml").read_text() == (work / "own.yaml").read_text()
        assert Path(call["cwd"], "jaxalign/__init__.py").exists()
    mounts = [call["argv"] for call in calls if call["program"] == "gcsfuse"]
    assert mounts == 2 * [
        [
            "--implicit-dirs",
            "--metadata-cache-ttl-secs=0",
            "--metadata-cache-negative-ttl-secs=0",
            *("my-bucket", "/mnt/bucket"),
        ]
    ]
    installs = [c["argv"] for c in calls if c["program"] == "uv" and c["argv"][0] == "pip"]
    assert len(installs) == 2 and installs[0][-1] == ".[tpu,gcs]"

    # The same command again: nothing is installed twice, the run starts anew.
    done = stand_ins.run("tpu", "run", *run, *WORDS, cwd=work, PLAY="3")
    assert done.returncode == 1 and "exit code 3" in done.stderr
    stand_ins.wait_for(*codes)
    again = stand_ins.calls()
    assert not [call for call in again if call["program"] == "uv"]
    assert len(trained(again)) == 2


def test_only_named_files_travel(stand_ins, work):
    home = stand_ins.folder / "workers" / "0"
    home.mkdir()
    (work / "secret.txt").write_text("token")
    stand_ins.run("tpu", "run", *RUN, *WORDS, cwd=work)
    with tarfile.open(home / "bundle.tar.gz") as bundle:
        names = bundle.getnames()
    tops = {name.split("/")[1] for name in names}
    assert tops == {"jaxalign", "configs", "launch", "run", "pyproject.toml", "README.md",
                    "LICENSE", "NOTICE"}  # fmt: skip
    assert [name for name in names if name.startswith("./run/")] == ["./run/own.yaml"]
    assert not [name for name in names if "__pycache__" in name]
    assert "./launch/stoppable" in names
