"""Runs as a training leaves them, written in a moment: a checkpoint with random weights."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.config import to_yaml
from jaxalign.export.source import adapter_of
from jaxalign.hf.files import read_json, write_json
from jaxalign.hf.load import fingerprint, load_params, load_spec
from jaxalign.hf.save import save_base
from jaxalign.train.checkpoint import Checkpoints
from jaxalign.train.same import began_from
from jaxalign.train.state import TrainState
from tests.data.conftest import LLAMA_TEMPLATE, build, build_tokenizer, jsonl
from tests.tiny import ASSETS, SPEC, base, configure, rows

__all__ = ["base", "build_tokenizer", "configure", "jsonl", "rows"]

# What `jaxalign import` and `export` set for their own process stays with the test that called it.
PLATFORM = "JAX_PLATFORMS"


@pytest.fixture(autouse=True)
def same_environment():
    before = os.environ.get(PLATFORM)
    yield
    if before is None:
        os.environ.pop(PLATFORM, None)


def noise(tree, seed=0, size=0.2):
    """The same tree with random numbers, so that every factor matters."""
    numbers = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(size * numbers.standard_normal(leaf.shape), jnp.float32), tree
    )


def random_adapter(adapter, spec, params, seed):
    """Factors as training leaves them: B is not zero, nothing lies beyond a projection's rank."""
    fresh = adapter.init(spec, jax.random.key(0), params=params)
    found = jax.tree.map(np.array, noise(fresh, seed))
    if not adapter.merges:
        return found
    for part, sites in found["blocks"].items():
        for target, factors in sites.items():
            for block in range(spec.layers):
                rank = adapter.rank_of(target, block + 1)
                factors["a"][block, ..., rank:] = 0
                factors["b"][block, rank:] = 0
                if "m" in factors:
                    lengths = np.asarray(fresh["blocks"][part][target]["m"][block])
                    factors["m"][block] = 1.1 * lengths * (rank > 0)
    return found


def write_run(config, step=4, seed=0, kind="checkpoints", trained=None):
    """The checkpoint of a run with this configuration; returns what it trained."""
    spec = load_spec(config.model.path)
    adapter = adapter_of(config, spec)
    if trained is None:
        params = load_params(config.model.path, spec, jnp.float32)
        if adapter:
            trained = random_adapter(adapter, spec, params, seed)
        else:
            trained = jax.tree.map(lambda a, b: a + b, params, noise(params, seed, 0.01))
    state = TrainState.create(trained, optax.adam(1e-3))
    meta = {
        "step": step,
        "base": fingerprint(config.model.path),
        "model": config.model.path,
        "began_from": began_from(config),
        "progress": {"best": None, "waited": 0, "metrics": {}},
        "config": dataclasses.asdict(config),
    }
    store = Checkpoints(config.output, keep=5)
    store.save(step, state, meta, best=kind == "best")
    store.wait()
    store.close()
    Path(config.output, "config.yaml").write_text(to_yaml(config), "utf-8")
    return jax.tree.map(np.asarray, trained)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Runs that tests have asked for: copying one is quicker than writing it again."""
    return tmp_path_factory.mktemp("written"), {}


@pytest.fixture
def run(configure, written):
    """words -> the output folder of a run with a checkpoint at step 4, and what it trained."""
    shelf, known = written

    def build_run(*words, **how):
        config = configure(*words)
        key = (*words, *how.items())
        if "trained" in how:
            return config.output, write_run(config, **how)
        if key not in known:
            output, config.output = config.output, str(shelf / str(len(known)))
            known[key] = config.output, write_run(config, **how)
            config.output = output
        folder, trained = known[key]
        shutil.copytree(folder, config.output, dirs_exist_ok=True)
        return config.output, jax.tree.map(np.copy, trained)

    return build_run


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory):
    """A small bfloat16 model in the manner of Llama 3: its tokens, begin token, own template."""
    folder = tmp_path_factory.mktemp("llama3")
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = build(
        folder / "tokenizer",
        special,
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        template=LLAMA_TEMPLATE,
        lines=(ASSETS / "train.en.jsonl").read_text("utf-8").splitlines()[:500],
        size=SPEC.vocab,
    )
    spec = dataclasses.replace(SPEC, tied=False)
    numbers = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: (0.2 * numbers.standard_normal(leaf.shape)).astype(jnp.bfloat16),
        _abstract(spec),
    )
    write_json(Path(tokenizer) / "generation_config.json", {"eos_token_id": [3, 0]})
    save_base(folder / "base", params, spec, tokenizer_from=tokenizer, max_shard_bytes=40_000)
    assert read_json(folder / "base" / "config.json")["torch_dtype"] == "bfloat16"
    return str(folder / "base")


def _abstract(spec):
    from jaxalign.hf.load import abstract_params

    return abstract_params(spec, jnp.bfloat16)


@pytest.fixture
def told(capsys):
    """words -> the one sentence with which the command refuses them."""
    from jaxalign.cli import main

    def tell(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("jaxalign: ") and error.count("\n") == 1, error
        return error.removeprefix("jaxalign: ").strip()

    return tell


@pytest.fixture
def done(capsys):
    """words -> what the command prints when it succeeds."""
    from jaxalign.cli import main

    def do(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    return do
