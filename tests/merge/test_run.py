"""The command: what it writes, prints and refuses."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.adapters.lora import Lora
from jaxalign.checksums import SUMS
from jaxalign.cli import main
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.save import save_base
from jaxalign.merge.methods import METHODS
from jaxalign.merge.tell import serving
from tests.hf.conftest import LLAMA, random_params
from tests.merge.conftest import KINDS, assert_same_updates, part, tree, weighted_sum
from tests.tiny import of_run


def refusal(capsys, *words) -> str:
    """What the command prints where it refuses."""
    assert main(["merge", *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("jaxalign: ") and told.count("\n") == 1
    return told.strip()


def run(*words):
    assert main(["merge", *map(str, words)]) == 0


class Found:
    """What a written folder holds."""

    def __init__(self, folder):
        self.lora, self.adapter = load_peft(folder, LLAMA)


def test_two_adapters(folders, tmp_path, capsys):
    (folders["plain"] / "chat_template.jinja").write_text("{{ messages }}")
    run(folders["plain"], folders["upper"], "--weights=-0.5,1.5", "--out", tmp_path / "out")
    parts = [part("plain", -0.5), part("upper", 1.5)]
    assert_same_updates(Found(tmp_path / "out"), weighted_sum(parts))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    assert not config["use_rslora"] and not config.get("rank_pattern")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == "delta" and record["relative_error"] == 0
    assert [one["weight"] for one in record["adapters"]] == [-0.5, 1.5]
    assert record["adapters"][0]["digest"] != record["adapters"][1]["digest"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LoRA adapter of a local base, `model`, made of 2 adapters." in card
    assert "base_model" not in card and "tags:\n- lora\n- merge\n" in card
    assert "| adapter | weight | rank |\n| --- | --- | --- |\n| plain | -0.5 | 4 |" in card
    assert "| upper | 1.5 | 3 |" in card and "| method | delta |\n| rank | 7 |" in card
    assert "--max-lora-rank 8 " in card and "--chat-template chat_template.jinja" in card
    for word in ("density", "seed", "left out", "Training", "Data", "None"):
        assert word not in card
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "rank 7 is not one of vLLM's --max-lora-rank values (1, 8, 16, 32, 64, 128, 256, 320, 512)"
        in told
    )
    assert "serve it with 8, which pads it" in told and "--method svd" not in told
    assert "warning" not in told


def test_one_adapter_is_copied_bit_by_bit(folders, tmp_path):
    for kind, folder in folders.items():
        out = tmp_path / f"{kind}_again"
        run(folder, "--out", out)
        ours = (out / "adapter_model.safetensors").read_bytes()
        assert ours == (folder / "adapter_model.safetensors").read_bytes()
        config = (out / "adapter_config.json").read_text()
        assert config == (folder / "adapter_config.json").read_text()


def test_what_a_rank_costs_is_told(folders, tmp_path, capsys):
    run(folders["plain"], folders["upper"], "--weights", "1,1", "--method", "svd", "--rank", 2,
        "--out", tmp_path / "out")  # fmt: skip
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    lost = whole = 0.0
    for (target, block), delta in weighted_sum([part("plain"), part("upper")]).items():
        s = np.linalg.svd(delta, compute_uv=False)
        error = np.sqrt(np.sum(s[2:] ** 2) / np.sum(s**2))
        assert record["modules"][target][str(block)] == pytest.approx(error, abs=1e-6)
        lost, whole = lost + np.sum(s[2:] ** 2), whole + np.sum(s**2)
    assert record["relative_error"] == pytest.approx(np.sqrt(lost / whole), abs=1e-6)
    told = capsys.readouterr().out
    assert f"(Frobenius norm): {np.sqrt(lost / whole):.2%}" in told
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| method | svd |\n| rank | 2 |" in card
    assert f"| left out by the rank | {np.sqrt(lost / whole):.2%} of the update" in card
    assert "left out by rank" in told and "worst block" in told


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_writes_and_help_names_it(folders, tmp_path, method, capsys):
    words = ["--density", 0.5] if "density" in METHODS[method].reads else []
    words += ["--blocks", "1,3"] if "blocks" in METHODS[method].reads else []
    run(folders["plain"], folders["equal"], "--weights", "0.5,0.5", "--method", method, *words,
        "--out", tmp_path / "out")  # fmt: skip
    assert Found(tmp_path / "out").adapter.scale == 1
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert method in capsys.readouterr().out


def test_into_the_base(folders, tmp_path, capsys):
    base, out = tmp_path / "model", tmp_path / "merged"
    (base / "tokenizer_config.json").write_text("{}")
    run(folders["plain"], folders["upper"], "--weights", "0.6,-0.4", "--into-base", base,
        "--out", out)  # fmt: skip
    spec = load_spec(out)
    assert (spec.dim, spec.layers) == (LLAMA.dim, LLAMA.layers)
    ours, plain = (load_params(folder, LLAMA, np.float32) for folder in (out, base))
    for (target, block), delta in weighted_sum([part("plain", 0.6), part("upper", -0.4)]).items():
        site = "attention" if target in "qkvo" else "mlp"
        kernel, before = (
            np.asarray(tree["blocks"][site][target]["kernel"][block - 1]) for tree in (ours, plain)
        )
        np.testing.assert_allclose(kernel - before, delta.reshape(kernel.shape), atol=1e-6)
    np.testing.assert_array_equal(ours["embed"], plain["embed"])
    assert (out / "tokenizer_config.json").is_file()
    assert "0.6 x" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "Model of a local base, `model`, with 2 adapters added." in card
    assert "| plain | 0.6 | 4 |\n| upper | -0.4 | 3 |" in card and "| method | delta |" in card
    assert "library_name: transformers" in card and "lora" not in card
    # No template is known: the tokenizer has none.
    assert "apply_chat_template" not in card


def test_whole_updates_into_the_base_and_their_dice_are_on_the_card(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"chat_template": "{{ messages }}"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    run("plain", "equal", "--weights", "1,0", "--method", "dare", "--density", 0.3, "--seed", 7,
        "--into-base", "model", "--out", "out")  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`model`, with one adapter added." in card and "| equal | 0 | 4 |" in card
    assert "| method | dare |\n| density | 0.3 |\n| seed | 7 |\n" in card
    assert "| rank |" not in card.replace("| weight | rank |", "")  # nothing was cut
    assert 'from_pretrained("out"' in card and "apply_chat_template" in card


@pytest.mark.parametrize("rank", [None, 4])
def test_svd_into_the_base_is_cut_by_a_rank_only(folders, tmp_path, rank):
    words = [folders["plain"], folders["upper"], "--weights", "0.6,-0.4"]
    into = ["--into-base", tmp_path / "model"]
    run(*words, *into, "--out", tmp_path / "exact")
    cut = ["--rank", rank] if rank else []
    run(*words, *into, *cut, "--method", "svd", "--out", tmp_path / "svd")
    exact, ours, plain = (
        load_file(tmp_path / name / "model.safetensors") for name in ("exact", "svd", "model")
    )
    worst = 0.0
    for name, tensor in exact.items():
        scale = np.abs(tensor - plain[name]).max() or 1
        worst = max(worst, np.abs(ours[name] - tensor).max() / scale)
    assert worst > 0.1 if rank else worst < 1e-5
    card = (tmp_path / "svd" / "README.md").read_text().replace("| weight | rank |", "")
    assert ("| rank | 4 |\n| left out by the rank |" in card) == bool(rank)
    assert ("| rank |" in card) == bool(rank)


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """The base as `lab/base` on the hub; what was asked for, one folder with just that each."""
    folder, asked = tmp_path / "model", []
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("the base's")

    def download(name, allow_patterns, **how):
        assert name == "lab/base"
        asked.append(tmp_path / "hub" / str(len(asked)))
        asked[-1].mkdir(parents=True)
        for path in {path for pattern in allow_patterns for path in folder.glob(pattern)}:
            shutil.copy(path, asked[-1])
        return str(asked[-1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def fetched(hub):
    """Whether weights have come from the hub."""
    return any(any(folder.glob("*.safetensors")) for folder in hub)


def test_a_base_on_the_hub_is_fetched_where_its_weights_are_needed(folders, hub, tmp_path, capsys):
    lora, adapter = load_peft(folders["upper"], LLAMA)
    save_peft(tmp_path / "named", lora, LLAMA, adapter, base_name="lab/base")
    words = (tmp_path / "named", folders["plain"], "--weights", "1,1")
    run(*words, "--out", tmp_path / "out")
    assert hub and not fetched(hub)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: lab/base\n" in card and "| named | 1 | 3 |" in card
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the base's"
    # An adapter's own template is what its prompts looked like.
    (folders["plain"] / "chat_template.jinja").write_text("its own")
    run(*words, "--out", tmp_path / "own")
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == "its own"
    # A mistake costs no download of weights either.
    into = ("--into-base", "lab/base", "--out", tmp_path / "model_out")
    refusal(capsys, *words, "--method", "svd", "--rank", 99, *into)
    assert not fetched(hub)
    run(*words, *into)
    assert fetched(hub)
    card = (tmp_path / "model_out" / "README.md").read_text()
    assert "base_model: lab/base\n" in card and "base_model_relation: finetune\n" in card


def test_a_base_with_other_weights_than_in_training_is_refused(folders, tmp_path, capsys):
    """By the record of the adapter's run, as `export` does."""
    base = tmp_path / "model"
    adapter = of_run(folders["plain"], tmp_path / "run", base)
    run(adapter, "--into-base", base, "--out", tmp_path / "merged")
    shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(base)
    save_base(base, random_params(LLAMA), LLAMA)  # another model by the same name
    message = f"{adapter} was trained on another base than {base} (it was {base}, with other"
    for words in ((adapter, "--into-base", base), (folders["upper"], adapter, "--weights=1,1")):
        assert message in refusal(capsys, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(adapter, "--into-base", tmp_path / "copy", "--out", tmp_path / "out")


def test_an_adapter_that_learnt_on_rounded_weights(folders, tmp_path, capsys):
    """It is told where the base's own weights are written, not where an adapter is."""
    adapter = of_run(folders["plain"], tmp_path / "run", tmp_path / "model", "nf4")
    sentence = f"{adapter} was trained on nf4 weights of its base (model.quantize) and is used with"
    run(adapter, folders["upper"], "--weights=1,1", "--out", tmp_path / "adapters")
    assert "nf4" not in capsys.readouterr().out
    run(adapter, "--into-base", tmp_path / "model", "--out", tmp_path / "whole")
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_a_stored_dtype_is_kept(folders, tmp_path):
    import jax.numpy as jnp

    base, out = tmp_path / "half", tmp_path / "merged"
    save_base(base, random_params(LLAMA, jnp.bfloat16), LLAMA)
    run(folders["plain"], "--into-base", base, "--out", out)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_params(out, LLAMA, jnp.bfloat16)["embed"].dtype == jnp.bfloat16


def test_one_base_by_two_names_is_no_doubt(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(folders["plain"], "--into-base", "model", "--out", "out")
    assert "warning" not in capsys.readouterr().out


def test_doubts_are_told(folders, tmp_path, capsys):
    lora, adapter = load_peft(folders["upper"], LLAMA)
    save_peft(tmp_path / "other", lora, LLAMA, adapter, base_name="some/other-base",
              texts={"chat_template.jinja": "b"})  # fmt: skip
    (folders["plain"] / "chat_template.jinja").write_text("a")
    run(folders["plain"], tmp_path / "other", "--weights", "1,1", "--out", tmp_path / "out")
    told = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'other'} names some/other-base as its base, not {tmp_path}/model;" in told
    assert "different chat templates" in told
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "a"


def test_the_template_that_is_written_is_named(folders, tmp_path, capsys):
    (folders["upper"] / "chat_template.jinja").write_text("b")
    (folders["equal"] / "chat_template.jinja").write_text("c")
    three = folders["plain"], folders["upper"], folders["equal"]  # the first has none
    for weights, written, named in [("1,1,1", "b", "upper"), ("1,0,1", "c", "")]:
        run(*three, "--weights", weights, "--out", tmp_path / "out", "--force")
        told = " ".join(capsys.readouterr().out.split())
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == written
        assert ("different chat templates" in told) == bool(named)
        assert not named or f"different chat templates; {folders[named]}'s is written" in told


def test_force_replaces(folders, tmp_path, capsys):
    out = tmp_path / "out"
    run(folders["plain"], "--out", out)
    told = refusal(capsys, folders["equal"], "--out", out)
    assert told.startswith(f"jaxalign: {out}: ") and "--force" in told
    run(folders["equal"], "--out", out, "--force")
    assert Found(out).adapter == KINDS["equal"][0]
    # As a whole: what an older merge wrote does not stay beside the new weights.
    (folders["plain"] / "chat_template.jinja").write_text("a")
    run(folders["plain"], "--out", out, "--force")
    assert (out / "chat_template.jinja").is_file()
    run(folders["equal"], "--out", out, "--force")
    assert not (out / "chat_template.jinja").exists()
    run(folders["equal"], "--into-base", tmp_path / "model", "--out", out, "--force")
    assert (out / "config.json").is_file() and not (out / "adapter_config.json").exists()
    told = refusal(capsys, folders["equal"], "--out", folders["equal"].parent, "--force")
    assert "would remove" in told or "holds other files" in told
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years")
    told = refusal(capsys, folders["plain"], "--out", stranger, "--force")
    assert "no adapter_config.json" in told
    assert (stranger / "thesis.tex").read_text() == "years"


def spoiled(folders, change):
    file = folders["upper"] / "adapter_model.safetensors"
    (file.parent / SUMS).unlink()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_factor_that_is_not_finite(folders, tmp_path, capsys):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    spoiled(folders, lambda tensors: tensors[name].__setitem__((0, 0), np.nan))
    told = refusal(capsys, folders["plain"], folders["upper"], "--weights", "1,1",
                   "--out", tmp_path / "out")  # fmt: skip
    assert name in told and "NaN or infinity" in told
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_base(folders, tmp_path, capsys):
    import dataclasses

    wide = dataclasses.replace(LLAMA, dim=64)
    adapter = Lora(4, 8.0, 0.0, ("q", "v"))
    save_peft(tmp_path / "wide", tree(adapter, 1, spec=wide), wide, adapter, base_name="wide/base")
    told = refusal(capsys, folders["plain"], tmp_path / "wide", "--weights", "1,1",
                   "--out", tmp_path / "out")  # fmt: skip
    assert "layers.0.self_attn.q_proj.lora_A.weight has shape [4, 64]" in told
    assert "[4, 32]" in told and "another base" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "1"], "--weights: 1 for 2 adapters"),
        (["--weights", "1,2,3"], "--weights: 3 for 2 adapters"),
        ([], "--weights is missing"),
        (["--weights", "a,b"], "--weights: cannot read 'a,b'"),
        (["--weights", "0,0"], "--weights: all are 0"),
        (["--weights", "nan,1"], "--weights: nan for"),
        (["--weights", "1,1", "--method", "svd", "--rank", "9"], "the exact sum has rank 7"),
        (["--weights", "1,1", "--method", "avrage"], "--method: 'avrage'"),
        (["--weights", "1,1", "--base", "nowhere/at/all"], "nowhere/at/all"),
        (["--weights", "1,1", "--base", "a/b", "--into-base", "c/d"], "--base: --into-base c/d is"),
        (["--weights", "1,1", "--seed", "1"], "--seed: delta has no use for it; it is read by"),
        (["--search", "x.yaml", "--method", "ties", "--density", "0.5", "--seed", "7"],
         "--seed: ties has no use for it"),
        (["--weights", "1,1", "--grid", "0,1"], "belong to --search CONFIG"),
        (["--weights", "1,1", "align.layer=2"], "belong to --search CONFIG"),
        (["--weights", "1,1", "--search", "x.yaml"], "leave out --weights, --base and --into-base"),
    ],
)  # fmt: skip
def test_commands_that_cannot_be_followed(folders, tmp_path, capsys, words, message):
    told = refusal(capsys, folders["plain"], folders["upper"], *words, "--out", tmp_path / "out")
    assert message in told
    assert not (tmp_path / "out").exists()


def test_a_density_is_a_share(folders, tmp_path, capsys):
    words = ["merge", folders["plain"], "--method", "ties", "--density", "1.5"]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "--density: 1.5 " in capsys.readouterr().err


def test_an_adapter_is_not_written_onto_itself(folders, capsys):
    told = refusal(capsys, folders["plain"], "--out", folders["plain"], "--force")
    assert "is read by this merge" in told


def test_a_base_that_nobody_names(folders, tmp_path, capsys):
    lora, adapter = load_peft(folders["upper"], LLAMA)
    save_peft(tmp_path / "anonymous", lora, LLAMA, adapter)
    told = refusal(capsys, tmp_path / "anonymous", "--out", tmp_path / "out")
    assert "--base MODEL" in told
    save_peft(tmp_path / "lost", lora, LLAMA, adapter, base_name=str(tmp_path / "gone"))
    told = refusal(capsys, tmp_path / "lost", "--out", tmp_path / "out")
    assert "cannot be read" in told and "--base MODEL" in told
    run(tmp_path / "lost", "--base", tmp_path / "model", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (16, "vLLM serves it with --max-lora-rank 16"),
        (24, "serve it with 32, which pads it, or cut it by --method svd --rank 16"),
        (600, "vLLM serves ranks up to 512, and this one is 600"),
    ],
)
def test_what_vllm_needs(rank, words):
    assert words in serving(Lora(rank, float(rank)))
