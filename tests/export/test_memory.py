"""An export holds a few tensors of a model, never the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.hf.peft import save_peft
from jaxalign.hf.save import save_base
from jaxalign.model.spec.tensors import base_rows, sizes
from tests.hf.conftest import random_lora, random_params
from tests.hf.test_memory import SPEC

REPO = Path(__file__).resolve().parents[2]
MEASURE = """
import sys
import jax.numpy as jnp
from jaxalign.export.request import Request
from jaxalign.export.run import export
import transformers, transformers.models.llama  # imported by any export with a tokenizer

# VmHWM, because ru_maxrss of a child starts at what its parent held.
def peak():
    lines = open('/proc/self/status').read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM'))

jnp.ones(1).block_until_ready()
before = peak()
export(Request(sys.argv[1], format='merged', out=sys.argv[2], max_shard_size='100MB'))
print(before, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_of_a_merge(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_base(base, random_params(SPEC), SPEC, max_shard_bytes=100_000_000)
    save_peft(adapter, random_lora(SPEC), SPEC, Lora(4, 8.0), base_name=str(base))
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert stored > 280e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(adapter), str(tmp_path / "out")],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak = map(int, done.stdout.splitlines()[-1].split())
    print(f"{(peak - before) / 1e6:.0f} MB for {stored / 1e6:.0f} MB on disk")
    size = sizes(SPEC)
    largest = 4 * max(
        shape[0] * shape[-1] for row in base_rows(SPEC) for shape in [row.hf_shape(size)]
    )
    # A kernel, its update, their sum and the written bytes; Orbax and the compiled sums besides.
    assert peak - before < 5 * largest + 100e6
    assert peak - before < stored
