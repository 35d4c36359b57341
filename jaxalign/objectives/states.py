"""What an objective asks of the model, what it is given, and what it gives back.

    Tap(16)                                          # block 16's output, mean over real tokens
    Tap(FINAL, 'last')                               # after the final norm, each row's last token
    Needs(taps=(Tap(12, TOKENS),), reference=(Tap(12, TOKENS),))     # whole states, of two models

A phase takes the union of what its objectives need and runs the model once for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FINAL = -1  # a tap's layer: after the last block and the final norm
TOKENS = "tokens"  # a tap's pool: none, whole states
USER, ANSWER = 2, 3  # a batch's `roles`: tokens of the user's text, of the answer
IGNORE = -100  # in a batch's `answers`: no token is predicted here


class Tap(NamedTuple):
    """Where an objective looks, and in which form."""

    layer: int  # 0: the embeddings, k: the output of block k, FINAL
    # A name of `pooling.POOLINGS`; `prompt`, `answer`: the mean over these tokens alone;
    # `predicts_prompt`, `predicts_answer`: over the tokens before each of them; TOKENS.
    pool: str = "mean"
    states: str = "raw"  # or a form of `objectives.standards.FORMS`; pooled states only


class Needs(NamedTuple):
    """What an objective reads of one side of a batch."""

    taps: tuple[Tap, ...] = ()
    reference: tuple[Tap, ...] = ()  # the same of the frozen base, without the adapter
    # Final states at the places that predict an answer token: `trained`; `stopped`: no gradient
    # flows into them (nor into this side's taps); `reference`: those of the frozen base; `start`:
    # of the adapter that training started from, on a base without one the base's.
    answers: str = ""

    def __add__(self, other: Any) -> Needs:  # type: ignore[override]  # the union, not a chain
        """What both need.

        Raises:
          ValueError: they want different answers of one side.
        """
        if self.answers and other.answers not in ("", self.answers):
            raise ValueError(f"answers both {self.answers} and {other.answers}")
        join = lambda a, b: tuple(dict.fromkeys((*a, *b)))  # noqa: E731
        return Needs(
            join(self.taps, other.taps),
            join(self.reference, other.reference),
            self.answers or other.answers,
        )


class View(NamedTuple):
    """One side of a batch as its objectives see it.

    Pooled states are [B, D] float32; whole ones (TOKENS) are [B, T, D] in the model's dtype.
    """

    real: jax.Array  # [B, T] bool: no padding
    taps: dict[Tap, jax.Array]
    reference: dict[Tap, jax.Array]
    # After the final norm: [B, A, D], a row each; of functions that are declared `by_token`
    # [W, A, D] where rows are end to end, their answers one behind the other. `batch.answers` has
    # the same two axes.
    answers: jax.Array | None = None
    # int32 [W, A]: of answers one behind the other the row of each, from 0 in its sequence.
    owners: jax.Array | None = None

    def only(self, asked: Needs) -> View:
        """What of it was asked for."""
        return self._replace(
            taps={tap: self.taps[tap] for tap in asked.taps},
            reference={tap: self.reference[tap] for tap in asked.reference},
            answers=self.answers if asked.answers else None,
            owners=self.owners if asked.answers else None,
        )

    def by_rows(self, batch: Any) -> View:
        """The same with the answers of each row, [B, A, D] as `batch.answers` [B, A] has them.

        Where that has no token, any state stands.
        """
        if self.answers is None or self.owners is None:
            return self
        answers = batch.answers
        there = (answers != IGNORE).reshape(len(self.owners), -1, answers.shape[-1])  # [W, R, A]
        number = jnp.sum(there, axis=-1)
        first = jnp.cumsum(number, axis=-1) - number
        at = jnp.where(there, first[..., None] + jnp.arange(answers.shape[-1]), 0)
        found = jax.vmap(lambda states, places: states[places])(self.answers, at)
        return self._replace(answers=found.reshape(*answers.shape, -1), owners=None)

    def __getitem__(self, layer: int) -> jax.Array:  # type: ignore[override]
        """The pooled states of this layer, where one tap is there.

        Raises:
          KeyError: none is, or several are; then ask `taps`.
        """
        found = [x for tap, x in self.taps.items() if tap.layer == layer and tap.pool != TOKENS]
        if len(found) != 1:
            raise KeyError(f"{len(found)} pooled taps of layer {layer}; there are {[*self.taps]}")
        return found[0]


class States(NamedTuple):
    """A batch after the model: a view of each side that an objective asked for."""

    # `text` of task rows; `source` and `target` of pairs; `student` and `teacher` of prompts.
    views: dict[str, View]
    head: jax.Array | None = None  # [V, D]; where the answers are asked for
    soft_cap: float = 0.0  # logits are c·tanh(hidden · head / c); 0: no cap
    heads: dict[str, Any] = {}  # term -> what it trains next to the adapter  # noqa: RUF012

    def only(self, needs: Mapping[str, Needs]) -> States:
        """What one objective has asked for, whatever others of the phase read."""
        views = {side: view.only(needs.get(side, Needs())) for side, view in self.views.items()}
        return self._replace(views=views)

    def by_rows(self, batch: Any) -> States:
        """The same with the answers of each row; see `View.by_rows`."""
        return self._replace(views={side: view.by_rows(batch) for side, view in self.views.items()})

    @property
    def text(self) -> View:
        """Task rows."""
        return self.views["text"]

    @property
    def source(self) -> View:
        """The sources of sentence pairs."""
        return self.views["source"]

    @property
    def target(self) -> View:
        """The targets of sentence pairs."""
        return self.views["target"]

    @property
    def student(self) -> View:
        """The answer behind the prompt from which it is learnt."""
        return self.views["student"]

    @property
    def teacher(self) -> View:
        """The same answer behind the other prompt."""
        return self.views["teacher"]

    @property
    def hidden(self) -> jax.Array:
        """[B, T, D] of task rows after the final norm."""
        return self.text.taps[Tap(FINAL, TOKENS)]


class Loss(NamedTuple):
    """A sum and its count, never a mean: micro-batches and devices add up exactly."""

    sum: jax.Array  # scalar float32
    # Scalar float32: answer tokens, pairs, ...; it hides tuple.count, which nobody calls.
    count: jax.Array  # type: ignore[assignment]
    logs: dict[str, jax.Array]  # name -> scalar sum over the same count
