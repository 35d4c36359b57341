"""Adapters from elsewhere: what is in them is told, their spelling is mended, misfits are named."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.checksums import SUMS
from jaxalign.config import load, to_yaml
from jaxalign.export.incoming import import_adapter
from jaxalign.export.request import Request
from jaxalign.export.run import export
from jaxalign.export.source import open_source, trained_adapter
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import load_peft, save_peft
from tests.hf.conftest import assert_same_tree


@pytest.fixture
def theirs(run, base, tmp_path):
    """words -> an adapter folder that says another base's name."""

    def build_folder(*words):
        out, trained = run(*words)
        spec = load_spec(base)
        adapter = open_source(out).adapter
        save_peft(tmp_path / "theirs", trained, spec, adapter, base_name="lab/their-base")
        return tmp_path / "theirs", trained, adapter

    return build_folder


def rewrite(folder, change):
    file = Path(folder, "adapter_model.safetensors")
    Path(folder, SUMS).unlink(missing_ok=True)
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_what_is_found(theirs, base, tmp_path, done):
    folder, trained, adapter = theirs("lora.layers=1..2", "lora.targets=[q,down]")
    said = done("import", folder, "--base", base, "--out", tmp_path / "in")
    for line in (
        "names as its base   lab/their-base",
        "LoRA                r 4, alpha 16; scale alpha / r",
        "projections         q, down",
        "blocks              1, 2",
        "tensors             8, stored as float32, written as float32",
        "chat template       the base's",
    ):
        assert line in said.splitlines(), line
    assert f"names lab/their-base as its base, not {base};" in " ".join(said.split())
    lora, found = load_peft(tmp_path / "in" / "adapter", load_spec(base))
    assert found == adapter
    assert_same_tree(trained, lora)
    count = 2 * 4 * (32 + 32 + 48 + 32)
    assert f"trained parameters {count:,}" in " ".join(said.split())


def test_another_dtype_and_spelling(theirs, base, tmp_path, done):
    folder, trained, adapter = theirs()

    def respell(tensors):
        return {
            name.removeprefix("base_model.model.").replace(".weight", ".default.weight"):
            tensor.astype(ml_dtypes.bfloat16)
            for name, tensor in tensors.items()
        }  # fmt: skip

    rewrite(folder, respell)
    said = done("import", folder, "--base", base, "--out", tmp_path / "in")
    assert "42 tensors were renamed" in said and "stored as bfloat16" in said
    lora, found = load_peft(tmp_path / "in" / "adapter", load_spec(base))
    assert found == adapter
    leaf = trained["blocks"]["mlp"]["up"]["a"]
    expected = leaf.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(lora["blocks"]["mlp"]["up"]["a"], expected)


def test_blocks_that_do_nothing(theirs, base, tmp_path, done):
    """As in adapters trained with the paper's released configuration: B is zero above the tap."""
    folder, _, _ = theirs()

    def stop(tensors):
        return {n: t * (".layers.0." in n or "lora_A" in n) for n, t in tensors.items()}

    rewrite(folder, stop)
    said = done("import", folder, "--base", base, "--out", tmp_path / "in")
    assert "in blocks 2, 3 every lora_B is zero" in said
    found = import_adapter(str(folder), base, str(tmp_path / "again"))
    assert found.idle == (2, 3) and found.tensors == 42


@pytest.mark.parametrize(
    "words",
    [("lora.layers=1,3", "lora.scaling=rank_stabilised"), ("lora.ranks={q: 2}",)],
    ids=str,
)
def test_going_on(theirs, base, tmp_path, words):
    """The settings that an import leaves are those of the adapter."""
    folder, _, adapter = theirs(*words)
    import_adapter(str(folder), base, str(tmp_path / "in"))
    config = load(tmp_path / "in" / "continue.yaml").config
    assert config.model.path == base and config.adapter.start == f"{tmp_path / 'in'}/adapter"
    assert trained_adapter(config, load_spec(base)) == adapter


def test_the_prompts_of_a_run_go_on(theirs, base, tmp_path):
    """As its record has them; a text that looks like a reference is one of its own."""
    folder, _, _ = theirs()
    run = tmp_path / "recorded"
    shutil.copytree(folder, run / "adapter")
    import_adapter(str(run / "adapter"), base, str(tmp_path / "untold"))
    assert "prompt:" not in (tmp_path / "untold" / "continue.yaml").read_text()
    config = load(None, ["task.kind=intent", "prompt.template=llama3_paper"]).config
    config.prompt.system = "Name ${it}."
    (run / "config.yaml").write_text(to_yaml(config), "utf-8")
    with pytest.MonkeyPatch.context() as patch:  # the base is no Llama 3
        patch.setattr("jaxalign.data.template.llama3_paper", lambda _: "x")
        import_adapter(str(run / "adapter"), base, str(tmp_path / "in"))
    assert load(tmp_path / "in" / "continue.yaml").config.prompt == config.prompt


def test_training_goes_on(theirs, base, tmp_path, configure):
    from jaxalign.train.setup import prepare

    folder, trained, _ = theirs()
    import_adapter(str(folder), base, str(tmp_path / "in"))
    file = load(tmp_path / "in" / "continue.yaml").config
    words = configure("lora.r=4")
    words.lora, words.adapter, words.model.path = file.lora, file.adapter, file.model.path
    state = prepare(words).state
    import jax

    assert_same_tree(trained, jax.tree.map(np.asarray, state.trained))


def test_an_imported_adapter_is_exported_and_merged(theirs, base, tmp_path, done):
    folder, trained, _ = theirs()
    import_adapter(str(folder), base, str(tmp_path / "in"))
    out = export(Request(str(tmp_path / "in")))
    assert_same_tree(trained, load_peft(out, load_spec(base))[0])
    body = (out / "README.md").read_text()
    assert "learning rate" not in body  # how it was trained is not known here
    done("export", tmp_path / "in", "--format", "merged")


def test_its_own_template_and_tokenizer(theirs, base, tmp_path, done):
    folder, _, _ = theirs()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    said = done("import", folder, "--base", base, "--out", tmp_path / "in")
    assert "chat template       its own" in said and "tokenizer           the base's" in said
    new = tmp_path / "in" / "adapter"
    assert (new / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (new / "tokenizer.json").read_bytes() == Path(base, "tokenizer.json").read_bytes()


@pytest.mark.torch
def test_what_peft_saves(base, tmp_path, done):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=r".*\.(q|v)_proj", use_rslora=True,
                        task_type="CAUSAL_LM")  # fmt: skip
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "peft")
    said = done("import", tmp_path / "peft", "--base", base, "--out", tmp_path / "in")
    assert "projections         q, v" in said and "scale alpha / sqrt(r)" in said
    assert "means little" not in said
    written = json.loads((tmp_path / "in" / "adapter" / "adapter_config.json").read_text())
    assert sorted(written["target_modules"]) == ["q_proj", "v_proj"]  # a pattern was spelled out
    line = done("export", tmp_path / "in", "--verify")
    assert "top-1 agreement 100.0%" in line


# --- refusals -----------------------------------------------------------------------------------


def test_another_base(theirs, base, tmp_path, told):
    folder, _, _ = theirs()
    shutil.copytree(base, tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / SUMS).unlink()
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    words = ("import", folder, "--base", tmp_path / "wide", "--out", tmp_path / "in")
    error = told(*words)
    assert "[4, 32]" in error and "[4, 64]" in error
    assert f"it names lab/their-base as its base, not {tmp_path / 'wide'}" in error
    assert not (tmp_path / "in").exists()


def test_things_that_are_no_adapter(theirs, base, tmp_path, told):
    assert "adapter_config.json: " in told("import", base, "--base", base, "--out", tmp_path / "in")
    folder, _, _ = theirs()
    words = ("import", folder, "--base", base, "--out", tmp_path / "in")

    def poison(tensors):
        next(iter(tensors.values()))[0, 0] = np.nan
        return tensors

    rewrite(folder, poison)
    error = told(*words)
    assert "NaN" in error
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mine.txt").write_text("")
    assert "is not empty" in told(*words)
    error = told("import", tmp_path / "none", "--base", base, "--out", tmp_path / "x")
    assert "no such folder" in error


def test_errors_of_respelled_tensors_name_the_folder(theirs, base, tmp_path, told):
    folder, _, _ = theirs()

    def respell(tensors):
        found = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
        found.pop(next(name for name in found if "layers.1." in name and "lora_A" in name))
        return found

    rewrite(folder, respell)
    error = told("import", folder, "--base", base, "--out", tmp_path / "in")
    assert str(folder) in error and "is missing" in error


def test_more_tokens_than_rows(theirs, base, tmp_path, told, build_tokenizer):
    folder, _, _ = theirs()
    more = [f"<|extra{i}|>" for i in range(700)]
    build_tokenizer(folder, ["<|end|>", *more], eos="<|end|>")
    error = told("import", folder, "--base", base, "--out", tmp_path / "in")
    assert "its tokenizer knows" in error and "the base only 900" in error
