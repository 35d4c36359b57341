"""Greedy generation: as transformers does it, and as a full forward pass says."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.generate import _continue, generate, stop_ids
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.save import save_peft
from jaxalign.model.attention import causal
from jaxalign.model.decoder import Decoder
from jaxalign.sharding import make_mesh, shard_tree
from tests.data.conftest import CHATML_TEMPLATE, LLAMA_TEMPLATE, build
from tests.hf.conftest import LLAMA, TARGETS, hf_model, random_lora, random_params

ADAPTER = Lora(4, 8.0, 0.1, TARGETS)
LENGTHS = (5, 1, 70, 12, 33)  # past the 64 positions from which llama3 scaling starts
# The same shapes wherever they serve: a test's time is that of compiling.
SETTINGS = {"max_new_tokens": 8, "batch_size": 8}
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
    for start, count in ((0, 3), (3, 1)):
        at = lengths[:, None] + start + np.arange(count)  # [B, T]: places in the text
        slots = width + start + np.arange(count)
        mask = (place < lengths[:, None])[:, None] | ((place >= width) & (place <= slots[:, None]))[
            None
        ]
        hidden, cache = decoder.extend(
            params, lora, np.take_along_axis(text, at, 1), cache, slot=width + start,
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
    settings = SETTINGS | {"batch_size": 3, "report": lambda done, of: reports.append((done, of))}
    assert generate(*tiny, prompts, **settings, stop_ids=stops) == cut
    assert reports == [(3, 5), (5, 5)]


def test_one_token_and_no_prompt(tiny, prompts, free):
    settings = SETTINGS | {"max_new_tokens": 1, "stop_ids": NEVER}
    assert generate(*tiny, prompts, **settings) == [answer[:1] for answer in free]
    assert generate(*tiny, [], **settings) == []


def test_the_loop_ends_with_the_last_row(tiny, prompts, free):
    decoder, params, lora = tiny
    tokens, lengths = np.zeros((8, 80), np.int32), np.array([5] + [0] * 7, np.int32)
    tokens[0, :5] = prompts[0]
    stops = np.array([-1, free[0][2]], np.int32)
    state = _continue(params, lora, tokens, lengths, stops, decoder, 8)
    assert int(state.step) == free[0].index(stops[1]) + 1
    assert state.counts.tolist() == [int(state.step) - 1] + [0] * 7


def test_few_shapes_and_the_longest_first(tiny, monkeypatch):
    seen = []

    def record(params, lora, tokens, lengths, stops, decoder, most):
        seen.append((tokens.shape, lengths.tolist()))
        return SimpleNamespace(written=np.repeat(lengths[:, None], most, 1), counts=lengths * 0 + 1)

    monkeypatch.setattr("jaxalign.generate._continue", record)
    lengths = np.random.default_rng(3).permutation(np.arange(1, 203)).tolist()
    answers = generate(
        *tiny, [[5] * n for n in lengths], max_new_tokens=2, stop_ids=(2,), batch_size=8
    )
    assert answers == [[n] for n in lengths]  # the order of the prompts
    assert len({shape for shape, _ in seen}) <= 4
    assert [n for _, group in seen for n in group] == [*range(202, 0, -1), *[0] * 6]
    assert all(rows == 8 and width >= max(group) for (rows, width), group in seen)


def test_the_cache_is_not_copied_in_the_loop(tiny):
    decoder, params, _ = tiny
    tokens, lengths = np.ones((2, 16), np.int32), np.full(2, 16, np.int32)
    lowered = _continue.lower(params, None, tokens, lengths, np.array([2], np.int32), decoder, 8)
    loops, _, _ = lowered.compile().as_text().partition("ENTRY ")
    stack = f"[{LLAMA.layers},2,{LLAMA.kv_heads},{16 + 8 - 1},{LLAMA.head_dim}]"
    lines = [line for line in loops.splitlines() if stack in line]
    assert lines
    assert [line for line in lines if " copy(" in line] == []


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
        ([5], {"max_new_tokens": 0}, "1 or more"),
        ([5], {"batch_size": 0}, "1 or more"),
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


# --- transformers and PEFT ----------------------------------------------------------------------


def by_transformers(model, prompts, new, stops):
    """Answers without stop tokens, of a left-padded batch, and the smallest top1-top2 gap."""
    import torch

    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = list(stops) or None
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=new, do_sample=False,
            pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    rows, gap = [], np.inf
    scores = np.stack([score.numpy() for score in out.scores])  # [steps, B, V]
    for number, row in enumerate(out.sequences[:, width:].tolist()):
        end = min((i for i, token in enumerate(row) if token in stops), default=len(row))
        rows.append(row[:end])
        best = np.sort(scores[: end + 1, number], axis=-1)
        gap = min(gap, (best[:, -1] - best[:, -2]).min())
    return rows, gap


@pytest.mark.torch
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("name", ["llama3_scaled", "qwen2_tied"])
def test_transformers_generates_the_same(tmp_path, prompts, name, adapted):
    import torch
    from peft import PeftModel

    model = hf_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # attention that looks somewhere, logits that differ
    model.save_pretrained(tmp_path / "base")
    spec = load_spec(tmp_path / "base")
    params = load_params(tmp_path / "base", spec, jnp.float32)
    lora = None
    if adapted:
        lora = scaled(random_lora(spec), 0.2)
        save_peft(tmp_path / "adapter", lora, spec, ADAPTER)
        model = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    decoder = Decoder(spec, ADAPTER)

    whole, gap = by_transformers(model, prompts, 8, ())
    assert gap > 1e-4
    assert generate(decoder, params, lora, prompts, **SETTINGS, stop_ids=NEVER) == whole
    stops = (whole[0][4], whole[4][6])
    ended, _ = by_transformers(model, prompts, 8, stops)
    assert min(map(len, ended)) < 8
    assert generate(decoder, params, lora, prompts, **SETTINGS, stop_ids=stops) == ended
