"""Prefixes, soft prompts and pools leave the house, are read back, and are never merged."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxalign.checksums import SUMS
from jaxalign.config import load
from jaxalign.errors import UserError
from jaxalign.export.incoming import import_adapter
from jaxalign.export.request import Request
from jaxalign.export.run import export
from jaxalign.export.source import trained_adapter
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import load_peft
from jaxalign.merge.methods import Recipe
from jaxalign.merge.run import merge
from tests.hf.conftest import assert_same_tree

KINDS = ("prefix", "prompt", "pool")


def words(kind):
    return (f"adapter.kind={kind}", "adapter.num_virtual_tokens=3", "adapter.pool_size=4")


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again(run, base, tmp_path, kind, capsys):
    out, trained = run(*words(kind))
    folder = export(Request(out, verify=True))
    reader = "jaxalign" if kind == "pool" else "peft"
    assert f"{reader}" in capsys.readouterr().out.partition(": logits differ")[0]
    spec = load_spec(base)
    found, adapter = load_peft(folder, spec)
    assert_same_tree(trained, found)
    assert adapter.count(spec) == sum(leaf.size for leaf in found_leaves(found))
    card = (folder / "README.md").read_text()
    assert f"{adapter.name[0].upper()}{adapter.name[1:]} of a local base" in card
    assert ("from peft import" in card) == (kind != "pool")

    import_adapter(str(folder), base, str(tmp_path / "in"))
    config = load(tmp_path / "in" / "continue.yaml").config
    assert config.adapter.kind == kind and config.adapter.start == f"{tmp_path / 'in'}/adapter"
    assert trained_adapter(config, spec) == adapter


def found_leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_nothing_is_merged(run, base, tmp_path):
    out, _ = run(*words("prefix"))
    told = r"--format merged: the prefix of .* is not a change of weights .* use --format peft"
    with pytest.raises(UserError, match=told):
        export(Request(out, format="merged"))
    folder = export(Request(out))
    with pytest.raises(UserError, match="prefix cannot be merged, only LoRA adapters can"):
        merge([str(folder)], [1.0], Recipe("delta"), str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("prefix", {"num_layers": 7}, "num_layers is 7 and this base asks for 3"),
        ("prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens should be a whole number from"),
        ("prefix", {"num_virtual_tokens": 4}, r"has shape \[3, 96\], but num_virtual_tokens and"),
        ("prompt", {"token_dim": 31}, "token_dim is 31"),
        ("prompt", {"modules_to_save": ["x"]}, "modules_to_save=.* is not supported"),
        ("prompt", {"peft_type": "P_TUNING"}, "'P_TUNING' is not supported; supported: LORA, PRE"),
        ("prefix", {"use_future": 1}, r"'use_future': 1 \(peft_version None\) is not known here"),
        ("prompt", {"use_future": [2]}, r"'use_future': \[2\] .* is not known here"),
        ("pool", {"use_future": "3"}, "'use_future': '3' .* is not known here"),
        ("pool", {"temperature": -1}, "temperature should be a number above 0, found -1"),
        ("pool", {"pool_size": 5}, "tensor keys has shape"),
    ],
)
def test_what_does_not_fit_is_refused(run, base, kind, changes, told):
    out, _ = run(*words(kind))
    folder = export(Request(out))
    (Path(folder) / SUMS).unlink()
    file = Path(folder, "adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=told):
        load_peft(folder, load_spec(base))


def test_settings_that_contradict(configure):
    for more, told in {
        "trainable=full": r"adapter\.kind: a prefix is not trained where trainable=full",
        "generate.adapter=merged": r"generate\.adapter: a prefix is not a change of weights",
    }.items():
        with pytest.raises(UserError, match=told):
            configure("adapter.kind=prefix", more)


def test_another_one_to_start_from(run, configure, tmp_path):
    from jaxalign.train.setup import prepare

    out, trained = run(*words("prompt"))
    folder = export(Request(out))
    start = f"adapter.start={folder}"
    state = prepare(configure(*words("prompt"), start)).state
    np.testing.assert_array_equal(state.trained["prompt"], trained["prompt"])
    with pytest.raises(
        UserError,
        match=r"adapter\.start: the adapter in .* is a soft prompt of 3, .* a soft prompt of 16",
    ):
        prepare(configure("adapter.kind=prompt", start))
    with pytest.raises(
        UserError,
        match=r"adapter\.start: the adapter in .* is a soft prompt of 3, .* for a LoRA r 4",
    ):
        prepare(configure(start))
