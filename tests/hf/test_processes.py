"""Two processes load one folder, each its own share, and save it again together."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.hf.load import load_params
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.save import save_base
from tests.hf.conftest import LLAMA, assert_same_tree, random_lora, random_params

REPO = Path(__file__).resolve().parents[2]
WORKER = """
import json, os, sys
import numpy as np
from pathlib import Path
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
os.environ['JAX_PLATFORMS'] = 'cpu'
import jax, jax.numpy as jnp
port, process, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f'localhost:{port}', 2, process)
from jaxalign.hf.load import abstract_params, load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.save import save_base
from jaxalign.sharding import make_mesh, shard_tree
from jaxalign.hf.tensors import StoredTensor
from tests.hf.conftest import random_params
spec = load_spec(folder / 'model')
read = 0
rows = StoredTensor.rows
def counted(self, start, stop):
    global read
    read += (stop - start) * self.nbytes // self.shape[0]
    return rows(self, start, stop)
StoredTensor.rows = counted
shares = {}
for sizes in ((2, 2, 1), (1, 1, 4), (1, 4, 1), (1, 2, 2)):
    mesh, read = make_mesh(*sizes), 0
    params = load_params(
        folder / 'model', spec, jnp.float32, shard_tree(mesh, abstract_params(spec, jnp.float32))
    )
    assert not params['embed'].is_fully_addressable
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    shares[str(sizes)] = read / whole
    for leaf, truth in zip(jax.tree.leaves(params), jax.tree.leaves(random_params(spec))):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, truth[shard.index])
print(json.dumps(shares), flush=True)
save_base(folder / 'model_again', params, spec, max_shard_bytes=40_000)

tree, adapter = load_peft(folder / 'adapter', spec)
def split(leaf):  # along the first axis that two devices divide
    axis = max(range(leaf.ndim), key=lambda axis: leaf.shape[axis] % 2 == 0)
    where = jax.NamedSharding(mesh, jax.P(*[None] * axis, 'fsdp'))
    return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])
tree = jax.tree.map(split, tree)
assert not jax.tree.leaves(tree)[0].is_fully_addressable
save_peft(folder / 'adapter_again', tree, spec, adapter)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    save_base(tmp_path / "model", random_params(LLAMA), LLAMA)
    save_peft(tmp_path / "adapter", random_lora(LLAMA), LLAMA, Lora(4, 8.0, 0.1))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(process), str(tmp_path)],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    assert_same_tree(
        random_params(LLAMA), load_params(tmp_path / "model_again", LLAMA, jnp.float32)
    )
    assert_same_tree(random_lora(LLAMA), load_peft(tmp_path / "adapter_again", LLAMA)[0])
    # Two copies of the weights, one a process; else half of the weights each, but for keys and
    # values (a tenth), whose two heads four devices cannot divide.
    for output in outputs:
        shares = json.loads(next(line for line in output.splitlines() if line[0] == "{"))
        assert shares.pop("(2, 2, 1)") == 1
        assert set(shares) == {"(1, 1, 4)", "(1, 4, 1)", "(1, 2, 2)"}
        assert all(0.5 <= share < 0.56 for share in shares.values())
    names = {folder.name for folder in tmp_path.iterdir()}
    assert names == {"model", "adapter", "model_again", "adapter_again"}
