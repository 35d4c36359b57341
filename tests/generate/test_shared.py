"""What all prompts begin with is computed once, and every token stays the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.generate import Decoding, answer_chunks, generate, lay_out, run, shapes
from jaxalign.model.decoder import Decoder
from jaxalign.sharding import make_mesh, shard_tree
from tests.generate.test_greedy import NEVER, logits_of, scaled
from tests.hf.conftest import LLAMA, TARGETS, random_lora, random_params

ADAPTER = Lora(4, 8.0, 0.1, TARGETS)
SHARED = 85  # past the 64 positions from which llama3 scaling starts; no multiple of 16
OWN = (9, 1, 30, 4, 17, 2, 40, 12)  # of each prompt behind them: two chunks of two widths
SETTINGS = {"stop_ids": NEVER, "batch_size": 4}
METHODS = {
    "greedy": Decoding(6),
    "sample": Decoding(6, "sample", temperature=1.5, seed=3),
    "beam": Decoding(6, "beam", beams=3),
}
SPECS = {
    "llama": LLAMA,
    "gemma3": dataclasses.replace(
        LLAMA,
        windows=(20, 0, 20),  # ends within what is shared, for some tokens
        local_rope_theta=50.0,
        qk_norm="head",
        norms="around",
        norm_offset=1.0,
        wide_norms=True,
        logit_soft_cap=3.0,
        embed_scale=2.0,
        activation="gelu_tanh",
    ),
    "qwen2": dataclasses.replace(LLAMA, rope_scaling=None, qkv_bias=True, tied=True),
}


def model_of(name):
    spec = SPECS[name]
    return (
        Decoder(spec, ADAPTER),
        scaled(random_params(spec), 0.2),
        scaled(random_lora(spec), 0.2),
    )


@pytest.fixture(scope="module")
def tiny():
    return model_of("llama")


@pytest.fixture(scope="module")
def prompts():
    numbers = np.random.default_rng(1)
    first = numbers.integers(4, LLAMA.vocab, SHARED).tolist()
    return [[*first, 5 + row, *numbers.integers(4, LLAMA.vocab, own - 1).tolist()]
            for row, own in enumerate(OWN)]  # fmt: skip


@pytest.fixture
def started(monkeypatch):
    """The shapes of the prompts that are computed."""
    found = []
    for name in ("share", "start"):
        real = getattr(run, name)

        def record(model, tokens, *rest, real=real):
            found.append(tokens.shape)
            return real(model, tokens, *rest)

        monkeypatch.setattr(run, name, record)
    return found


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("llama", method) for method in METHODS), ("gemma3", "greedy"), ("qwen2", "greedy")],
)
def test_every_token_is_the_same(prompts, started, name, method):
    model, decoding = model_of(name), METHODS[method]
    expected = generate(*model, prompts, decoding, **SETTINGS, share_prefix=False)
    assert started == [(4, 128), (4, 96)]
    started.clear()
    assert generate(*model, prompts, decoding, **SETTINGS) == expected
    assert started == [(1, 96), (4, 48), (4, 16)]  # the first once, each row its own
    assert len({tuple(answer) for answer in expected}) > 4


def test_a_mesh_shares_too(tiny, prompts, started):
    """Rows over four devices, heads over two; what is shared is one row, which stays whole."""
    decoder, params, lora = tiny
    expected = generate(*tiny, prompts, METHODS["greedy"], **SETTINGS)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        there = jax.device_put(params, shard_tree(mesh, params))
        beside = jax.device_put(lora, shard_tree(mesh, lora))
        found = generate(decoder, there, beside, prompts, METHODS["greedy"], **SETTINGS)
    assert found == expected
    assert started == 2 * [(1, 96), (4, 48), (4, 16)]


def test_bfloat16_chooses_among_the_best(tiny, prompts):
    decoder, params, lora = tiny
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    ours = generate(decoder, params, lora, prompts, METHODS["greedy"], **SETTINGS)
    logits = logits_of(decoder, params, lora, prompts, ours)
    chosen = np.take_along_axis(logits, np.array(ours)[:, :, None], -1)
    # One step of bfloat16 at the size of these logits.
    assert (logits - chosen).max() <= np.abs(logits).max() * 2**-7


def test_a_later_call_shares_what_all_prompts_do(tiny, prompts, started):
    """The rows of the second chunk alone have more in common."""
    more = [*prompts[0][:SHARED], *[7] * 20]
    prompts = [[*prompt, *[9] * 20] for prompt in prompts[:4]] + [
        [*more, row] for row in range(4, 8)
    ]
    whole = list(answer_chunks(*tiny, prompts, METHODS["sample"], **SETTINGS))
    assert [rows for rows, _ in whole] == [[2, 0, 3, 1], [4, 5, 6, 7]]
    assert started == [(1, 96), (4, 64), (4, 32)]
    again = list(answer_chunks(*tiny, prompts, METHODS["sample"], **SETTINGS, rows=[6]))
    assert again == whole[1:]
    assert started[3:] == [(1, 96), (4, 32)]


def test_what_pays():
    rows = [[*range(40), 50 + row] for row in range(14)]
    assert shapes.common(rows) == 40
    assert shapes.common([tuple(row) for row in rows]) == 40
    assert shapes.common(rows[:13]) == 0  # too few rows: 480 tokens saved
    assert shapes.common([row[-8:] for row in rows] * 99) == 0  # too few tokens
    assert shapes.common([rows[0]] * 14) == 40  # a token is left to each
    assert shapes.common([*rows, rows[0][:39]]) == 38
    assert shapes.common(rows[:1]) == shapes.common([]) == 0
    assert lay_out(rows, 8, share=False).ahead == 0


def test_tokens_are_counted():
    rows = [[*range(40), *[50 + row] * (1 + row)] for row in range(20)]
    layout = lay_out(rows, 8)
    assert (layout.ahead, layout.rows) == (40, 20)
    assert layout.asked == 20 * 40 + sum(range(1, 21))
    # 40 shared tokens in 48 slots; chunks of 8, 8 and 4 rows, the latter in a batch of 8.
    assert layout.computed == 48 + 8 * 32 + 8 * 16 + 8 * 16
    assert lay_out(rows, 8, share=False).computed == 8 * 64 + 8 * 64 + 8 * 48
    assert layout.only([layout.groups[2][0]]).computed == 48 + 8 * 16
    assert str(layout).startswith("20 prompts of 1,010 tokens share their first 40: 560 tokens")


def test_long_rows_keep_their_kernel():
    """Behind shared tokens scores are formed, and not more of them than memory bears."""
    long, short = [*range(100), *[1] * 900], [*range(100), *[2] * 90]
    layout = lay_out([long, *[short] * 9], 5)
    assert [layout.width(group) for group in layout.groups] == [(0, 1024), (100, 96)]
    assert layout.computed == 112 + 5 * 1024 + 5 * 96
