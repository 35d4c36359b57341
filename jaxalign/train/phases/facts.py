"""What the code around the step asks of a phase: its rows, its terms, what is said of it.

facts = PHASES['align']
facts.rows(config), facts.longest(config)        # batch.pairs, batch.pair_max_length
facts.stream(config, tokenizer, 'valid')
facts.build(config, decoder, weights)            # the phase as the step sees it
"""

from __future__ import annotations

import abc
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxalign.data.loader import Stream
from jaxalign.errors import UserError, brief
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec, check_tap
from jaxalign.objectives import FINAL, Needs, Tap, bind, resolve
from jaxalign.objectives.standards import Form
from jaxalign.settings import Config
from jaxalign.train.phases.build import (
    FIXED,
    NO_STEPS,
    Inner,
    Phase,
    Term,
    Weights,
    build,
    passes_of,
)
from jaxalign.train.phases.measured import check_width, opened
from jaxalign.train.phases.walk import POOLS

# The log has these numbers of each phase; its terms stand there under their own names.
LOGGED = ("loss", "micro_losses", "grad_norm", "plain_cosine", "tokens_per_second")


class Facts(abc.ABC):
    """One phase.

    Attributes:
      name: of the phase, of its group of settings and of its logs.
      number: its place among the phases.
      sides: of its batches.
      answered: those with an answer.
      rows_key: the setting of a micro-batch's rows, and `length_key` that of their length.
      unit: what follows a number of rows, where they are not rows.
      scores: what validation measures besides losses.
    """

    name: str
    number: int
    sides: tuple[str, ...]
    answered: tuple[str, ...] = ()
    rows_key: str
    length_key: str
    unit: str = ""
    scores: tuple[str, ...] = ()

    @abc.abstractmethod
    def stream(self, config: Config, tokenizer: Any, split: str = "train", ways: int = 1) -> Stream:
        """Its rows; a batch's are split over devices in so many `ways`."""

    @abc.abstractmethod
    def batch(self, ids: Any) -> Any:
        """A batch whose arrays are all this one [..., B, T]: every token an answer."""

    @abc.abstractmethod
    def needs(self, config: Config) -> dict[str, Needs]:
        """What an objective gets that does not say what it needs."""

    def offers(self, config: Config) -> Mapping[str, Any]:
        """Options of objectives that follow from the settings of the phase."""
        return {}

    def unread(self, config: Config) -> Iterator[str]:
        """Sentences about its settings that no objective of it reads."""
        return iter(())

    def watches(self, config: Config) -> dict[str, Needs]:
        """What validation needs, whatever the objectives are."""
        return {}

    def packed(self, config: Config) -> bool:
        """Whether several rows share a sequence."""
        return False

    def measure(self, config: Config, stream: Stream, states: list) -> dict[str, float]:
        """`scores` by the states of all validation batches.

        Args:
          states: of each batch, the stream's row numbers and side -> tap -> pooled states of what
            `watches` names, over all processes.
        """
        return {}

    def warnings(self, config: Config, metrics: Mapping[str, Any]) -> Iterator[str]:
        """Sentences after the first update, where the loss cannot do its work."""
        yield from ()

    def unmoved(self, config: Config) -> str:
        """Why a first gradient is zero."""
        return (
            f"{self.name}: the first gradient has norm 0.0; no trained block sees the rows "
            "(lora.layers)"
        )

    def divided(self, config: Config, ways: int) -> dict[str, Any] | None:
        """Settings for micro-batches of 1/ways the rows, or None where that is another run: rows
        that a term compares would part."""
        rows, rest = divmod(self.rows(config), ways)
        groups = (term.objective.group for term in self.terms(config))
        whole = not rest and all(group and rows % group == 0 for group in groups)
        return {self.rows_key: rows} if whole else None

    def block(self, config: Config) -> int:
        """So many consecutive rows of a micro-batch may change places with one another, and no term
        is another; 0: all of it, 1: none."""
        objectives = [term.objective for term in self.terms(config)]
        if any(one.group != 1 and one.ordered for one in objectives):
            return 1
        return math.gcd(*(one.group for one in objectives if one.group > 1))

    def shares(self, config: Config) -> int:
        """Into how many equal parts the rows of a micro-batch fall on each device."""
        return 1

    def inner(self, config: Config) -> Inner:
        """The steps within an update."""
        return NO_STEPS

    def part(self, config: Config) -> Any:
        """Its group of settings."""
        return getattr(config, self.name)

    def rows(self, config: Config) -> int:
        """Rows (or pairs) of a micro-batch."""
        return _value(config, self.rows_key)

    def longest(self, config: Config) -> int:
        """The longest padded row: the last bucket, or the limit where none is set."""
        limit = _value(config, self.length_key)
        return min(limit, max(config.batch.buckets, default=limit))

    def objectives(self, config: Config) -> Iterator[tuple[str, Any]]:
        """The setting and the part of each of its objectives, with weight or without."""
        yield self.name, self.part(config)
        for number, extra in enumerate(config.objectives):
            if extra.phase == self.name:
                yield f"objectives[{number}]", extra

    def terms(self, config: Config) -> tuple[Term, ...]:
        """Its objective, and what `objectives` adds to it.

        Raises:
          UserError: an unknown objective or option; two terms of one name, or one with a name that
            the log has; a file that an option names and that is missing or another.
        """
        found = [self._term(config, key, part) for key, part in self.objectives(config)]
        names = [one.name for one in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(
                f"objectives: two terms of the {self.name} phase are called {twice!r}, so their "
                "logs could not be distinguished; give one function another name"
            )
        if taken := next((name for name in names if name in LOGGED), None):
            raise UserError(
                f"objectives: the log of the {self.name} phase already has a {taken}; give the "
                f"function {taken!r} another name"
            )
        return tuple(found)

    def _term(self, config: Config, key: str, part: Any) -> Term:
        objective = bind(
            resolve(part.objective),
            part.objective,
            opened(part.options, f"{key}.options"),
            f"{key}.options",
            self.offers(config),
            self.needs(config),
            main=key == self.name,
        )
        every = getattr(part, "every", 1) if part is not self.part(config) else 1
        return Term(term_name(part), objective, part.weight, every)

    def check(self, config: Config, spec: ModelSpec, full: bool) -> None:
        """Whether model and terms go together.

        Raises:
          UserError: a tap past the model or of an unknown form, a side or an answer that the rows
            do not have, two terms that read one answer from different models, or what full
            fine-tuning does not have.
        """
        terms = self.terms(config)
        for term in terms:
            for one in passes_of([term.objective.needs]):
                for tap in one.taps:
                    _check_form(tap, term.name)
                    if tap.layer != FINAL:
                        check_tap(spec, tap.layer, self._tap_key(config, term, tap.layer))
                if full and one.model in FIXED:
                    raise UserError(
                        f"objective {term.name} compares with the frozen base, which full "
                        "fine-tuning does not keep; set trainable=lora"
                    )
            if not set(term.objective.needs) <= set(self.sides):
                read, have = (" and ".join(names) for names in (term.objective.needs, self.sides))
                raise UserError(
                    f"objective {term.name} reads {read}, and the rows of the {self.name} phase "
                    f"have {have}; choose another objective, phase or align.rows"
                )
            for found in term.objective.measured.values():
                check_width(found, spec.dim)
            if term.objective.head and config.optim.missing == "skip":
                raise UserError(
                    f"optim.missing: skip works on adapters only, and objective {term.name} "
                    "trains a head; set optim.missing=zero"
                )
        self._check_answers(terms)

    def _check_answers(self, terms: Sequence[Term]) -> None:
        """Whether sides have the answers that terms read, each from one model."""
        first: dict[str, tuple[str, str]] = {}  # side -> who reads its answer, and of which model
        read = (
            (term.name, side, asked.answers)
            for term in terms
            for side, asked in term.objective.needs.items()
            if asked.answers
        )
        for name, side, model in read:
            if side not in self.answered:
                raise UserError(
                    f"objective {name} predicts the answer of {side}, and the rows of the "
                    f"{self.name} phase have none there; choose another objective, phase or "
                    "align.rows"
                )
            other, others = first.setdefault(side, (name, model))
            if model != others:
                raise UserError(
                    f"objectives: {other} and {name} read the answer of {side} from two models "
                    f"({others} and {model}), and each side is run once; leave one of them out, or "
                    "put it into another phase"
                )

    def _tap_key(self, config: Config, term: Term, layer: int) -> str:
        """What names this layer of a term: an option of it, or the setting that it follows."""
        named = (
            f"{key}.options.{option}"
            for key, part in self.objectives(config)
            if term_name(part) == term.name
            for option, value in part.options.items()
            if layer in (value if isinstance(value, list) else [value])
        )
        followed = layer == config.align.layer
        return next(named, "align.layer" if followed else f"objective {term.name}: layer")

    def build(
        self,
        config: Config,
        decoder: Decoder,
        weights: Weights,
        layer_mask: jax.Array | None = None,
    ) -> Phase:
        """The phase as the step sees it.

        Raises:
          UserError: as of `terms` and `check`.
        """
        watched = self.watches(config)
        kept: list[Tap] = [tap for needs in watched.values() for tap in needs.taps]
        return build(
            decoder,
            self.terms(config),
            weights=weights,
            also=watched,
            packed=self.packed(config),
            rule=self.part(config).rule,
            number=self.number,
            kept=tuple(dict.fromkeys(kept)),
            inner=self.inner(config),
            layer_mask=layer_mask,
        )


def term_name(part: Any) -> str:
    """How the log calls the objective of these settings: by its function."""
    return part.objective.rpartition(":")[2]


def _check_form(tap: Tap, name: str) -> None:
    for what, word, known in (
        ("pool", tap.pool, POOLS), ("states", tap.states, typing.get_args(Form)),
    ):  # fmt: skip
        if word not in known:
            raise UserError(
                f"objective {name}: Tap.{what} is {brief(word)}, which is not among "
                f"{', '.join(known)}"
            )


def _value(config: Config, key: str) -> Any:
    part, _, name = key.partition(".")
    return getattr(getattr(config, part), name)
