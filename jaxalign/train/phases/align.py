"""Alignment: both sides of sentence pairs through the lower blocks; middle states are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.batch import PairBatch
from jaxalign.data.loader import Stream
from jaxalign.data.streams import pair_stream
from jaxalign.errors import UserError
from jaxalign.model.spec import ModelSpec, check_tap
from jaxalign.objectives import Needs, Objective, Tap, both_sides
from jaxalign.objectives.contrastive import similarities
from jaxalign.settings import AUTO, Config
from jaxalign.train import flat
from jaxalign.train.phases.build import Term
from jaxalign.train.phases.facts import Facts

IN_TAPS = {"pooling": "pool", "form": "states"}  # options that say how a term's taps are read


class Align(Facts):
    """See the module."""

    name, number = "align", 1
    sides = ("source", "target")
    rows_key, length_key = "batch.pairs", "batch.pair_max_length"
    unit = " pairs"
    scores = ("eval/retrieval",)

    def stream(self, config: Config, tokenizer: Any, split: str = "train", ways: int = 1) -> Stream:
        """Sentence pairs."""
        return pair_stream(config, tokenizer, split, ways, self.block(config))

    def batch(self, ids: Any) -> PairBatch:
        """Unread: row numbers; languages where an objective asks for them."""
        spoken = jax.eval_shape(lambda x: x[..., 0], ids)
        return PairBatch(ids, ids, ids, ids, None, spoken, spoken)

    def tap(self, config: Config) -> Tap:
        """The aligned layer in the form in which it is compared."""
        return Tap(config.align.layer, config.align.pooling, config.align.states)

    def needs(self, config: Config) -> dict[str, Needs]:
        """The aligned layer of both sides."""
        return both_sides(Needs((self.tap(config),)))

    def watches(self, config: Config) -> dict[str, Needs]:
        """The same, for `eval/retrieval`."""
        return self.needs(config)

    def offers(self, config: Config) -> dict[str, Any]:
        """What the contrastive loss takes, and others under these names."""
        return offered(config)

    def unread(self, config: Config) -> Iterator[str]:
        """Settings of the contrastive loss where other terms stand in its place."""
        return unread(config, self.terms(config))

    def measure(self, config: Config, stream: Stream, states: list) -> dict[str, float]:
        """`eval/retrieval`: the share of sources whose target is the nearest of all."""
        return {"eval/retrieval": retrieval(stream, states, self.tap(config))}

    def warnings(self, config: Config, metrics: Mapping[str, Any]) -> Iterator[str]:
        """A flat loss, and copies among the candidates."""
        return flat.warnings(config, metrics)

    def unmoved(self, config: Config) -> str:
        """Embeddings are frozen, and a pair alone has no negatives."""
        if config.align.layer and config.batch.pairs > 1:
            return super().unmoved(config)
        return (
            "align: no gradient reaches the adapter; the embeddings (align.layer=0) are frozen and "
            "a single pair has no negatives: choose a layer of 1 or more and batch.pairs of 2 or "
            "more"
        )

    def check(self, config: Config, spec: ModelSpec, full: bool) -> None:
        """Also the layer that validation looks at."""
        if config.align.layer == AUTO:
            raise UserError(
                "align.layer=auto needs the weights of the base; call jaxalign.train(config), "
                "which measures its layers, or name one"
            )
        check_tap(spec, config.align.layer)
        super().check(config, spec, full)


def offered(config: Config) -> dict[str, Any]:
    """Options of objectives -> what the settings of the phase say."""
    align = config.align
    return {
        "layer": align.layer,
        "pooling": align.pooling,
        "form": align.states,
        "temperature": align.temperature,
        "direction": align.direction,
        "negatives": align.negatives,
        "group": align.group,
        "detach": align.detach,
    }


def unread(config: Config, terms: Sequence[Term]) -> Iterator[str]:
    """Sentences about these settings where they are no defaults and no term reads them."""
    plain = offered(type(config)())
    for name, value in offered(config).items():
        if name == "layer" or value == plain[name]:  # retrieval is measured at the layer
            continue
        if not any(reads(term.objective, name, value) for term in terms):
            key = "states" if name == "form" else name
            yield f"align.{key}={value} is not read by {', '.join(one.name for one in terms)}"


def reads(objective: Objective, name: str, value: Any) -> bool:
    """Whether a bound objective reads this value of an offered setting.

    An objective may take how states are pooled and have no use for it: its taps say.
    """
    if name not in IN_TAPS:
        return name in objective.function.keywords
    taps = (tap for side in objective.needs.values() for tap in side.taps)
    return any(getattr(tap, IN_TAPS[name]) == value for tap in taps)


def retrieval(stream: Any, states: list[tuple[Any, dict]], tap: Tap) -> float:
    """Top-1 retrieval by cosine, source to target, among all validation pairs.

    Several languages may share an English target: finding its copy is finding it. Another sentence
    that is as near is not: of a model that has collapsed, nothing is found.

    Args:
      states: of every batch, the stream's row numbers and both sides' states, over all processes.
    """
    rows = np.concatenate([numbers for numbers, _ in states])
    source, target = (
        np.concatenate([found[side][tap] for _, found in states])[rows >= 0]
        for side in ("source", "target")
    )
    known: dict[bytes, int] = {}  # numpy's own text forgets zeros at the end
    same = [known.setdefault(row.target.tobytes(), len(known)) for row in stream.rows]
    sentence = np.array(same)[rows[rows >= 0]]
    hits = 0
    for first in range(0, len(source), 1024):
        block = np.asarray(
            similarities(jnp.asarray(source[first : first + 1024]), jnp.asarray(target))
        )
        own = sentence[first : first + len(block), None] == sentence
        right, other = (
            np.max(block, axis=-1, initial=-np.inf, where=chosen) for chosen in (own, ~own)
        )
        hits += int((right > other).sum())
    return hits / max(len(source), 1)


ALIGN = Align()
