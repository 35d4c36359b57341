"""Loading costs the parameters and one leaf, not a second copy of the checkpoint."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxalign.hf.save import save_base
from jaxalign.model.spec.tensors import base_rows, parameter_count, sizes
from tests.hf.conftest import LLAMA, random_params

# 300 MB in float32, spread over enough layers that one leaf is far less than the whole.
SPEC = dataclasses.replace(
    LLAMA, vocab=8192, dim=768, layers=9, heads=12, kv_heads=4, head_dim=64, ffn=2304
)
MEASURE = """
import sys
import jax, jax.numpy as jnp
from jaxalign.hf.load import load_params, load_spec

# VmHWM, because ru_maxrss of a child starts at what its parent held.
def peak():
    lines = open('/proc/self/status').read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM'))

spec = load_spec(sys.argv[1])
jnp.ones(1).block_until_ready()
before = peak()
params = load_params(sys.argv[1], spec, jnp.bfloat16)
print(before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_of_a_load(tmp_path):
    save_base(tmp_path / "m", random_params(SPEC), SPEC, max_shard_bytes=100_000_000)
    stored = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors"))
    assert stored > 280e6
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )
    before, peak = map(int, result.stdout.split())
    print(f"{(peak - before) / 1e6:.0f} MB for {stored / 1e6:.0f} MB on disk")
    width = jnp.dtype(jnp.bfloat16).itemsize
    params = parameter_count(SPEC) * width
    leaf = max(jnp.prod(jnp.array(row.shape(sizes(SPEC)))) for row in base_rows(SPEC)) * width
    # Slack: a mapped tensor per reader (7 MB each), and what the allocator keeps.
    assert peak - before < params + leaf + 48e6
    assert peak - before < stored
