"""A run of two processes on four devices is exported by one process on one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.config import to_yaml

REPO = Path(__file__).resolve().parents[2]
EXPORT = """
import jax, sys
from jaxalign.cli import main
code = main(['export', *sys.argv[1:]])
assert jax.device_count() == 1 and jax.process_count() == 1
sys.exit(code)
"""


def start(words, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.Popen(
        [sys.executable, *words], cwd=REPO, env=environment | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def train_together(config, folder):
    """Two processes of two devices each train one run."""
    (folder / "run.yaml").write_text(to_yaml(config), "utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    workers = [
        start(
            ["-m", "jaxalign", "train", str(folder / "run.yaml"), "--debug"],
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
            JAX_PLATFORMS="cpu",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=280)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lora", "full"])
def test_one_host_reads_what_two_wrote(configure, tmp_path, what):
    config = configure("train.steps=2", "train.eval_every=0", f"trainable={what}",
                       "task.valid=[]", "align.valid=[]", "lora.dropout=0.0")  # fmt: skip
    train_together(config, tmp_path)
    out = Path(config.output)
    shards = {path.name for path in (out / "checkpoints" / "2" / "state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= shards or what == "lora"
    words = {"lora": ["--format", "peft"], "full": ["--format", "merged", "--dtype", "float32"]}
    exported = start(["-c", EXPORT, config.output, *words[what]])
    assert exported.wait(timeout=280) == 0, exported.stdout.read()
    exported.stdout.close()
    ours, theirs = (
        load_file(out / folder)
        for folder in {
            "lora": ("export/peft/adapter_model.safetensors", "adapter/adapter_model.safetensors"),
            "full": ("export/merged/model.safetensors", "model/model.safetensors"),
        }[what]
    )
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        np.testing.assert_array_equal(ours[name], weight, err_msg=name)
    if what == "lora":
        assert all(weight.any() for name, weight in ours.items() if "lora_B" in name)
