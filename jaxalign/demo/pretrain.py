"""How the demo's base model was made: minutes of two CPU cores, from text to a checkpoint.

The loss is plain next-token cross-entropy over packed documents (`corpus.compose`): sentences,
translations, copies of words, and answers with random labels. Nothing else shapes the base; what
its middle layers know of translation it learnt as larger models do, from texts next to each other.

    python -m jaxalign.demo.pretrain --data ../shared/data --out jaxalign/demo/assets
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.demo.corpus import Corpus, Document, compose, read_corpus
from jaxalign.demo.ship import ship
from jaxalign.demo.tokenizer import (
    ASSISTANT,
    BEGIN,
    END,
    PAD,
    SYSTEM,
    USER,
    save_tokenizer,
    train_tokenizer,
)
from jaxalign.hf.save import save_base
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec

LABEL_REPEATS = 3  # against the much longer text of each language


@dataclass(frozen=True)
class Recipe:
    """The sizes of the base and of its pre-training."""

    vocab: int = 4096
    dim: int = 160
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 432
    rows: int = 16  # packed rows per step
    length: int = 128  # tokens per row
    longest: int = 96  # tokens kept of one document
    steps: int = 1300
    learning_rate: float = 4e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def spec(self) -> ModelSpec:
        """The shape, as a Llama."""
        return ModelSpec(
            family="llama",
            vocab=self.vocab,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim // self.heads,
            ffn=self.ffn,
            norm_eps=1e-5,
            rope_theta=10000.0,
            rope_scaling=None,
            qkv_bias=False,
            o_bias=False,
            mlp_bias=False,
            tied=True,
            max_position=256,
            bos_id=BEGIN,
            eos_ids=(END,),
            pad_id=PAD,
        )


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of one document, from `<|begin|>` to `<|end|>`, as the chat template does it."""
    ids = [BEGIN]
    for marker, text in ((SYSTEM, document.system), (USER, document.user)):
        if text is not None:
            ids += [marker, *tokenizer.encode(text, add_special_tokens=False).ids, END]
    if document.user is not None:
        ids.append(ASSISTANT)
    return [*ids, *tokenizer.encode(document.text, add_special_tokens=False).ids, END]


def packed(corpus: Corpus, tokenizer: Any, recipe: Recipe) -> Iterator[np.ndarray]:
    """Endless batches [3, B, T] int32: tokens, segments (0 = padding), positions.

    A document that does not fit opens the next row; none is split and none sees another.
    """
    seed, rows = recipe.seed, []
    row = np.zeros((3, recipe.length), np.int32)
    at, segment = 0, 0
    while True:
        seed += 1
        for document in compose(corpus, 4096, seed):
            ids = encode(document, tokenizer)[: recipe.longest]
            if at + len(ids) > recipe.length:
                rows.append(row)
                row, at, segment = np.zeros((3, recipe.length), np.int32), 0, 0
                if len(rows) == recipe.rows:
                    yield np.stack(rows, axis=1)
                    rows = []
            segment += 1
            row[:, at : at + len(ids)] = ids, [segment] * len(ids), range(len(ids))
            at += len(ids)


def pretrain(corpus: Corpus, tokenizer: Any, recipe: Recipe, report=print) -> dict:
    """The trained parameters, float32."""
    spec = recipe.spec()
    decoder = Decoder(spec, train_base=True)
    params = decoder.init(jax.random.key(recipe.seed))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, recipe.warmup, recipe.steps, 0.02 * recipe.learning_rate
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=recipe.weight_decay, mask=_is_matrix),
    )

    def loss_of(params: dict, batch: jax.Array) -> jax.Array:
        tokens, segments, positions = batch
        hidden = decoder.forward(
            params, None, tokens, segments=segments, positions=positions
        ).hidden
        assert hidden is not None  # the pass did not stop early
        logits = decoder.logits(params, hidden[:, :-1])  # [B, T-1, V]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        real = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
        return jnp.sum(losses * real) / jnp.sum(real)

    @jax.jit
    def update(params: dict, state: Any, batch: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        changes, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, changes), state, loss

    state, losses, start = optimizer.init(params), [], time.monotonic()
    batches = packed(corpus, tokenizer, recipe)
    for step in range(1, recipe.steps + 1):
        params, state, loss = update(params, state, jnp.asarray(next(batches)))
        losses.append(loss)
        if step % 100 == 0:
            mean = float(np.mean(jax.device_get(losses[-100:])))
            report(f"step {step}  loss {mean:.3f}  {time.monotonic() - start:.0f} s")
    return params


def _is_matrix(params: dict) -> dict:
    """Weight decay for all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def main() -> None:
    """Make everything below `jaxalign/demo/assets` anew."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", required=True, help="folder with xsid/, tatoeba/ and ntrex/")
    parser.add_argument("--out", default="jaxalign/demo/assets")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    given = parser.parse_args()
    recipe, base = Recipe(steps=given.steps, seed=given.seed), Path(given.out) / "base"
    corpus = read_corpus(given.data)
    ship(corpus, given.data, Path(given.out) / "data")
    tokenizer = train_tokenizer(corpus.sentences | {"labels": label_lines(corpus)}, recipe.vocab)
    params = pretrain(corpus, tokenizer, recipe)
    # float16, not bfloat16: the same 4 MB, three more bits of each weight.
    save_base(base, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params), recipe.spec())
    save_tokenizer(tokenizer, base)


def label_lines(corpus: Corpus) -> list[str]:
    """The words of answers, read while merges are learned so that labels are a few tokens each."""
    lines = [f"intent: {name};" for name in corpus.intents] * LABEL_REPEATS
    return lines + [f"; {slot}: " for slot in corpus.slots] * LABEL_REPEATS


if __name__ == "__main__":
    main()
