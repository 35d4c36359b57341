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
SAVE = """
import dataclasses, sys
from jaxalign import multihost
multihost.start()
import jax, jax.numpy as jnp
from jaxalign.config import load
from jaxalign.hf.load import abstract_params, fingerprint, load_params, load_spec
from jaxalign.sharding import make_mesh, replicated, shard_tree
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.state import TrainState
config = load(sys.argv[1]).config
base, mesh = config.model.path, make_mesh(1, 2, 2)
spec = load_spec(base)
shardings = shard_tree(mesh, abstract_params(spec, jnp.float32))
params = load_params(base, spec, jnp.float32, shardings)
assert not params['embed'].is_fully_addressable
step = jax.make_array_from_callback((), replicated(mesh), lambda _: jnp.zeros((), jnp.int32))
store = Checkpoints(config.output, keep=1)
meta = {'step': 2, 'base': fingerprint(base), 'model': base, 'progress': {},
        'config': dataclasses.asdict(config)}
store.save(2, TrainState(step, params, {'count': step}), meta)
store.wait()
store.close()
"""
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


def together(words, config, folder):
    """Two processes of two devices each run the same command, with the run's settings."""
    (folder / "run.yaml").write_text(to_yaml(config), "utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    workers = [
        start(
            [*words, str(folder / "run.yaml")],
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


def export_alone(config, *words):
    exported = start(["-c", EXPORT, config.output, *words])
    output = exported.communicate(timeout=280)[0]
    assert exported.returncode == 0, output


def assert_same_tensors(ours, theirs):
    ours, theirs = load_file(ours), load_file(theirs)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        np.testing.assert_array_equal(ours[name].astype(weight.dtype), weight, err_msg=name)
    return ours


@pytest.mark.slow
def test_an_adapter_of_a_training(configure, tmp_path):
    config = configure("train.steps=2", "train.eval_every=0", "lora.dropout=0.0",
                       "task.valid=[]", "align.valid=[]")  # fmt: skip
    together(["-m", "jaxalign", "train"], config, tmp_path)
    export_alone(config)
    file = "adapter_model.safetensors"
    found = assert_same_tensors(
        Path(config.output, "export", "peft", file), Path(config.output, "adapter", file)
    )
    assert all(weight.any() for name, weight in found.items() if "lora_B" in name)


@pytest.mark.slow
def test_weights_that_no_process_had_whole(configure, tmp_path, base):
    config = configure("trainable=full")
    together(["-c", SAVE], config, tmp_path)
    pieces = {path.name for path in Path(config.output, "checkpoints", "2", "state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= pieces
    export_alone(config, "--format", "merged", "--dtype", "float32")
    file = "model.safetensors"
    assert_same_tensors(Path(config.output, "export", "merged", file), Path(base, file))
