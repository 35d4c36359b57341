"""What leaves is what was trained: bits of adapters, sums of merged weights, dtypes, files."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxalign.base import decoding_of, open_base
from jaxalign.config import saved_in
from jaxalign.data.tasks import Example
from jaxalign.errors import UserError
from jaxalign.export.request import Request
from jaxalign.export.run import default_out, export, parse_size
from jaxalign.export.source import adapter_of, open_source
from jaxalign.hf.files import read_json, write_json
from jaxalign.hf.generation import generation_files
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.tensors import open_index
from jaxalign.merge.methods import Recipe
from jaxalign.merge.run import merge
from jaxalign.sharding import make_mesh, shard_tree
from jaxalign.train.loop import train
from tests.hf.conftest import assert_same_tree
from tests.tiny import SPEC


def names(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}


def stored(folder):
    return {name: np.array(one.view()) for name, one in open_index(Path(folder), "model").items()}


# --- adapters -----------------------------------------------------------------------------------


def test_an_adapter_keeps_its_bits(run, base):
    out, trained = run()
    folder = export(Request(out))
    assert folder == Path(out, "export", "peft")
    lora, adapter = load_peft(folder, load_spec(base))
    assert_same_tree(trained, lora)
    assert (adapter.r, adapter.alpha, adapter.dropout) == (4, 16.0, 0.1)
    assert names(folder) == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json", "SHA256SUMS",
    }  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base


@pytest.mark.slow
def test_a_trained_run_exports_what_it_wrote_itself(configure, capsys):
    config = configure("train.steps=3", "train.eval_every=2", "lora.layers=1..2")
    result = train(config)
    folder = export(Request(config.output))
    assert f"step {result.best_step}" in capsys.readouterr().out
    written = Path(result.adapter, "adapter_model.safetensors").read_bytes()
    assert (folder / "adapter_model.safetensors").read_bytes() == written
    other = export(Request(config.output, step="latest", out=f"{config.output}/other"))
    if result.best_step != result.step:
        assert (other / "adapter_model.safetensors").read_bytes() != written


def test_ranks_are_those_of_the_adapter_that_the_run_began_from(run, configure, tmp_path):
    """Alphas of single projections are no setting of the run: they are read of that folder."""
    first, _ = run("lora.alphas={v: 3}", f"output={tmp_path}/first")
    start = export(Request(first, out=str(tmp_path / "start")))
    out, _ = run(f"adapter.start={start}", f"output={tmp_path}/out")
    folder = export(Request(out))
    pattern = read_json(start / "adapter_config.json")["alpha_pattern"]
    assert pattern and read_json(folder / "adapter_config.json")["alpha_pattern"] == pattern
    other, _ = run("lora.alphas={v: 5}", f"output={tmp_path}/other")
    shutil.rmtree(start)
    export(Request(other, out=str(start)))
    with pytest.raises(UserError, match=r"began from another adapter than .* holds now"):
        export(Request(out, out=str(tmp_path / "again")))


def test_steps(run, configure, told):
    config = configure()
    out, first = run(step=2, seed=1)
    spec = load_spec(config.model.path)
    _, second = run(step=4, seed=2)
    assert_same_tree(second, open_source(out).weights)
    assert_same_tree(first, open_source(out, "2").weights)
    assert "no best checkpoint" in told("export", out, "--step", "best")
    _, best = run(step=3, seed=3, kind="best")
    for step, expected in (("", best), ("best", best), ("3", best), ("latest", second)):
        assert_same_tree(expected, open_source(out, step).weights)
    for step in ("7", "newest", "-1"):
        error = told("export", out, f"--step={step}")
        assert f"'{step}'; there are 2, 3, 4, latest and best" in error
    assert adapter_of(config, spec) == open_source(out).adapter


def test_an_adapter_folder_and_a_run_without_checkpoints(run, base, tmp_path, told):
    out, trained = run()
    spec = load_spec(base)
    save_peft(f"{out}/adapter", trained, spec, open_source(out).adapter, base_name=base)
    inner = export(Request(f"{out}/adapter"))
    assert inner == Path(out, "adapter_peft")
    assert_same_tree(trained, load_peft(inner, spec)[0])
    (Path(out) / "checkpoints").rename(tmp_path / "elsewhere")
    alone = export(Request(out))
    assert alone == Path(out, "export", "peft")
    assert (alone / "adapter_model.safetensors").read_bytes() == (
        inner / "adapter_model.safetensors"
    ).read_bytes()
    assert "no checkpoints" in told("export", out, "--step", "4", "--force")


def test_weights_that_were_saved_on_a_mesh(run, configure):
    """Eight devices hold the arrays in pieces; they come back whole and without a mesh."""
    config = configure("trainable=full")
    params = load_params(config.model.path, load_spec(config.model.path), jnp.float32)
    params = jax.device_put(params, shard_tree(make_mesh(1, 4, 2), params))
    assert not params["blocks"]["mlp"]["up"]["kernel"].is_fully_replicated
    out, trained = run("trainable=full", trained=params)
    assert_same_tree(trained, jax.tree.map(np.asarray, open_source(out).weights))


def test_an_adapter_needs_no_weights_of_the_base(run, llama_base, tmp_path, monkeypatch):
    """A base on the hub: its weights are fetched for a merge, not for an adapter."""
    import huggingface_hub

    out, trained = run(f"model.path={llama_base}")
    asked = []

    def download(name, allow_patterns, **how):
        asked.append(name)
        kept = [p for pattern in allow_patterns for p in Path(llama_base).glob(pattern)]
        folder = tmp_path / str(len(asked))
        folder.mkdir()
        for path in set(kept):
            shutil.copy(path, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = export(Request(out, base="lab/base"))
    assert set(asked) == {"lab/base"} and not list(tmp_path.glob("[0-9]*/*.safetensors"))
    assert list((tmp_path / "1").glob("*.index.json"))
    assert_same_tree(trained, load_peft(folder, load_spec(llama_base))[0])
    assert "base_model: lab/base" in (folder / "README.md").read_text()
    merged = export(Request(out, base="lab/base", format="merged"))
    assert list(tmp_path.glob("[0-9]*/*.safetensors"))
    assert stored(merged).keys() == stored(llama_base).keys()


# --- whole models -------------------------------------------------------------------------------


def test_merged_weights_are_the_sum_rounded_once(run, llama_base):
    out, trained = run(f"model.path={llama_base}", "lora.layers=2..3", "lora.targets=[q,down]")
    folder = export(Request(out, format="merged", max_shard_size="40KB"))
    before, after = stored(llama_base), stored(folder)
    assert before.keys() == after.keys()
    changed = set()
    for name, weight in after.items():
        assert weight.dtype == ml_dtypes.bfloat16, name
        if not np.array_equal(weight, before[name]):
            changed.add(name)
    spec = load_spec(llama_base)
    expected = set()
    for block in (2, 3):
        stem = f"model.layers.{block - 1}"
        expected |= {f"{stem}.self_attn.q_proj.weight", f"{stem}.mlp.down_proj.weight"}
        a, b = (trained["blocks"]["mlp"]["down"][key][block - 1] for key in "ab")
        whole = before[f"{stem}.mlp.down_proj.weight"].astype(np.float64).T + 4.0 * (
            a.astype(np.float64) @ b.astype(np.float64)
        )
        near = after[f"{stem}.mlp.down_proj.weight"].astype(np.float64).T
        # Half a unit in the last of eight places, and the float32 of the sum.
        assert np.all(np.abs(near - whole) <= np.abs(whole) * 2.0**-8 + 1e-6)
        a, b = (trained["blocks"]["attention"]["q"][key][block - 1] for key in "ab")
        update = (a @ b.reshape(4, -1)).T
        near = after[f"{stem}.self_attn.q_proj.weight"].astype(np.float32)
        base_weight = before[f"{stem}.self_attn.q_proj.weight"].astype(np.float32)
        np.testing.assert_allclose(near, base_weight + 4.0 * update, rtol=2.0**-8, atol=1e-6)
    assert changed == expected
    assert spec.layers == 3
    files = names(folder)
    assert {"model.safetensors.index.json", "config.json", "generation_config.json"} <= files
    assert {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files
    assert sum(name.endswith(".safetensors") for name in files) > 3


@pytest.mark.parametrize(
    "words",
    [
        ("lora.scaling=rank_stabilised", "lora.ranks={down: 2, q: 8}", "lora.alphas={v: 3}"),
        ("lora.variant=dora", "lora.layers=1,3"),
    ],
    ids=["uneven", "dora"],
)
def test_merging_by_tensor_is_merging_as_a_whole(run, llama_base, words):
    out, _ = run(f"model.path={llama_base}", *words)
    source = open_source(out)
    folder = export(Request(out, format="merged"))
    params = load_params(llama_base, source.spec, jnp.bfloat16)
    whole = source.adapter.merge(params, source.weights)
    ours = load_params(folder, source.spec, jnp.bfloat16)
    assert_same_tree(jax.tree.map(np.asarray, whole), jax.tree.map(np.asarray, ours))
    bare = load_params(llama_base, source.spec, jnp.bfloat16)
    assert not np.array_equal(
        np.asarray(ours["blocks"]["mlp"]["down"]["kernel"]),
        np.asarray(bare["blocks"]["mlp"]["down"]["kernel"]),
    )


@pytest.mark.parametrize(("kind", "form"), [("nf4", "merged"), ("nf4", "peft"), ("none", "merged")])
def test_rounded_weights_of_a_training_are_told_where_full_ones_are_written(
    run, llama_base, tmp_path, capsys, kind, form
):
    out, _ = run(f"model.path={llama_base}", f"model.quantize={kind}")
    export(Request(out, format=form, out=str(tmp_path / "out")))
    told = " ".join(capsys.readouterr().out.split())
    assert ("was trained on nf4 weights" in told) == (kind == "nf4" and form == "merged")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype(run, llama_base, dtype):
    out, _ = run(f"model.path={llama_base}")
    folder = export(Request(out, format="merged", dtype=dtype))
    kinds = {weight.dtype.name for weight in stored(folder).values()}
    assert kinds == {dtype}
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    source = open_source(out)
    wide = load_params(llama_base, source.spec, jnp.float32)
    whole = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype),
                         source.adapter.merge(wide, source.weights))  # fmt: skip
    ours = load_params(folder, source.spec, getattr(jnp, dtype))
    assert_same_tree(whole, jax.tree.map(np.asarray, ours))


def test_all_weights_trained(run, llama_base, told):
    out, trained = run(f"model.path={llama_base}", "trainable=full")
    folder = export(Request(out, format="merged"))
    spec = load_spec(llama_base)
    ours = load_params(folder, spec, jnp.bfloat16)
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), trained)
    assert_same_tree(rounded, jax.tree.map(np.asarray, ours))
    exact = export(Request(out, format="merged", dtype="float32", out=f"{out}/exact"))
    ours = load_params(exact, spec, jnp.float32)
    assert_same_tree(trained, jax.tree.map(np.asarray, ours))
    assert "trained all weights" in told("export", out)


@pytest.mark.parametrize("what", ["lora", "full"])
def test_a_tree_for_jax(run, llama_base, what):
    import orbax.checkpoint as ocp

    out, _ = run(f"model.path={llama_base}", f"trainable={what}")
    folder = export(Request(out, format="orbax"))
    merged = export(Request(out, format="merged"))
    spec = load_spec(folder)
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((folder / "params").absolute())
    expected = load_params(merged, spec, jnp.bfloat16)
    assert_same_tree(jax.tree.map(np.asarray, expected), jax.tree.map(np.asarray, dict(tree)))
    assert {"config.json", "tokenizer.json", "README.md"} <= names(folder)


@pytest.fixture
def no_chat_model(base, tmp_path):
    """A base whose own end is that of texts; its template ends turns by another token."""
    folder = tmp_path / "bare"
    shutil.copytree(base, folder)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    for name, words in (
        ("config.json", {"eos_token_id": 0}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
    ):
        write_json(folder / name, read_json(folder / name) | words)
    return folder


def test_others_end_answers_where_training_did(run, no_chat_model, tmp_path):
    """Else transformers and vLLM go on behind the answer up to their longest."""
    out, _ = run(f"model.path={no_chat_model}")
    merged, whole = export(Request(out, format="merged")), tmp_path / "whole"
    merge([str(export(Request(out)))], [1.0], Recipe(), str(whole), into=str(no_chat_model))
    for folder in (merged, whole):
        assert read_json(folder / "generation_config.json")["eos_token_id"] == [0, 2]
        assert load_spec(folder).eos_ids == (0, 2)
    card = (Path(out) / "export" / "peft" / "README.md").read_text("utf-8")
    assert "max_new_tokens=128, eos_token_id=[0, 2])" in card
    assert '"stop_token_ids": [0, 2]' in card
    assert "eos_token_id" not in (merged / "README.md").read_text("utf-8")


def test_others_stop_by_one_file_alone(run, base, tmp_path):
    """Transformers takes no end token of config.json where generation_config.json is there."""
    folder = tmp_path / "two"
    shutil.copytree(base, folder)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    assert read_json(folder / "config.json")["eos_token_id"] == 2
    write_json(folder / "generation_config.json", {"eos_token_id": 0, "do_sample": True})
    out, _ = run(f"model.path={folder}")
    merged = export(Request(out, format="merged"))
    assert read_json(merged / "generation_config.json") == {
        "eos_token_id": [0, 2], "do_sample": True,
    }  # fmt: skip
    card = (export(Request(out)) / "README.md").read_text("utf-8")
    assert "eos_token_id=[0, 2])" in card and '"stop_token_ids": [0, 2]' in card
    again = tmp_path / "again"
    merge([str(Path(out, "export", "peft"))], [1.0], Recipe(), str(again))
    assert '"stop_token_ids": [0, 2]' in (again / "README.md").read_text("utf-8")


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TEXT = "wake me up at nine"


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["turns", "joined", "text"])
def test_the_card_s_code_answers_as_an_evaluation(run, base, jsonl, tmp_path, kind):
    """Token for token, on a base that samples, penalises and stops elsewhere by its own file."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    settings = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5, "eos_token_id": 0}
    write_json(folder / "generation_config.json", settings)
    words = ["prompt.system=Find the slots."]
    if kind == "joined":
        file = folder / "chat_template.jinja"
        file.write_text(NO_SYSTEM + file.read_text("utf-8"), "utf-8")
    if kind == "text":
        rows = [
            {"prefix": f"{number}: {TEXT}", "text": " no", "lang": "en"} for number in range(32)
        ]
        words = ["task.kind=rows", f"task.train=[{jsonl('r.jsonl', rows)}]", "align.weight=0"]
    out, _ = run(f"model.path={folder}", "generate.max_new_tokens=24", *words)
    adapter = export(Request(out))

    card = (adapter / "README.md").read_text("utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", card, re.S))
    for name, value in (
        ("PATH/TO/THE/BASE", str(folder)),
        ("PREFIX", TEXT),
        ('"system", "content": "..."', '"system", "content": "Find the slots."'),
        ("INSTRUCTION", "Find the slots."),
        ('..."', f'{TEXT}"'),
    ):
        code = code.replace(name, value)
    found = {}
    exec(code, found)
    theirs = found["answer"][0, found["inputs"]["input_ids"].shape[1] :].tolist()

    config = saved_in(Path(out, "config.yaml"))
    opened = open_base(config)
    system = opened.wear(str(adapter))
    example = Example(TEXT, answer="", system=None if kind == "text" else "")
    prompts, _ = opened.encode(
        [example], dataclasses.replace(system.prompts, system=config.prompt.system)
    )
    (_, (ours,)) = next(iter(system.chunks(prompts, decoding_of(config), 1)))
    assert len(ours) > 3 and theirs[: len(ours)] == ours
    assert all(token in system.stops for token in theirs[len(ours) :])


def test_settings_of_generation_that_say_it_stay(tmp_path):
    file = tmp_path / "generation_config.json"
    spec = dataclasses.replace(SPEC, bos_id=1)
    assert generation_files(file, spec, (2,)) == {}  # config.json says it
    assert json.loads(generation_files(file, spec, (2, 5))[file.name]) == {
        "bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0,
    }  # fmt: skip
    write_json(file, {"eos_token_id": 2, "temperature": 0.6})
    assert generation_files(file, spec, (2,)) == {}
    found = json.loads(generation_files(file, spec, (2, 5))[file.name])
    assert found == {"eos_token_id": [2, 5], "temperature": 0.6}


def test_transformers_loads_it_and_agrees_with_peft(run, llama_base):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = run(f"model.path={llama_base}")
    adapter, merged = export(Request(out)), export(Request(out, format="merged", dtype="float32"))
    model, report = AutoModelForCausalLM.from_pretrained(
        merged, output_loading_info=True, dtype="auto"
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [3, 0]
    bare = AutoModelForCausalLM.from_pretrained(llama_base, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(adapter).apply_chat_template(
        [{"role": "user", "content": "wake me up"}], return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        alone = bare(tokens).logits.clone()
        beside = peft.PeftModel.from_pretrained(bare, adapter)(tokens).logits
        assert (model(tokens).logits - beside).abs().max() < 1e-4
        assert (beside - alone).abs().max() > 0.1


# --- the small things ---------------------------------------------------------------------------


def test_sizes():
    assert parse_size("5GB") == 5_000_000_000
    assert parse_size("1.5 mb") == 1_500_000
    assert parse_size("700") == 700
    assert parse_size("2G") == 2_000_000_000


def test_where_it_goes(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert default_out(f"{tmp_path}/run/", "peft") == tmp_path / "run" / "export" / "peft"
    assert default_out(f"{tmp_path}/adapter", "merged") == tmp_path / "adapter_merged"
    assert default_out("someone/adapter", "merged") == Path("adapter_merged")


def test_a_checkpoint_of_another_version(run, configure):
    """Settings that this version does not know mean nothing to an export."""
    from jaxalign.export.source import config_of

    config = configure()
    meta = {"config": dataclasses.asdict(config)}
    meta["config"]["later"] = {"thing": 1}
    meta["config"]["lora"]["novelty"] = 3
    del meta["config"]["generate"]
    again = config_of(meta)
    assert again.lora == config.lora
    assert again.task.train == config.task.train
