"""Pooled states of every layer, streamed: each sentence runs once, only its vectors are kept.

    vectors = pooled_states(base, system, ['Guten Morgen', 'Good morning'])
    vectors['mean'][16]                                  # [2, D] float32, the output of block 16
    stored = store_states(base, system, corpus, Path('report/states/base'), ('mean', 'last'))
    stored['mean'].shape                                 # [L+1, G, N, D], a memory map

Vectors of a whole corpus go to disk language by language, so that they need no memory and a run
that dies goes on with the language it was at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.base import Base
from jaxalign.checksums import text_digest
from jaxalign.data.chat import encode_texts
from jaxalign.data.sampling import choose_buckets
from jaxalign.errors import UserError
from jaxalign.generate import System
from jaxalign.model.decoder import Decoder
from jaxalign.model.layers import pool
from jaxalign.model.spec import check_tap
from jaxalign.objectives import FINAL
from jaxalign.objectives.pooling import pooling_weights
from jaxalign.probe.blocks import Blocks
from jaxalign.probe.corpus import Parallel
from jaxalign.sharding import constrain

POOLINGS = ("mean", "mean_rest", "last", "position", "first")
LONGEST = 512  # tokens of a sentence, if no more are asked for; longer ones are cut and counted


def pooled_states(
    base: Base,
    system: System,
    texts: Sequence[str],
    poolings: Sequence[str] = ("mean",),
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
    report: Callable[[int], None] | None = None,
    buckets: Sequence[int] = (),
    what: str = "states",
    longest: int = 0,
) -> dict[str, np.ndarray]:
    """Vectors of every text at every layer asked for.

    Args:
      base: tokenizes.
      system: the weights.
      texts: any number; each becomes tokens as the tokenizer does by default.
      poolings: mean, last, position (later tokens weigh more), first.
      layers: outputs of these blocks, 0 for the embeddings, FINAL for the states after the final
        norm; None: all blocks. Blocks above the highest are not run.
      batch_size: texts of one pass.
      report: called with the number of texts of every finished batch.
      buckets: padded lengths; empty: chosen from these texts.
      what: `states`, or `neurons`: the activations of the gates in the feed-forward network of
        these blocks (layer 0 has none; None: all blocks).
      longest: tokens that are read of a text; 0: as many as of a sentence.

    Returns:
      Pooling -> [layers, texts, D] float32, or [layers, texts, F] of neurons.

    Raises:
      UserError: a pooling or layer that does not exist, no texts.
    """
    unknown = [name for name in poolings if name not in POOLINGS]
    if unknown or not poolings:
        raise UserError(f"poolings are {', '.join(POOLINGS)}; not {unknown[:1]}")
    if not texts:
        raise UserError("no texts: there is nothing to take states of")
    neurons = what == "neurons"
    taps = tuple(range(neurons, base.spec.layers + 1) if layers is None else layers)
    for tap in taps:
        if tap != FINAL or neurons:
            check_tap(base.spec, tap, "layer")
    if neurons and 0 in taps:
        raise UserError("layer 0 is the embeddings, which have no neurons; give 1 or more")
    ids, _ = encode_texts(texts, base.tokenizer, longest or _most(base), control="text")
    shape = (len(taps), len(texts), base.spec.ffn if neurons else base.spec.dim)
    found = {name: np.empty(shape, np.float32) for name in poolings}
    waiting: list[tuple[list[int], jax.Array]] = []

    def fetch() -> None:
        rows, vectors = waiting.pop(0)
        host = np.asarray(jax.device_get(vectors))[:, :, : len(rows)]  # [taps, P, rows, D]
        for place, name in enumerate(poolings):
            found[name][:, rows] = host[:, place]
        if report:
            report(len(rows))

    with jax.set_mesh(system.mesh):
        for rows, tokens, mask in _batches(ids, batch_size, buckets):
            vectors = _pooled(system.decoder, system.params, system.lora, tokens, mask, taps,
                              tuple(poolings), "neurons" if neurons else "pooled")  # fmt: skip
            waiting.append((rows, vectors))
            if len(waiting) > 2:  # the device works while the host stores
                fetch()
        while waiting:
            fetch()
    return found


def store_states(
    base: Base,
    system: System,
    corpus: Parallel,
    folder: Path,
    poolings: Sequence[str],
    identity: dict[str, Any],
    dtype: str = "float32",
    batch_size: int = 32,
    report: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Vectors of a corpus on disk, one file a pooling, computed where they are not there yet.

    Args:
      base: tokenizes.
      system: the weights.
      corpus: the sentences.
      folder: holds `POOLING.npy` and `states.json`, see `jaxalign.probe.blocks`. Languages whose
        vectors are there and intact are not computed again.
      poolings: see `pooled_states`.
      identity: what the vectors depend on besides the sentences; JSON-ready.
      dtype: float32 or float16 on disk.
      batch_size: texts of one pass.
      report: called with the number of texts of every finished batch.

    Returns:
      Pooling -> [L+1, G, N, D], languages in the order of `corpus.languages`.

    Raises:
      UserError: the folder holds vectors of something else, or cannot be written.
    """
    languages = corpus.languages
    ids = corpus_tokens(base, corpus)
    what = {
        **identity,
        "languages": list(languages),
        "sentences": len(corpus),
        "text": _digest(corpus),
        "tokens": token_digest(ids)[:16],
        "poolings": list(poolings),
        "dtype": dtype,
    }
    shape = (base.spec.layers + 1, len(languages), len(corpus), base.spec.dim)
    blocks = Blocks(folder, what, languages, shape, dtype)
    lengths = [len(row) for rows in ids.values() for row in rows]
    buckets = choose_buckets(lengths, batch_size)
    for language in languages:
        if language in blocks.done:
            if report:
                report(len(corpus))
            continue
        texts = corpus.sentences[language]
        vectors = pooled_states(base, system, texts, poolings, None, batch_size, report, buckets)
        blocks.write(language, vectors)
    return dict(blocks.arrays)


def corpus_tokens(base: Base, corpus: Parallel) -> dict[str, list[np.ndarray]]:
    """Language -> token ids of its sentences, as `pooled_states` reads them."""
    return {
        language: encode_texts(texts, base.tokenizer, _most(base), control="text")[0]
        for language, texts in corpus.sentences.items()
    }


def token_digest(ids: Mapping[str, Sequence[np.ndarray]]) -> str:
    """SHA-256 of the tokens of a corpus: what its states depend on besides the weights.

    Its texts alone would not do, as a tokenizer may be edited in place.
    """
    digest = hashlib.sha256()
    for language in sorted(ids):
        rows = ids[language]
        digest.update(f"{language} {[len(row) for row in rows]}".encode())
        digest.update(np.concatenate(rows).astype("<i4").tobytes())
    return digest.hexdigest()


def cut_sentences(base: Base, corpora: Sequence[Parallel]) -> tuple[str, ...]:
    """`cut_note` of all sentences."""
    return cut_note(base, [x for one in corpora for rows in one.sentences.values() for x in rows])


def cut_note(base: Base, texts: Sequence[str], what: str = "sentences") -> tuple[str, ...]:
    """A note if texts are longer than what is read of them; empty if none is."""
    long = sum(length > _most(base) for length in lengths_of(base, texts))
    if not long:
        return ()
    return (
        f"Of {len(texts):,} {what} {long:,} are longer than {_most(base)} tokens and were cut.",
    )


def lengths_of(base: Base, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, as `pooled_states` reads them, before any cut."""
    return encode_texts(texts, base.tokenizer, control="text")[1]


def _most(base: Base) -> int:
    return min(LONGEST, base.spec.max_position)


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _pooled(
    decoder: Decoder,
    params: Any,
    lora: Any,
    tokens: jax.Array,  # [B, T] int32
    mask: jax.Array,  # [B, T] int32
    taps: tuple[int, ...],
    poolings: tuple[str, ...],
    sows: str,
) -> jax.Array:  # [taps, P, B, D or F] float32
    weights = jnp.stack([pooling_weights(mask, name) for name in poolings])
    inner = tuple(tap for tap in taps if tap != FINAL)
    stop = None if FINAL in taps else max(taps)
    out = decoder.forward(
        params,
        lora,
        tokens,
        stop=stop,
        taps=inner,
        pool_weights=weights,
        sows=sows,
        asked=mask,
    )
    pooled = dict(out.pooled)
    if out.hidden is not None:
        pooled[FINAL] = pool(out.hidden, weights)
    # Letters that no mesh axis splits: every process reads all vectors.
    return constrain(jnp.stack([pooled[tap] for tap in taps]), "- - - -")


def _batches(
    ids: Sequence[np.ndarray], size: int, buckets: Sequence[int]
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(text numbers, tokens [B, T], mask [B, T]): texts of similar length together.

    B is `size`, and less for texts of more than LONGEST tokens: where there is no kernel, attention
    holds T x T scores of each of them.
    """
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    buckets = buckets or choose_buckets([len(row) for row in ids], size)
    while order:
        width = next(b for b in sorted(buckets) if b >= len(ids[order[0]]))
        fit = max(size * LONGEST**2 // max(width, LONGEST) ** 2, 1)
        rows, order = order[:fit], order[fit:]
        tokens = np.zeros((fit, width), np.int32)
        mask = np.zeros((fit, width), np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(ids[row])] = ids[row]
            mask[place, : len(ids[row])] = 1
        yield rows, tokens, mask


def _digest(corpus: Parallel) -> str:
    text = json.dumps([corpus.sentences[language] for language in corpus.languages])
    return text_digest(text)[:16]
