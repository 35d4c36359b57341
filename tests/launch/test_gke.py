"""launch/gke: the manifest field by field, and what kubectl is asked."""

import pytest
import yaml

KIND = ("--name", "align", "--accelerator", "v6e", "--topology", "4x4", "--image", "r.dev/p/j:1")
RUN = (*KIND, "--bucket", "gs://my-bucket")
WORDS = ("--", "train", "own.yaml", "prompt.system=it's: {all} #1")


def rendered(stand_ins, work, *words):
    done = stand_ins.run("gke", "render", *words, cwd=work)
    assert done.returncode == 0, done.stderr
    assert stand_ins.calls() == []
    return list(yaml.safe_load_all(done.stdout))


def test_the_whole_manifest(stand_ins, work):
    more = ("--slices", "2", "--capacity", "spot", "--restarts", "4", "--queue", "lq")
    more += ("--secret", "hf-token", "--service-account", "writer")
    configuration, jobset = rendered(stand_ins, work, *RUN, *more, *WORDS)
    assert configuration == {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "align"},
        "data": {"0.yaml": (work / "own.yaml").read_text()},
    }
    pods = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "serviceAccountName": "writer",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
            "cloud.google.com/gke-tpu-topology": "4x4",
            "cloud.google.com/gke-spot": "true",
        },
        "tolerations": [
            {"key": "google.com/tpu", "operator": "Exists"},
            {"key": "cloud.google.com/gke-spot", "operator": "Exists"},
        ],
        "containers": [
            {
                "name": "jaxalign",
                "image": "r.dev/p/j:1",
                "args": [
                    "train",
                    "/etc/jaxalign/own.yaml",
                    "prompt.system=it's: {all} #1",
                    "output=/mnt/bucket/align",
                ],
                "ports": [{"containerPort": 8471}],
                "securityContext": {"runAsUser": 0, "runAsGroup": 0},
                "env": [
                    {"name": "LIBTPU_INIT_ARGS", "value": "--xla_tpu_scoped_vmem_limit_kib=98304"}
                ],
                "envFrom": [{"secretRef": {"name": "hf-token"}}],
                "resources": {"limits": {"google.com/tpu": 4}},
                "volumeMounts": [
                    {"name": "configuration", "mountPath": "/etc/jaxalign"},
                    {"name": "bucket", "mountPath": "/mnt/bucket"},
                ],
            }
        ],
        "volumes": [
            {
                "name": "configuration",
                "configMap": {
                    "name": "align",
                    "items": [{"key": "0.yaml", "path": "own.yaml"}],
                },
            },
            {
                "name": "bucket",
                "csi": {
                    "driver": "gcsfuse.csi.storage.gke.io",
                    "volumeAttributes": {
                        "bucketName": "my-bucket",
                        "mountOptions": "implicit-dirs,metadata-cache:ttl-secs:0,"
                        "metadata-cache:negative-ttl-secs:0",
                    },
                },
            },
        ],
    }
    assert jobset == {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": "align",
            "labels": {"kueue.x-k8s.io/queue-name": "lq"},
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": 4},
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": 2,
                    "template": {
                        "spec": {
                            "parallelism": 4,
                            "completions": 4,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "template": {
                                "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
                                "spec": pods,
                            },
                        }
                    },
                }
            ],
        },
    }


@pytest.mark.parametrize(
    ("accelerator", "topology", "more", "label", "nodes", "chips"),
    [
        ("v5e", "16x16", (), "tpu-v5-lite-podslice", 64, 4),
        ("v5e", "2x4", (), "tpu-v5-lite-podslice", 2, 4),
        ("v5e", "2x4", ("--chips-per-node", "8"), "tpu-v5-lite-podslice", 1, 8),
        ("v6e", "1x1", (), "tpu-v6e-slice", 1, 1),
        ("v5p", "2x2x1", (), "tpu-v5p-slice", 1, 4),
        ("v5p", "4x4x8", (), "tpu-v5p-slice", 32, 4),
        ("v4", "2x2x4", (), "tpu-v4-podslice", 4, 4),
    ],
)
def test_machines_of_a_topology(stand_ins, work, accelerator, topology, more, label, nodes, chips):
    run = ("--name", "a", "--accelerator", accelerator, "--topology", topology, "--image", "i:1")
    run += ("--bucket", "my-bucket", *more, "--", "train", "own.yaml", "output=/mnt/bucket/x")
    _, jobset = rendered(stand_ins, work, *run)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == nodes
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert container["args"][-1] == "output=/mnt/bucket/x"
    assert ("env" in container) == (accelerator == "v6e")


def test_without_configuration_and_bucket(stand_ins, work):
    run = ("--name", "a", "--accelerator", "v5e", "--topology", "1x1", "--image", "i:1")
    (jobset,) = rendered(stand_ins, work, *run, "--", "demo")
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert "metadata" not in pod and "volumes" not in pod["spec"]
    (container,) = pod["spec"]["containers"]
    assert container["args"] == ["demo"]
    assert not {"volumeMounts", "env", "envFrom"} & set(container)


def test_what_a_command_writes_goes_to_the_bucket(stand_ins, work):
    words = ("--", "probe", "base", "--parallel", "par", "--out", "report")
    (jobset,) = rendered(stand_ins, work, *RUN, *words)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["spec"]["containers"][0]["args"][-2:] == ["--out", "/mnt/bucket/align/report"]
    done = stand_ins.run("gke", "render", *KIND, *words, cwd=work)
    assert "without --bucket the results are on the machine's disk" in done.stderr


def test_a_configuration_keeps_every_line(stand_ins, work):
    text = "  \n\n# first\noutput: runs/x\nprompt:\n  system: |\n    one\n\n    two\n"
    (work / "own.yaml").write_text(text)
    configuration, _ = rendered(stand_ins, work, *RUN, *WORDS)
    assert configuration["data"]["0.yaml"].strip("\n ") == text.strip("\n ")


def test_the_files_that_a_configuration_goes_on_from(stand_ins, work, companions):
    words = ("--", "compare", "studies/study.yaml")
    configuration, jobset = rendered(stand_ins, work, *RUN, *words)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"][:2] == ["compare", "/etc/jaxalign/studies/study.yaml"]
    items = pod["volumes"][0]["configMap"]["items"]
    found = {item["path"]: configuration["data"][item["key"]] for item in items}
    assert found == {name: (work / name).read_text() for name in companions}


def test_run_applies_the_manifest(stand_ins, work):
    manifest = stand_ins.run("gke", "render", *RUN, *WORDS, cwd=work).stdout
    done = stand_ins.run("gke", "run", *RUN, "--namespace", "ml", *WORDS, cwd=work)
    assert done.returncode == 0, done.stderr
    get, apply = stand_ins.calls()
    assert get["argv"] == [
        *("--namespace=ml", "get", "jobset", "align", "--ignore-not-found"),
        "--output=jsonpath={.status.terminalState}",
    ]
    assert apply["argv"] == ["--namespace=ml", "apply", "--filename=-"]
    assert apply["stdin"] == manifest


@pytest.mark.parametrize("state", ["Failed", "Completed"])
def test_a_jobset_that_ended_is_deleted_first(stand_ins, work, state):
    stand_ins.tell(terminal=state)
    done = stand_ins.run("gke", "run", *RUN, *WORDS, cwd=work)
    assert done.returncode == 0 and "resumes from its newest checkpoint" in done.stderr
    calls = [call["argv"] for call in stand_ins.calls()]
    assert [argv[0] for argv in calls] == ["get", "delete", "apply"]
    assert calls[1] == ["delete", "jobset", "align", "--wait=true"]


def test_other_commands(stand_ins, work):
    pods = "jobset.sigs.k8s.io/jobset-name=align"
    first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    expected = {
        "logs": [
            [
                *("logs", "--follow", "--tail=-1", "--container=jaxalign"),
                f"--selector={pods},{first}",
            ]
        ],
        "status": [["get", "jobset", "align"], ["get", "pods", f"--selector={pods}"]],
        "delete": [
            ["delete", "jobset", "align", "--ignore-not-found"],
            ["delete", "configmap", "align", "--ignore-not-found"],
        ],
    }
    for command, argv in expected.items():
        assert stand_ins.run("gke", command, "--name", "align", cwd=work).returncode == 0
        assert [call["argv"] for call in stand_ins.calls()] == argv


def test_dry_run_runs_nothing(stand_ins, work):
    done = stand_ins.run("gke", "run", *RUN, "--dry-run", *WORDS, cwd=work)
    assert done.returncode == 0
    assert stand_ins.calls() == []
    printed = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert [line.split()[2] for line in printed] == ["get", "delete", "apply"]
    assert "kind: JobSet" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("fly", *RUN, *WORDS), "unknown command 'fly'"),
        (("run", "--name", "a", "--accelerator", "v5e", "--image", "i", *WORDS), "--topology is"),
        (("run", "--name", "a", "--topology", "4x4", "--image", "i", *WORDS), "--accelerator is"),
        (("run", *RUN, "--accelerator", "h100", *WORDS), "--accelerator: 'h100'"),
        (("run", *RUN, "--topology", "3x3", *WORDS), "--topology: v6e"),
        (("run", *RUN, "--accelerator=v5p", "--topology=4x4", *WORDS), "--topology: '4x4'"),
        (("run", *RUN, "--chips-per-node", "2", *WORDS), "--chips-per-node: '2'"),
        (("run", *RUN, "--topology=2x2", "--chips-per-node=8", *WORDS), "2x2 has 4"),
        (("run", *RUN, "--image", "", *WORDS), "--image is missing"),
        (("run", *RUN, "--secret", "A b", *WORDS), "--secret: 'A b'"),
        (("run", *RUN, "--restarts", "-1", *WORDS), "--restarts: '-1'"),
        (("run", *KIND, *WORDS), "4 machines"),
        (("run", *RUN, "--", "train", "absent.yaml"), "absent.yaml: "),
        (("run", *RUN, *WORDS, "output=s3://b/x"), "output=s3://b/x: "),
        (("run", *RUN, *WORDS, "a=b\nc"), "a line break"),
        (("logs",), "--name is missing"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(stand_ins, work, words, says):
    done = stand_ins.run("gke", *words, cwd=work)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and says in done.stderr
    assert stand_ins.calls() == []
