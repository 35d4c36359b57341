"""A tokenizer's class is known without AutoTokenizer, which imports PyTorch; it is the same one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from jaxalign.data.chat import encode_examples, encode_texts
from jaxalign.data.example import Example
from jaxalign.data.tokenizer import CLASSES, load_tokenizer

TEXTS = ["wake me up at nine", "Regnet es heute?  <|eot_id|>", "ß 99"]


def named(folder, family, kind, **more):
    """The folder, as one of this family whose tokenizer names this class."""
    path = Path(folder)
    said = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    said = said | {"tokenizer_class": kind} | more
    (path / "tokenizer_config.json").write_text(json.dumps(said), "utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": family}), "utf-8")
    return folder


@pytest.fixture
def folder(tmp_path, build_tokenizer):
    special = ["<unk>", "<|eot_id|>", "<bos>"]
    return build_tokenizer(tmp_path / "own", special, eos="<|eot_id|>", bos="<bos>")


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("end", ["Fast", ""])
def test_the_class_is_that_of_autotokenizer(folder, family, end, monkeypatch):
    kind = CLASSES[family].removesuffix("Fast") + end
    named(folder, family, kind)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(transformers, "AutoTokenizer", None)  # is not asked
    own = load_tokenizer(folder)
    assert type(own) is type(auto)
    assert own(TEXTS)["input_ids"] == auto(TEXTS)["input_ids"]
    assert own.eos_token == auto.eos_token and own.bos_token == auto.bos_token


@pytest.mark.parametrize(
    ("family", "kind", "more"),
    [
        ("qwen2", "PreTrainedTokenizerFast", {}),
        ("llama", "LlamaTokenizerFast", {}),
        ("llama", "PreTrainedTokenizerFast", {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
        ([], "PreTrainedTokenizerFast", {}),
    ],
)
def test_autotokenizer_is_asked_about_the_rest(folder, family, kind, more, monkeypatch):
    def found(path, trust_remote_code):
        raise ValueError("asked")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", found)
    with pytest.raises(Exception, match="asked"):
        load_tokenizer(named(folder, family, kind, **more))


def test_texts_are_cut_on_the_right_whatever_the_tokenizer_says(folder):
    """Cut on the left, a row loses tokens of its prompt, and the first of its answer the loss."""
    whole = load_tokenizer(folder)
    row = Example("wake me up at nine", " intent: alarm/set", origin="x:1")
    (full,) = encode_examples([row], whole)
    named(folder, "llama", "PreTrainedTokenizerFast", truncation_side="left")
    file = Path(folder) / "tokenizer_config.json"
    says = file.read_bytes()
    tokenizer, limit = load_tokenizer(folder), len(full.tokens) - 3
    (cut,) = encode_examples([row], tokenizer, max_length=limit)
    assert cut.tokens.tolist() == full.tokens[:limit].tolist() and cut.prompt == full.prompt
    (side,), _ = encode_texts(["wake me up at nine"], tokenizer, 3)
    assert side.tolist() == whole("wake me up at nine")["input_ids"][:3]
    assert file.read_bytes() == says  # and whoever takes the files along takes them as they are


def test_data_show_imports_neither_jax_nor_torch():
    code = (
        "import sys; from jaxalign.cli import main\n"
        "assert main(['data', 'show', 'configs/demo.yaml', 'align.weight=0', "
        "'task.train=[\"${demo:data/dev.en.jsonl}\"]']) == 0\n"
        "assert not {'jax', 'torch'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "79 rows" in done.stdout
