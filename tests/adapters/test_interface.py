"""A kind of adapter of one's own: written here, it trains, is saved, loaded and used."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.adapters import KINDS, Adapter
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec.tensors import TARGETS, sizes
from jaxalign.settings import abouts
from jaxalign.sharding import make_mesh
from jaxalign.train.loop import train

TOKENS = np.arange(24).reshape(2, 12)


@dataclass(frozen=True)
class Scale(Adapter):
    """(IA)3: a trained number for each output of some projections (Liu et al. 2022)."""

    name = "(IA)3"
    kind = "ia3"
    targets: tuple[str, ...] = ("k", "v", "up")
    dropout: float = 0.0

    def init(self, spec, key, params):
        blocks = {}
        for target in self.targets:
            out = [sizes(spec)[letter] for letter in TARGETS[target].outputs]
            own = {"scale": jnp.ones((spec.layers, *out))}
            blocks.setdefault(TARGETS[target].half, {})[target] = own
        return {"blocks": blocks}

    def count(self, spec):
        size = sizes(spec)
        outs = [math.prod(size[x] for x in TARGETS[t].outputs) for t in self.targets]
        return spec.layers * sum(outs)

    def per_block(self, params, trained, blocks=None):
        return jax.tree.map(lambda leaf: leaf[:blocks], trained["blocks"])

    def project(self, x, outputs, sites, own, key):
        return {name: outputs[name] * leaf["scale"].astype(x.dtype) for name, leaf in own.items()}

    @classmethod
    def parse(cls, spec, *_, **words):
        return cls()

    @classmethod
    def claims(cls, content):
        return content["peft_type"] == "OWN_IA3"

    def config(self, spec, base_name=""):
        return {"peft_type": "OWN_IA3", "base_model_name_or_path": base_name}

    def tensors(self, trained, spec):
        blocks = trained["blocks"]
        return {f"{h}.{t}": blocks[h][t]["scale"] for h in blocks for t in blocks[h]}

    @classmethod
    def read(cls, file, content, tensors, spec):
        blocks = {}
        for name, stored in tensors().items():
            half, target = name.split(".")
            blocks.setdefault(half, {})[target] = {"scale": np.array(stored.view())}
        return {"blocks": blocks}, cls()


def test_settings_name_every_kind():
    """The settings, which import nothing, list the same words."""
    choices = {key: about.bounds.choices for key, about in abouts()}
    assert {*choices["adapter.kind"], *choices["lora.variant"]} == set(KINDS), (
        "KINDS of jaxalign/adapters/__init__.py and the choices of adapter.kind and lora.variant "
        "in jaxalign/settings/model.py must name the same kinds"
    )
    assert {word: kind.kind for word, kind in KINDS.items()} == {word: word for word in KINDS}


def test_another_kind_needs_one_file(configure, base, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, Scale.kind, Scale)  # its row in the table
    mesh = make_mesh(1, 2, 1, 1, devices=jax.devices()[:2])
    monkeypatch.setattr("jaxalign.base.make_mesh", lambda *_: mesh)
    config = configure("train.steps=2", "train.eval_every=0")
    config.adapter.kind = Scale.kind  # its word in the settings
    result = train(config)
    spec = load_spec(base)
    trained, adapter = load_peft(result.adapter, spec)
    assert adapter == Scale()
    leaves = jax.tree.leaves(trained)
    assert sum(leaf.size for leaf in leaves) == adapter.count(spec)
    assert all(1e-3 < np.abs(leaf - 1).max() < 0.1 for leaf in leaves)  # two steps of 0.01

    save_peft(tmp_path / "copy", trained, spec, adapter)
    again, _ = load_peft(tmp_path / "copy", spec)
    jax.tree.map(np.testing.assert_array_equal, again, trained)

    params = load_params(base, spec, jnp.float32)
    run = lambda tree: Decoder(spec, adapter).forward(params, tree, TOKENS).hidden  # noqa: E731
    np.testing.assert_array_equal(run(adapter.init(spec, None, None)), run(None))
    assert float(jnp.abs(run(trained) - run(None)).max()) > 1e-3
