"""The shapes that need no download."""

import json

import pytest
import yaml

from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import parameter_count
from jaxalign.plan.run import MODELS, find_spec
from jaxalign.settings import Config
from tests.plan.conftest import config

# As their model cards tell them.
COUNTS = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}


def test_every_known_model_has_its_number_of_parameters():
    known = yaml.safe_load(MODELS.read_text("utf-8"))
    assert {name: parameter_count(ModelSpec.from_hf(facts)) for name, facts in known.items()} == (
        COUNTS
    )


def test_a_folder_goes_before_the_table(tmp_path, monkeypatch):
    name = "meta-llama/Meta-Llama-3-8B"
    facts = yaml.safe_load(MODELS.read_text("utf-8"))[name] | {"num_hidden_layers": 7}
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text(json.dumps(facts), "utf-8")
    assert find_spec(config(model=name)).layers == 32
    monkeypatch.chdir(tmp_path)
    assert find_spec(config(model=name)).layers == 7


def test_what_nobody_knows_is_told():
    with pytest.raises(UserError, match="without a download these are known: meta"):
        find_spec(config(model="nobody/nothing"))
    with pytest.raises(UserError, match=r"model\.path is empty"):
        find_spec(Config())
