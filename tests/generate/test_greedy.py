"""Greedy answers: those of transformers, and what a full forward pass says; shapes and meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.generate import Decoding, answer_chunks, chunks, generate, run, stop_ids
from jaxalign.generate.loop import Model, advance, start
from jaxalign.model import attention, splash
from jaxalign.model.attention import causal
from jaxalign.model.decoder import Decoder
from jaxalign.sharding import make_mesh, platform, shard_tree
from tests.data.conftest import CHATML_TEMPLATE, LLAMA_TEMPLATE, build
from tests.hf.conftest import LLAMA, TARGETS, random_lora, random_params

ADAPTER = Lora(4, 8.0, 0.1, TARGETS)
LENGTHS = (5, 1, 70, 12, 33)  # past the 64 positions from which llama3 scaling starts
# The same shapes wherever they serve: a test's time is that of compiling.
SETTINGS = {"decoding": Decoding(8), "batch_size": 8}
NEVER = (-1, -2)


def scaled(tree, factor):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf * factor), tree)


@pytest.fixture(scope="module")
def tiny():
    """Decoder, weights and adapter; weights small enough that no attention is a hard choice."""
    return (
        Decoder(LLAMA, ADAPTER),
        scaled(random_params(LLAMA), 0.2),
        scaled(random_lora(LLAMA), 0.2),
    )


@pytest.fixture(scope="module")
def prompts():
    numbers = np.random.default_rng(1)
    return [numbers.integers(4, LLAMA.vocab, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def free(tiny, prompts):
    """Answers that nothing stops."""
    return generate(*tiny, prompts, **SETTINGS, stop_ids=NEVER)


def logits_of(decoder, params, lora, prompts, answers):
    """[B, new, V]: what a full pass says wherever a token of an answer was chosen."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows])
    run = jax.jit(lambda p, lora, t: decoder.logits(p, decoder.forward(p, lora, t).hidden))
    at = np.array([[len(p) - 1 + i for i in range(len(answers[0]))] for p in prompts])
    return np.take_along_axis(np.asarray(run(params, lora, tokens)), at[:, :, None], 1)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_every_token_is_the_best_of_a_full_pass(tiny, prompts, free, adapted):
    decoder, params, lora = tiny
    if not adapted:
        base = generate(decoder, params, None, prompts, **SETTINGS, stop_ids=NEVER)
        assert base != free
        lora, free = None, base
    logits = logits_of(decoder, params, lora, prompts, free)
    second, first = np.moveaxis(np.sort(logits)[..., -2:], -1, 0)
    assert (first - second).min() > 1e-3
    assert logits.argmax(axis=-1).tolist() == free


def test_bfloat16_chooses_among_the_best(tiny, prompts):
    decoder, params, lora = tiny
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    ours = generate(decoder, params, lora, prompts, **SETTINGS, stop_ids=NEVER)
    logits = logits_of(decoder, params, lora, prompts, ours)
    chosen = np.take_along_axis(logits, np.array(ours)[:, :, None], -1)
    # One step of bfloat16 at the size of these logits.
    assert (logits - chosen).max() <= np.abs(logits).max() * 2**-7


def test_cached_logits_equal_the_full_pass(tiny):
    """Rows of unequal length: a padded prompt, then three tokens at once, then one."""
    decoder, params, lora = tiny
    numbers = np.random.default_rng(2)
    lengths, width, new = np.array([6, 3, 1]), 6, 4
    text = numbers.integers(0, LLAMA.vocab, (3, width + new))
    whole = decoder.logits(params, decoder.forward(params, lora, text).hidden)
    place = np.arange(width + new)

    cache = decoder.empty_cache(3, width + new, jnp.float32)
    hidden, cache = decoder.extend(
        params, lora, text[:, :width], cache, slot=0, positions=place[None, :width],
        mask=causal(width),
    )  # fmt: skip
    for row, length in enumerate(lengths):
        logits = decoder.logits(params, hidden[row, :length])
        np.testing.assert_allclose(logits, whole[row, :length], atol=1e-5, rtol=1e-5)
    for first, count in ((0, 3), (3, 1)):
        at = lengths[:, None] + first + np.arange(count)  # [B, T]: places in the text
        slots = width + first + np.arange(count)
        mask = (place < lengths[:, None])[:, None] | ((place >= width) & (place <= slots[:, None]))[
            None
        ]
        hidden, cache = decoder.extend(
            params, lora, np.take_along_axis(text, at, 1), cache, slot=width + first,
            positions=at, mask=mask,
        )  # fmt: skip
        wanted = np.take_along_axis(np.asarray(whole), at[:, :, None], 1)
        np.testing.assert_allclose(decoder.logits(params, hidden), wanted, atol=1e-5, rtol=1e-5)


def test_stops_and_batches_change_no_answer(tiny, prompts, free):
    assert [len(answer) for answer in free] == [8] * len(prompts)
    stops = (free[3][2], free[2][0])
    cut = [
        answer[: min((i for i, token in enumerate(answer) if token in stops), default=8)]
        for answer in free
    ]
    assert cut[2] == [] and len(cut[3]) == 2
    assert generate(*tiny, prompts, **SETTINGS, stop_ids=stops) == cut
    reports = []
    settings = SETTINGS | {"batch_size": 3, "report": lambda *numbers: reports.append(numbers)}
    assert generate(*tiny, prompts, **settings, stop_ids=stops) == cut
    assert [numbers[:2] for numbers in reports][-1] == (5, 5)
    assert reports[-1][2] == sum(map(len, cut))
    assert reports == sorted(reports) and all(of == 5 for _, of, _ in reports)


def test_one_token_and_no_prompt(tiny, prompts, free):
    settings = SETTINGS | {"decoding": Decoding(1), "stop_ids": NEVER}
    assert generate(*tiny, prompts, **settings) == [answer[:1] for answer in free]
    assert generate(*tiny, [], **settings) == []


def begin(decoder, params, prompts, size, width, slots, new):
    """A batch after its prompts."""
    tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    model = Model(params, None)
    numbers, rule = np.arange(size, dtype=np.uint32), Decoding().rule
    seed, stops = np.uint32(1), np.array([-1], np.int32)
    batch = start(model, tokens, lengths, numbers, stops, seed, decoder, rule, new, slots)
    return model, batch, stops, seed, rule


def test_the_loop_ends_with_the_last_row(tiny, prompts, free):
    decoder, params, _ = tiny
    base = generate(decoder, params, None, prompts[:1], **SETTINGS, stop_ids=NEVER)[0]
    model, batch, _, seed, rule = begin(decoder, params, prompts[:1], 8, 16, 32, 8)
    stops = np.array([base[2]], np.int32)
    batch = advance(model, batch, stops, seed, np.int32(0), decoder, rule)
    assert int(batch.state.step) == base.index(base[2]) + 1
    assert batch.state.counts.tolist() == [base.index(base[2])] + [0] * 7


def test_the_cache_is_not_copied_in_the_loop(tiny):
    decoder, params, _ = tiny
    found = begin(decoder, params, [[5] * 16] * 2, 2, 16, 32, 8)
    model, batch, stops, seed, rule = found
    lowered = advance.lower(model, batch, stops, seed, np.int32(0), decoder, rule)
    loops, _, _ = lowered.compile().as_text().partition("ENTRY ")
    keys = jax.tree.leaves(batch.cache)[0]
    stack = f"[{','.join(map(str, keys.shape))}]"
    lines = [line for line in loops.splitlines() if stack in line]
    assert lines
    assert [line for line in lines if " copy(" in line] == []


@pytest.fixture(scope="module")
def long(tiny):
    """20 prompts, answers of up to 80 tokens of which most end early, and what ends them."""
    numbers = np.random.default_rng(4)
    prompts = [numbers.integers(4, LLAMA.vocab, n).tolist() for n in numbers.integers(3, 30, 20)]
    # Drawn, as the best tokens of a random model soon repeat themselves.
    settings = {"decoding": Decoding(80, "sample", seed=2), "batch_size": 20}
    whole = generate(*tiny, prompts, **settings, stop_ids=NEVER)
    counts = np.bincount(np.concatenate(whole), minlength=LLAMA.vocab)
    stops = tuple(np.argsort(-counts)[30:34].tolist())
    cut = [
        answer[: min((i for i, token in enumerate(answer) if token in stops), default=80)]
        for answer in whole
    ]
    return prompts, settings | {"stop_ids": stops}, cut


def test_smaller_batches_and_longer_caches_change_no_answer(tiny, long, monkeypatch):
    prompts, settings, cut = long
    assert len({len(answer) for answer in cut}) > 5
    shapes = []
    real = run.advance

    def record(model, batch, *rest):
        shapes.append((len(batch.lengths), batch.cache.slots))
        return real(model, batch, *rest)

    monkeypatch.setattr(run, "advance", record)
    assert generate(*tiny, prompts, **settings) == cut
    assert len({rows for rows, _ in shapes}) > 1, shapes
    assert len({slots for _, slots in shapes}) > 1, shapes


def test_finished_chunks_can_be_left_out(tiny, long):
    prompts, settings, _ = long
    settings = settings | {"batch_size": 8}
    groups = chunks([len(prompt) for prompt in prompts], 8)
    assert sorted(row for group in groups for row in group) == list(range(20))
    assert [len(group) for group in groups] == [8, 8, 4]
    longest = [max(len(prompts[row]) for row in group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    settings["decoding"] = Decoding(20, "sample", seed=5)
    whole = dict(zip(*map(list, zip(*rows_of(tiny, prompts, settings), strict=True)), strict=True))
    left = sorted(groups[0] + groups[2])
    again = rows_of(tiny, prompts, settings, rows=left)
    assert dict(again) == {row: whole[row] for row in left}


def rows_of(tiny, prompts, settings, rows=None):
    found = answer_chunks(*tiny, prompts, **settings, rows=rows)
    return [pair for group, answers in found for pair in zip(group, answers, strict=True)]


def test_few_shapes():
    from jaxalign.generate.shapes import first_slots, more_slots, padded, rungs

    assert len({padded(n) for n in range(1, 1025)}) <= 20
    assert all(n <= padded(n) <= max(n + 15, 1.25 * n) for n in range(1, 5000))
    assert rungs(32) == (32, 16, 8) and rungs(125) == (125, 63, 32, 16, 8) and rungs(3) == (3,)
    for width, new in ((64, 128), (16, 5), (112, 512)):
        slots = first_slots(width, new)
        assert slots >= width + min(new, 32)
        while slots < width + new:
            slots, before = more_slots(slots, width, new), slots
            assert slots > before
        assert slots <= padded(width + new)


def test_a_mesh_gives_the_same_answers(tiny, prompts, free):
    decoder, params, lora = tiny
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        there = jax.device_put(params, shard_tree(mesh, params))
        beside = jax.device_put(lora, shard_tree(mesh, lora))
        assert generate(decoder, there, beside, prompts, **SETTINGS, stop_ids=NEVER) == free


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt 2 has no tokens"),
        ([5] * 250, {}, "prompt 2 has 250 tokens and with max_new_tokens=8 passes"),
        ([5, 96], {}, r"prompt 2 holds token ids outside 0\.\.95"),
        ([5], {"batch_size": 0}, "1 or more"),
        ([5], {"numbers": [1]}, "2 prompts need as many numbers, not 1"),
    ],
)
def test_mistakes(tiny, prompt, settings, message):
    decoder, params, _ = tiny
    settings = SETTINGS | {"stop_ids": (2,)} | settings
    with pytest.raises(UserError, match=message):
        generate(decoder, params, None, [[5], prompt], **settings)


def test_stop_ids_are_the_models_the_tokenizers_and_the_templates(tmp_path):
    from jaxalign.data.chat import load_tokenizer

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
               "<|end_header_id|>"]  # fmt: skip
    folder = build(
        tmp_path / "llama", special, "<|end_of_text|>", "<|begin_of_text|>", template=LLAMA_TEMPLATE
    )
    tokenizer = load_tokenizer(folder)
    end, turn = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    spec = dataclasses.replace(LLAMA, eos_ids=(7, end))
    assert stop_ids(spec, tokenizer) == (7, end, turn)
    assert stop_ids(spec, tokenizer, "llama3_paper") == (7, end, turn)
    tokenizer.chat_template = None
    assert stop_ids(spec, tokenizer) == (7, end)

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    folder = build(tmp_path / "qwen", special, "<|endoftext|>", template=CHATML_TEMPLATE)
    tokenizer = load_tokenizer(folder)
    assert stop_ids(dataclasses.replace(LLAMA, eos_ids=()), tokenizer) == (
        *tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]),
    )


@pytest.mark.parametrize("windows", [(), (0, 100)], ids=["whole", "window"])
def test_a_kernel_runs_the_prompt_and_the_reference_each_token(monkeypatch, windows):
    """A whole prompt's scores would take O(T²) memory; what is written stays the same."""
    spec = dataclasses.replace(LLAMA, heads=2, kv_heads=1, head_dim=64, layers=2, windows=windows)
    params = scaled(random_params(spec), 0.2)
    numbers = np.random.default_rng(4)
    texts = [numbers.integers(4, spec.vocab, length).tolist() for length in (250, 130)]
    settings = {"decoding": Decoding(4), "batch_size": 2, "stop_ids": NEVER}
    expected = generate(Decoder(spec), params, None, texts, **settings)

    real, called = splash.attend, []
    monkeypatch.setattr(attention, "FASTEST", {platform(): "splash"})
    monkeypatch.setattr(
        splash, "attend", lambda q, *rest, **how: called.append(q.shape) or real(q, *rest, **how)
    )
    decoder = Decoder(spec, attention="splash")  # by name, though it takes no single token
    assert generate(decoder, params, None, texts, **settings) == expected
    assert set(called) == {(2, 256, 2, 64)}

    tokens, place = np.zeros((1, 256), np.int32), np.arange(256)[None]
    tokens[0, :250] = texts[0]
    given = {"slot": 0, "positions": place, "mask": causal(256), "places": place}
    by = [
        decoder.extend(
            params, None, tokens, decoder.empty_cache(1, 256, jnp.float32), **given, sight=sight
        )
        for sight in (None, attention.Sight(windows=spec.kinds))
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, by), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
