"""A tiny model, an adapter for it, and rows to be judged by."""

import json

import jax
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.config import load
from jaxalign.hf.peft import save_peft
from tests.tiny import ASSETS, SPEC, base  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory):  # noqa: F811
    """Two adapters that change what the base says."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = Lora(r=4, alpha=32.0)
    for seed in (1, 2):
        fresh = lora.init(SPEC, jax.random.key(seed))
        moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape),
                             fresh)  # fmt: skip
        save_peft(folder / f"a{seed}", moved, SPEC, lora, base_name=base)
    return folder


@pytest.fixture(scope="session")
def golds(tmp_path_factory):
    """Nine rows of two languages with intents and slots."""
    folder = tmp_path_factory.mktemp("golds")
    for language, number in (("en", 9), ("de", 7)):
        lines = (ASSETS / f"test.{language}.jsonl").read_text("utf-8").splitlines()[:number]
        (folder / f"test.{language}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture
def judged(base, golds, tmp_path):  # noqa: F811
    """words -> Config that judges the tiny model on those rows."""

    def build(*words):
        return load(
            None,
            [f"output={tmp_path / 'run'}", f"model.path={base}", "model.dtype=float32",
             "mesh.fsdp=1", "task.kind=intent_slots", f"evaluate.data=[{golds}/test.*.jsonl]",
             f"task.train=[{golds}/test.en.jsonl]", "generate.max_new_tokens=6",
             "generate.batch=4", "evaluate.draws=20", *words],
        ).config  # fmt: skip

    return build


def rows_of(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
