"""What the demo measures: who finds whom in each layer, and which intents are understood.

parallel = read_test(assets)                                  # {'de': {'test-0': row}}
retrieval(decoder, params, lora, tokenizer, parallel)         # {'de': [layer 0, ..., layer L]}
intents(decoder, params, lora, tokenizer, parallel)           # {'de': 0.41}
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.chat import encode_prompts, encode_texts
from jaxalign.data.sources import Record
from jaxalign.data.tasks import parse_intent_slots, render
from jaxalign.generate import Decoding, generate, stop_ids
from jaxalign.model.decoder import Decoder
from jaxalign.objectives.contrastive import pooling_weights, similarities

TOKENS = 48  # of a sentence, where states are pooled
ANSWER = 16  # new tokens: room for the longest intent
Rows = dict[str, dict[str, dict]]  # language -> id -> row


def read_rows(assets: Path, split: str, languages: tuple[str, ...]) -> Rows:
    """The rows of one split, by language and by the id that translations share."""
    found: Rows = {}
    for language in languages:
        text = (assets / "data" / f"{split}.{language}.jsonl").read_text("utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        found[language] = {row["id"]: row for row in rows}
    return found


def retrieval(
    decoder: Decoder, params: dict, lora: Any, tokenizer: Any, rows: Rows
) -> dict[str, list[float]]:
    """Top-1 retrieval between each language and English by cosine, mean of both ways, per layer.

    Returns:
      Language -> share of sentences that find their translation, layer 0 (embeddings) to L.
    """

    def states(texts: list[str]) -> jax.Array:
        ids, _ = encode_texts(texts, tokenizer, TOKENS)
        tokens = np.zeros((len(ids), TOKENS), np.int32)
        mask = np.zeros((len(ids), TOKENS), np.int32)
        for row, found in enumerate(ids):
            tokens[row, : len(found)], mask[row, : len(found)] = found, 1
        return _pooled(decoder, params, lora, tokens, mask)

    scores = {}
    english = {key: row["utterance"] for key, row in rows["en"].items()}
    for language, translated in rows.items():
        if language == "en":
            continue
        shared = sorted(english.keys() & translated.keys())
        source = states([translated[key]["utterance"] for key in shared])
        target = states([english[key] for key in shared])
        scores[language] = [float(share) for share in _hits(source, target)]
    return scores


@partial(jax.jit, static_argnums=0)
def _pooled(decoder: Decoder, params: dict, lora: Any, tokens: Any, mask: Any) -> jax.Array:
    """States of every layer, averaged over the tokens: [L+1, B, D]."""
    layers = tuple(range(decoder.spec.layers + 1))
    weights = pooling_weights(mask, "mean")[None]
    out = decoder.forward(params, lora, tokens, stop=layers[-1], taps=layers, pool_weights=weights)
    return jnp.stack([out.pooled[layer][0] for layer in layers])


@jax.jit
def _hits(source: jax.Array, target: jax.Array) -> jax.Array:
    """Share of rows that find each other, [L+1]: mean of both ways."""
    cosine = similarities(source, target)  # [L+1, B, B]
    place = jnp.arange(cosine.shape[-1])
    forth = jnp.mean(jnp.argmax(cosine, axis=2) == place, axis=1)
    back = jnp.mean(jnp.argmax(cosine, axis=1) == place, axis=1)
    return (forth + back) / 2


def intents(
    decoder: Decoder, params: dict, lora: Any, tokenizer: Any, rows: Rows
) -> dict[str, float]:
    """Share of test rows whose greedily generated answer names the right intent, by language."""
    flat = [(language, row) for language, part in rows.items() for row in part.values()]
    examples = [render("intent", Record(row, f"{language}:{row['id']}")) for language, row in flat]
    prompts = [list(ids) for ids in encode_prompts(examples, tokenizer, system="")]
    answers = generate(
        decoder,
        params,
        lora,
        prompts,
        Decoding(ANSWER),
        stop_ids=stop_ids(decoder.spec, tokenizer),
        batch_size=125,
    )
    right: dict[str, list[bool]] = {}
    for (language, row), answer in zip(flat, answers, strict=True):
        text = tokenizer.decode(answer, skip_special_tokens=True)
        right.setdefault(language, []).append(parse_intent_slots(text).intent == row["intent"])
    return {language: float(np.mean(hits)) for language, hits in right.items()}
