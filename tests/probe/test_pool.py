"""How a pool is used: the entropies of its shares are those of the forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import Pool
from jaxalign.base import open_base
from jaxalign.data.chat import encode_texts
from jaxalign.hf.peft import save_peft
from jaxalign.probe.corpus import Parallel
from jaxalign.probe.pool import entropies
from jaxalign.probe.run import Probed, measure_corpora

TEXTS = {"de": ["Guten Morgen", "wo ist das Kino"], "en": ["good morning", "where is the cinema"]}


def test_entropies_by_language_are_in_the_notes(config, tmp_path):
    base, pool = open_base(config), Pool(2, pool_size=5, temperature=0.2)
    trained = pool.init(base.spec, jax.random.key(0), base.params)
    save_peft(tmp_path / "pool", trained, base.spec, pool)
    corpus = Parallel(TEXTS, "x")
    systems = [Probed("base", ""), Probed("pool", str(tmp_path / "pool"))]
    table = measure_corpora(base, [corpus], systems, str(tmp_path / "out"), states_as=("raw",))
    each = []
    for texts in TEXTS.values():
        ids, _ = encode_texts(texts, base.tokenizer, control="text")
        width = max(map(len, ids))
        tokens = np.stack([np.pad(row, (0, width - len(row))) for row in ids])
        asked = np.arange(width) < np.array([len(row) for row in ids])[:, None]
        shares = pool.shares(trained, base.params["embed"][tokens], jnp.asarray(asked))
        each.append(float(-(shares * jnp.log(shares)).sum(-1).mean()))
    assert min(each) > 0 and max(each) < np.log(5)
    (note,) = table.notes
    assert note == (
        "pool: entropy of the shares of its prompts (at most 1.61): "
        f"de {each[0]:.2f}, en {each[1]:.2f}."
    )


def test_entropy_is_largest_where_all_keys_are_equal():
    pool, means = Pool(1, pool_size=3), np.ones((1, 2, 4), np.float32)
    equal, apart = jnp.ones((3, 4)), jnp.array([[1.0] * 4, [-1.0] * 4, [-1.0] * 4])
    found = [entropies(pool, {"pool": {"keys": keys}}, means)[0] for keys in (equal, apart)]
    assert found == [pytest.approx(np.log(3)), pytest.approx(0, abs=1e-6)]
