"""launch/slurm and its job against stand-ins of sbatch, srun and scontrol."""

import shlex

import pytest

WORDS = ("--", "train", "own.yaml", "output=/shared/own")
RUN = ("--nodes", "2", "--gpus-per-node", "8")


def submitted(stand_ins):
    (call,) = stand_ins.calls()
    assert call["program"] == "sbatch"
    return call["argv"]


def test_one_process_for_each_gpu(stand_ins, work):
    more = ("--time", "12:00:00", "--partition=h100", "--sbatch=--constraint=nvlink")
    done = stand_ins.run("slurm", *RUN, *more, *WORDS, cwd=work)
    assert done.returncode == 0, done.stderr
    launch = stand_ins.launch
    export = f"JAXALIGN_LAUNCH={launch},JAXALIGN_PROCESS=gpu,JAXALIGN_GPUS=8,JAXALIGN_RESTARTS=20"
    assert submitted(stand_ins) == [
        *("--job-name=jaxalign", "--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8"),
        *("--cpus-per-task=8", "--signal=TERM@180", "--requeue", "--open-mode=append"),
        *("--output=%x-%j.log", "--time=12:00:00", "--partition=h100", "--constraint=nvlink"),
        *(f"--export=ALL,{export}", f"{launch}/slurm_job"),
        *("train", "own.yaml", "output=/shared/own"),
    ]


def test_one_process_for_each_node(stand_ins, work):
    stand_ins.run("slurm", *RUN, "--process", "node", "--warn", "60", *WORDS, cwd=work)
    argv = submitted(stand_ins)
    assert {"--ntasks-per-node=1", "--cpus-per-task=64", "--signal=TERM@60"} <= set(argv)


def job(stand_ins, work, process="gpu", code="0", **more):
    """Runs the job's script as SLURM would."""
    more = {
        "JAXALIGN_LAUNCH": str(stand_ins.launch),
        "JAXALIGN_PROCESS": process,
        "JAXALIGN_GPUS": "4",
        "JAXALIGN_RESTARTS": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_CPUS_PER_TASK": "8",
        "PLAY": code,
    } | more
    done = stand_ins.run("slurm_job", "train", "own.yaml", cwd=work, **more)
    return done, stand_ins.calls()


def test_the_step(stand_ins, work):
    done, calls = job(stand_ins, work)
    assert done.returncode == 0, done.stderr
    (srun,) = calls
    assert srun["program"] == "srun"
    assert srun["argv"] == [
        *("--kill-on-bad-exit=1", "--cpus-per-task=8", f"{stand_ins.launch}/stoppable"),
        *("jaxalign", "train", "own.yaml"),
    ]
    assert "JAX_LOCAL_DEVICE_IDS" not in srun["env"]
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in srun["env"]["XLA_FLAGS"]
    assert srun["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    _, (srun,) = job(stand_ins, work, process="node")
    assert srun["env"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"


def test_own_settings_win(stand_ins, work):
    own = {"XLA_FLAGS": "--xla_gpu_autotune_level=0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    _, (srun,) = job(stand_ins, work, NCCL_DEBUG="INFO", **own)
    assert srun["env"]["XLA_FLAGS"].split()[-1] == own["XLA_FLAGS"]
    assert srun["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert srun["env"]["NCCL_DEBUG"] == "INFO"


def test_a_stopped_step_queues_the_job_again(stand_ins, work):
    done, calls = job(stand_ins, work, code="143")
    assert done.returncode == 143
    assert [(c["program"], c["argv"]) for c in calls[1:]] == [("scontrol", ["requeue", "77"])]
    done, calls = job(stand_ins, work, code="143", SLURM_RESTART_COUNT="2")
    assert [c["program"] for c in calls] == ["srun"]
    assert "the same launch/slurm command resumes" in done.stdout


@pytest.mark.parametrize("code", ["0", "1", "2", "137"])
def test_an_ended_step_does_not(stand_ins, work, code):
    done, calls = job(stand_ins, work, code=code)
    assert done.returncode == int(code)
    assert [c["program"] for c in calls] == ["srun"]


def test_dry_run_runs_nothing(stand_ins, work):
    done = stand_ins.run("slurm", *RUN, "--dry-run", *WORDS, cwd=work)
    assert done.returncode == 0
    assert stand_ins.calls() == []
    stand_ins.run("slurm", *RUN, *WORDS, cwd=work)
    assert shlex.split(done.stdout) == ["+", "sbatch", *submitted(stand_ins)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpus-per-node", "8", *WORDS), "--nodes is missing"),
        (("--nodes", "2", *WORDS), "--gpus-per-node is missing"),
        (("--nodes", "0", "--gpus-per-node", "8", *WORDS), "--nodes: '0'"),
        ((*RUN, "--process", "core", *WORDS), "--process: 'core'"),
        ((*RUN, "--", "train", "absent.yaml"), "absent.yaml: "),
        ((*RUN, *WORDS[:-1], "output=s3://b/x"), "output=s3://b/x: "),
        (RUN, "nothing to run"),
        ((*RUN, "-x"), "-x needs a value"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(stand_ins, work, words, says):
    done = stand_ins.run("slurm", *words, cwd=work)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and says in done.stderr
    assert stand_ins.calls() == []
