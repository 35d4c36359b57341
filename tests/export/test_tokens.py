"""Adapters that come with a tokenizer of their own, and what the base's knows of its tokens."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxalign import base as bases
from jaxalign.adapters import Lora
from jaxalign.base import open_base
from jaxalign.checksums import SUMS
from jaxalign.config import load
from jaxalign.data.tasks import Example
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import UserError
from jaxalign.hf.peft import save_peft
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from tests.export.conftest import random_adapter
from tests.tiny import SPEC

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
FILE = "tokenizer.json"


@pytest.fixture
def padded(base, tmp_path):
    """A base with more rows of embeddings than tokens, and an adapter for it."""
    spec, lora = dataclasses.replace(SPEC, vocab=960), Lora(4, 8.0, targets=("q", "v"))
    params, (folder, adapter) = (
        Decoder(spec).init(jax.random.key(0)),
        (tmp_path / "b", tmp_path / "a"),
    )
    save_base(folder, params, spec, tokenizer_from=base)
    save_peft(adapter, random_adapter(lora, spec, params, 1), spec, lora, base_name=str(folder))
    (folder / SUMS).unlink()  # as most folders of the hub
    return folder, adapter


def opened(base, tmp_path):
    return open_base(load(None, [f"model.path={base}", f"output={tmp_path}"]).config)


def test_tokens_that_the_base_does_not_know(padded, tmp_path, told, done):
    """They lie in spare rows of the embeddings; the base's tokenizer would cut them into pieces."""
    base, adapter = padded
    own = load_tokenizer(str(base))
    own.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|stop|>"]})
    own.chat_template = TEMPLATE
    own.save_pretrained(adapter)
    out = tmp_path / "out"
    message = f"{adapter}: its tokenizer has the token '<|turn|>' with id 900, but the tokenizer of"
    for words in (
        ("export", adapter, "--format", "merged"),
        ("export", adapter, "--format", "orbax"),
        ("import", adapter, "--base", base),
        ("merge", adapter, "--into-base", base),
        ("merge", adapter),
    ):
        assert f"{message} {base} does not" in told(*words, "--out", out)
    assert not out.exists()
    with pytest.raises(UserError, match=r"copy of that base's folder .* as the base \(model\.path"):
        opened(base, tmp_path).wear(str(adapter))
    done("export", adapter, "--out", out)  # with its own tokenizer
    assert (out / FILE).read_bytes() == (adapter / FILE).read_bytes()
    # The way out.
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    for file in adapter.glob("tokenizer*"):
        shutil.copy(file, copy)
    words = ("--format", "merged", "--base", copy, "--out", tmp_path / "merged", "--verify")
    done("export", adapter, *words)
    asked = [{"role": "user", "content": "hi"}]
    prompt = own.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    written = load_tokenizer(str(tmp_path / "merged"))
    again = written.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert again == prompt and 900 in prompt
    system = opened(copy, tmp_path).wear(str(adapter))
    example = Example("hi", answer="", system="")
    ids, _ = opened(copy, tmp_path).encode([example], system.prompts)
    assert list(ids[0]) == prompt and 901 in system.stops


def test_a_tokenizer_that_was_saved_again(padded, tmp_path, monkeypatch):
    """The same tokens in other files: nothing of it is loaded."""
    base, adapter = padded
    content = json.loads((base / FILE).read_text("utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst",
                             "stride": 0}  # fmt: skip
    (adapter / FILE).write_text(json.dumps(content), "utf-8")
    loaded = []
    monkeypatch.setattr(bases, "load_tokenizer", lambda *a: loaded.append(a) or load_tokenizer(*a))
    opened(base, tmp_path).opened.adapter(adapter)
    assert loaded == [(str(base), None)]
    shutil.copy(base / FILE, adapter)
    opened(base, tmp_path).opened.adapter(adapter)
    assert len(loaded) == 1  # the same bytes


def test_a_token_for_padding_may_be_unknown(padded, tmp_path):
    """Scripts that train adapters add one; no prompt has it."""
    base, adapter = padded
    own = load_tokenizer(str(base))
    own.add_special_tokens({"pad_token": "[PAD]"})
    own.save_pretrained(adapter)
    assert "[PAD]" in (adapter / FILE).read_text("utf-8")
    opened(base, tmp_path).opened.adapter(adapter)
    own.add_tokens(["<|turn|>"])
    own.save_pretrained(adapter)
    with pytest.raises(UserError, match=r"has the token '<\|turn\|>'"):
        opened(base, tmp_path).opened.adapter(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["added_tokens"][0].update(id=950), "with id 950"),
        (lambda c: c.pop("model"), "cannot be read as a tokenizer"),
        # The tokens of Unigram are a list.
        (lambda c: c["model"].update(vocab=[["<x>", 0.0]]), "'<x>' with id 0"),
    ],
)
def test_tokens_with_other_numbers(padded, tmp_path, change, message):
    base, adapter = padded
    content = json.loads((base / FILE).read_text("utf-8"))
    change(content)
    Path(adapter, FILE).write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=message):
        opened(base, tmp_path).opened.adapter(adapter)
