"""Every file of models and adapters, damaged in every way: nothing is loaded silently.

The short sweep is of CI; `-m slow -s` prints the table of the whole one.
"""

import random
import shutil
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.checksums import SUMS
from jaxalign.data.chat import load_tokenizer
from jaxalign.data.template import stored
from jaxalign.errors import UserError
from jaxalign.hf.load import fingerprint, load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.save import save_base
from tests.hf.conftest import assert_same_tree, random_lora, random_params
from tests.tiny import SPEC, base

__all__ = ["base"]


def read_model(folder):
    """All that a command takes from a model's folder."""
    spec = load_spec(folder)
    tokenizer = load_tokenizer(str(folder))
    params = load_params(folder, spec, jnp.float32)
    return (spec, fingerprint(folder), tokenizer.get_vocab(), tokenizer("wake me up").input_ids,
            stored(folder)), params  # fmt: skip


def read_adapter(folder):
    lora, adapter = load_peft(folder, SPEC)
    return (adapter, stored(folder)), lora


def damages(content: bytes, flips: int, dice: random.Random):
    """(what was done, the bytes that are left; None: no file)"""
    yield "deleted", None
    yield "emptied", b""
    for keep in (1, len(content) // 2, len(content) - 1):
        yield "cut short", content[:keep]
    for _ in range(flips):
        bit = dice.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield "flipped", bytes(flipped)


def sweep(folder, work, read, flips: int) -> Counter:
    """(file, damage, what happened) -> how often."""
    truth = read(folder)
    found: Counter = Counter()
    dice = random.Random(0)
    for file in sorted(path.name for path in folder.iterdir()):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        content = (folder / file).read_bytes()
        for what, left in damages(content, flips, dice):
            (work / file).unlink(missing_ok=True)
            if left is not None:
                (work / file).write_bytes(left)
            try:
                facts, arrays = read(work)
            except UserError as error:
                assert "\n" not in str(error)
                found[file, what, "refused"] += 1
                continue
            assert facts == truth[0], (file, what)
            assert_same_tree(arrays, truth[1])
            found[file, what, "unharmed"] += 1
        (work / file).write_bytes(content)
    return found


@pytest.fixture
def folders(base, tmp_path):
    save_base(tmp_path / "model", random_params(SPEC), SPEC, max_shard_bytes=60_000,
              tokenizer_from=base)  # fmt: skip
    save_peft(tmp_path / "adapter", random_lora(SPEC), SPEC, Lora(4),
              texts={"chat_template.jinja": "{{ messages }}", "README.md": "a card"})  # fmt: skip
    return {"model": tmp_path / "model", "adapter": tmp_path / "adapter"}


@pytest.mark.parametrize(
    ("kind", "flips"),
    [
        ("model", 2),
        ("adapter", 12),
        pytest.param("model", 200, marks=pytest.mark.slow),
        pytest.param("adapter", 200, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_loaded_silently(folders, tmp_path, kind, flips):
    read = {"model": read_model, "adapter": read_adapter}[kind]
    found = sweep(folders[kind], tmp_path / "work", read, flips)
    for (file, what, end), number in sorted(found.items()):
        print(f"{kind:8} {file:36} {what:10} {end:9} {number:5}")
    # The list itself and what nobody loads may change without harm; all else is refused.
    harmless = {"README.md", SUMS, "special_tokens_map.json", "chat_template.jinja"}
    passed = {file for file, _, end in found if end == "unharmed"}
    assert passed <= harmless, passed
    assert any(end == "refused" for file, _, end in found if file == SUMS)


def test_a_folder_without_hashes_is_never_a_traceback(folders, tmp_path):
    """A stranger's folder: a flip in a number's last bits cannot be seen, but nothing crashes."""
    for kind, read in (("adapter", read_adapter),):
        folder = folders[kind]
        (folder / SUMS).unlink()
        dice = random.Random(1)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            content = (folder / file).read_bytes()
            header = 4000 if file.endswith("safetensors") else len(content)
            for what, left in damages(content[:header], 60, dice):
                (folder / file).unlink(missing_ok=True)
                if left is not None:
                    (folder / file).write_bytes(left + content[header:])
                try:
                    read(folder)
                except UserError as error:
                    assert "\n" not in str(error), what
            (folder / file).write_bytes(content)


def test_hashes_of_weights_are_of_all_bytes(folders):
    """Padding behind the header and the last byte, too."""
    file = folders["adapter"] / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    for at in np.array([8, 9, len(content) - 1]):
        changed = bytearray(content)
        changed[at] ^= 1
        file.write_bytes(changed)
        with pytest.raises(UserError):
            load_peft(folders["adapter"], SPEC)
