"""Mean states of languages: what a base makes of the same sentences in each of them.

found = language_means(base, 'data/ntrex', layer=FINAL, pooling='last')
found.means                                      # [n, D] float64, a row for each language
found.standardised()                             # the same, each dimension over its deviation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxalign.base import Base
from jaxalign.errors import UserError
from jaxalign.model.spec import check_tap
from jaxalign.objectives import FINAL
from jaxalign.objectives.standards import Moments
from jaxalign.probe.corpus import Parallel, read_parallel
from jaxalign.probe.states import (
    POOLINGS,
    corpus_tokens,
    cut_sentences,
    pooled_states,
    token_digest,
)
from jaxalign.terminal import bars, say

LAST = "final"  # the word for the states after the final norm


@dataclass(frozen=True)
class Means:
    """The mean state of each language, and where it was taken."""

    languages: tuple[str, ...]
    means: np.ndarray  # [n, D] float64
    whole: Moments  # of all sentences of all languages
    sentences: int  # of each language
    layer: int  # FINAL: after the final norm
    pooling: str
    base: str  # the fingerprint
    tokens: str  # digest of the sentences as the base reads them

    def standardised(self) -> np.ndarray:
        """[n, D]: each dimension minus its mean, by its deviation over all sentences."""
        standards = self.whole.standards()
        return (self.means - standards.mean) * standards.scale


def layer_of(word: str) -> int:
    """The tap that `final` or the number of a block names.

    Raises:
      UserError: neither.
    """
    if word == LAST:
        return FINAL
    if not word.isdecimal():
        raise UserError(f"--layer: {word!r} is neither {LAST} nor the number of a block")
    return int(word)


def language_means(
    base: Base,
    parallel: str,
    *,
    layer: int,
    pooling: str,
    languages: Sequence[str] = (),
    rows: int = 0,
    pivot: str = "en",
) -> Means:
    """The mean state of each language over the same sentences.

    Args:
      base: the bare base.
      parallel: sentences in all languages at once; see `jaxalign.probe.corpus`.
      layer: of the states, 0 for the embeddings, FINAL after the final norm.
      pooling: how the states of a sentence become one; of `jaxalign.probe.states.POOLINGS`.
      languages: keep only these; empty: all.
      rows: keep only the first sentences; 0: all.
      pivot: a language that must be there.

    Raises:
      UserError: text, layer or pooling that cannot be used.
    """
    if pooling not in POOLINGS:
        raise UserError(f"--pooling: {pooling!r} is not one of {', '.join(POOLINGS)}")
    if layer != FINAL:
        check_tap(base.spec, layer, "--layer")
    corpus, system = read_text(parallel, languages, rows, pivot), base.bare()
    for note in (*corpus.notes, *cut_sentences(base, [corpus])):
        say(note)
    whole, means = Moments(base.spec.dim), []
    with bars(mode=base.config.log.progress) as bar:
        task = bar.add_task("states", total=len(corpus) * len(corpus.languages))
        for language in corpus.languages:
            states = pooled_states(
                base, system, corpus.sentences[language], (pooling,), (layer,),
                base.config.generate.batch, lambda count: bar.advance(task, count),
            )[pooling][0].astype(np.float64)  # fmt: skip
            means.append(states.mean(axis=0))
            whole.add(len(states), means[-1], ((states - means[-1]) ** 2).sum(axis=0))
    found = np.stack(means)
    if not np.isfinite(found).all():
        raise UserError(f"{base.config.model.path}: states are not finite; set model.dtype=float32")
    return Means(
        corpus.languages, found, whole, len(corpus), layer, pooling, base.fingerprint,
        token_digest(corpus_tokens(base, corpus)),
    )  # fmt: skip


def read_text(
    parallel: str, languages: Sequence[str] = (), rows: int = 0, pivot: str = "en"
) -> Parallel:
    """The sentences of `language_means`, whose arguments and errors these are."""
    corpora = read_parallel(parallel, languages, rows, pivot)
    if len(corpora) > 1:
        raise UserError(
            f"--parallel: {parallel} holds pairs of languages; means can be compared where all "
            "languages have the same sentences, as in LANG.txt files or rows that share an id"
        )
    return corpora[0]
