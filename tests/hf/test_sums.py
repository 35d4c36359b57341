"""What we write is known again by its hashes: a changed byte is refused wherever it is read."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.adapters.lora import Lora
from jaxalign.checksums import SUMS, check_sums, read_sums
from jaxalign.errors import UserError
from jaxalign.hf.files import read_json, write_json
from jaxalign.hf.load import fingerprint, load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.hf.pending import merged_tensors
from jaxalign.hf.save import copy_files, save_base
from tests.hf.conftest import LLAMA, assert_same_tree, random_lora, random_params


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.fixture
def base(tmp_path):
    save_base(tmp_path / "base", random_params(LLAMA), LLAMA, max_shard_bytes=40_000)
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path):
    save_peft(tmp_path / "adapter", random_lora(LLAMA), LLAMA, Lora(4), texts={"README.md": "x"})
    return tmp_path / "adapter"


def test_every_file_is_listed(base, adapter):
    for folder in (base, adapter):
        check_sums(folder)
        assert set(read_sums(folder)) | {SUMS} == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_of_the_weights(base, adapter, seed):
    dice = random.Random(seed)
    shard = dice.choice(sorted(base.glob("*.safetensors")))
    flip(shard, dice.randrange(8 * 1000, 8 * shard.stat().st_size))
    with pytest.raises(UserError, match=rf"{shard}: the content is not what was written"):
        load_params(base, LLAMA, jnp.float32)
    with pytest.raises(UserError, match="the content is not what was written"):
        merged_tensors(base, LLAMA, {}, Lora(targets=()))
    file = adapter / "adapter_model.safetensors"
    flip(file, dice.randrange(8 * file.stat().st_size))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: "):
        load_peft(adapter, LLAMA)


def test_changed_and_missing_settings(base, adapter, tmp_path):
    write_json(base / "generation_config.json", {"eos_token_id": [5]})
    load_spec(base)  # not ours: nobody wrote its hash down
    save_base(tmp_path / "b2", random_params(LLAMA), LLAMA, tokenizer_from=base)
    (tmp_path / "b2" / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"generation_config\.json is missing, though SHA256SUMS"):
        load_spec(tmp_path / "b2")
    write_json(base / "config.json", read_json(base / "config.json") | {"rope_theta": 1e4})
    with pytest.raises(UserError, match=r"config\.json: .* on purpose"):
        load_spec(base)
    (base / SUMS).unlink()
    assert load_spec(base).rope_theta == 1e4
    index = base / "model.safetensors.index.json"
    write_json(adapter / "adapter_config.json",
               read_json(adapter / "adapter_config.json") | {"lora_alpha": 32})  # fmt: skip
    with pytest.raises(UserError, match=r"adapter_config\.json: the content is not"):
        load_peft(adapter, LLAMA)
    assert index.is_file()


def test_saves_over_an_old_save_are_sealed_anew(base):
    (base / "notes.txt").write_text("mine")
    save_base(base, random_params(LLAMA, seed=1), LLAMA)
    check_sums(base)
    assert "notes.txt" in read_sums(base)
    load_params(base, LLAMA, jnp.float32)


def test_a_damaged_tokenizer_is_not_copied_into_an_export(base, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_text("{}")
    save_base(tmp_path / "b2", random_params(LLAMA), LLAMA, tokenizer_from=base)
    (tmp_path / "b2" / "tokenizer.json").write_text("{ }")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.json: the content is not"):
        copy_files(tmp_path / "b2", tmp_path / "out", ("tokenizer*",))
    (tmp_path / "b2" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        copy_files(tmp_path / "b2", tmp_path / "out", ("tokenizer*",))


def test_processes_share_the_reading(base, monkeypatch):
    import jaxalign.checksums as checksums

    seen = []
    real = checksums._digest_once
    monkeypatch.setattr(
        checksums, "_digest_once", lambda path: (seen.append(path.name), real(path))[1]
    )
    from jaxalign.hf.tensors import check_content, open_index

    index = open_index(base, "model")
    seen.clear()
    for part in range(3):
        check_content(index, part, 3)
    assert sorted(seen) == sorted(file.name for file in base.glob("*.safetensors"))


# --- tied models ---------------------------------------------------------------------------------


def test_a_tied_model_stored_under_the_heads_name(tmp_path):
    import dataclasses

    tied = dataclasses.replace(LLAMA, tied=True)
    save_base(tmp_path / "m", random_params(tied), tied)
    plain, file = fingerprint(tmp_path / "m"), tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "m" / SUMS).unlink()
    assert_same_tree(random_params(tied), load_params(tmp_path / "m", tied, jnp.float32))
    assert fingerprint(tmp_path / "m") == plain
    made = {
        one.name: one.make for one in merged_tensors(tmp_path / "m", tied, {}, Lora(targets=()))
    }
    np.testing.assert_array_equal(made["model.embed_tokens.weight"](), tensors["lm_head.weight"])
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is True
