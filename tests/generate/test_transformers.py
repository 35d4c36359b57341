"""Token for token what transformers writes: 200 prompts, greedily and with four beams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.lora import Lora
from jaxalign.generate import Decoding, generate
from jaxalign.hf.load import load_params, load_spec
from jaxalign.hf.peft import save_peft
from jaxalign.model.decoder import Decoder
from tests.hf.conftest import TARGETS, hf_model, random_lora

ADAPTER = Lora(4, 8.0, 0.1, TARGETS)
CASES = [
    (name, adapted) for name in ("llama3_scaled", "qwen2_tied") for adapted in ("base", "lora")
]
NEW, BATCH = 24, 50
NEVER = (-1, -2)  # as many as stop an answer elsewhere: one program serves both
BEAM = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False}


@pytest.fixture(
    scope="module",
    params=[
        case if case in CASES[1:3] else pytest.param(case, marks=pytest.mark.slow) for case in CASES
    ],
    ids=lambda case: "-".join(case),
)
def pair(request, tmp_path_factory):
    """transformers' model, and ours with its weights: (model, (decoder, params, lora), prompts)."""
    import torch
    from peft import PeftModel

    name, adapted = request.param
    folder, model = tmp_path_factory.mktemp(name), hf_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # attention that looks somewhere, logits that differ
    model.save_pretrained(folder / "base")
    spec = load_spec(folder / "base")
    params = load_params(folder / "base", spec, jnp.float32)
    lora = None
    if adapted == "lora":
        lora = jax.tree.map(lambda leaf: jnp.asarray(leaf * 0.2), random_lora(spec))
        save_peft(folder / "adapter", lora, spec, ADAPTER)
        model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    numbers = np.random.default_rng(CASES.index(request.param))
    # 50 prompts each, longest far past the 64 positions from which llama3 scaling starts.
    lengths = [90, *numbers.integers(1, 60, 49)]
    prompts = [numbers.integers(4, spec.vocab, length).tolist() for length in lengths]
    return model, (Decoder(spec, ADAPTER), params, lora), prompts


def by_transformers(model, prompts, stops, **settings):
    """Answers without stop tokens, of one left-padded batch."""
    import torch

    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = list(stops) or None
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
            pad_token_id=0, **settings,
        )  # fmt: skip
    return [
        row[: min((i for i, token in enumerate(row) if token in stops), default=len(row))]
        for row in out[:, width:].tolist()
    ]


def frequent(rows):
    """Two tokens that end many answers, but not all at once."""
    counts = np.bincount(np.concatenate([row[2:] for row in rows]).astype(int))
    return tuple(np.argsort(-counts)[3:5].tolist())


@pytest.mark.torch
@pytest.mark.parametrize(
    ("decoding", "theirs"),
    [
        (Decoding(NEW), {}),
        (Decoding(NEW, "beam"), BEAM),
        (Decoding(NEW, "beam", length_penalty=0.3), BEAM | {"length_penalty": 0.3}),
    ],
    ids=["greedy", "beam", "short-beam"],
)
def test_the_same_answers(pair, decoding, theirs):
    model, ours, prompts = pair
    whole = by_transformers(model, prompts, (), **theirs)
    assert generate(*ours, prompts, decoding, stop_ids=NEVER, batch_size=BATCH) == whole
    stops = frequent(whole)
    ended = by_transformers(model, prompts, stops, **theirs)
    assert sum(len(row) < NEW for row in ended) > 5
    assert generate(*ours, prompts, decoding, stop_ids=stops, batch_size=BATCH) == ended
