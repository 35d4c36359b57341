"""Nothing of a model, an adapter or a tokenizer runs, and nothing is read or written elsewhere."""

import json
import pickle
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.checksums import SUMS
from jaxalign.data.chat import load_tokenizer
from jaxalign.errors import UserError
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.save import copy_files
from tests.hf.conftest import random_lora
from tests.tiny import SPEC, base

__all__ = ["base"]

CODE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Own:\n    pass\n"
MAP = {
    "AutoTokenizer": ["own.Own", None],
    "AutoConfig": "own.Own",
    "AutoModelForCausalLM": "own.Own",
}


class Touch:
    """Runs when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path(self.marker).touch, ()


@pytest.fixture
def hostile(base, tmp_path):
    """A sound model with code beside it, and the file that would tell that it ran."""
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(base, folder)
    (folder / SUMS).unlink()
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": MAP}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(str(marker))))
    yield folder, marker
    assert not marker.exists()


def test_code_of_a_model_folder_is_not_run(hostile, monkeypatch):
    folder, _ = hostile
    monkeypatch.setattr("builtins.input", lambda *words: "y")  # whoever is asked says yes
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("one two")["input_ids"]
    load_params(folder, load_spec(folder), jnp.float32)


@pytest.mark.parametrize("kind", ["Own", "GhostTokenizer"])
def test_a_tokenizer_that_is_code_is_refused(hostile, monkeypatch, kind):
    folder, _ = hostile
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    config = {"tokenizer_class": kind, "auto_map": MAP}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"model_type": "own"}))
    try:
        load_tokenizer(str(folder))  # the tokenizer.json alone may be enough for transformers
    except UserError as error:
        assert "\n" not in str(error)


def test_pickles_are_not_opened(hostile):
    folder, marker = hostile
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pickled \.bin weights can run code"):
        load_params(folder, SPEC, jnp.float32)
    save_peft(folder / "adapter", random_lora(SPEC), SPEC, Lora(4))
    (folder / "adapter" / SUMS).unlink()
    shutil.move(folder / "adapter" / "adapter_model.safetensors", folder / "kept")
    (folder / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Touch(str(marker))))
    with pytest.raises(UserError, match=r"pickled \.bin weights can run code"):
        load_peft(folder / "adapter", SPEC)
    # A pickle, a zip file or a gzip under the name of safetensors is none.
    for content in (pickle.dumps(Touch(str(marker))), b"PK\x03\x04" + bytes(100), b"\x1f\x8b" * 60):
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a safetensors file"):
            load_peft(folder / "adapter", SPEC)


def test_links_out_of_a_folder_are_not_copied(base, tmp_path):
    """A folder from anyone, exported and pushed: what its links lead to would be published."""
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"tokenizer\.json: is a link to .*id_rsa, outside"):
        copy_files(folder, out, ("tokenizer*",))
    assert not list(out.iterdir())
    (folder / "tokenizer.json").unlink()
    (folder / "real.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to("real.json")
    copy_files(folder, out, ("tokenizer*",))
    assert not (out / "tokenizer.json").is_symlink()


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1234")
    (tmp_path / "out").mkdir()
    copy_files(snapshot, tmp_path / "out", ("tokenizer*",))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_remote_code_is_nowhere_allowed():
    """Every call of transformers that loads something says so itself."""
    import ast

    import jaxalign

    calls = 0
    for file in Path(jaxalign.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(
                node.func, ast.Attribute) else ""  # fmt: skip
            if name == "from_pretrained" and "Peft" not in ast.unparse(node.func):
                calls += 1
                allowed = {one.arg: ast.unparse(one.value) for one in node.keywords}
                assert allowed.get("trust_remote_code") == "False", f"{file}:{node.lineno}"
    assert calls >= 2
