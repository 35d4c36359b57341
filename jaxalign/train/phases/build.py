"""A phase as the step sees it: how a batch becomes states, and the terms that read them.

The terms say what they need of each side of a batch. `build` takes the union and plans the passes:
one through the trained model, as far as the highest tap; one without gradients, one through the
frozen base and one with the adapter of the start, where they are asked for.

    phase = build(decoder, (Term('contrastive', objective),), weights=lora_weights)
    states = phase.states(trained, frozen, batch, key)
    phase.passes                                     # (Pass(sides=('source', 'target'), ...),)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.data.batch import by_token, mixed
from jaxalign.errors import UserError
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec, check_tap
from jaxalign.objectives import FINAL, TOKENS, Loss, Needs, Objective, States, Tap, View
from jaxalign.train.flops import training_flops
from jaxalign.train.phases.walk import Pass, lay, walk
from jaxalign.train.state import HEADS, Frozen, without_heads

Weights = Callable[[Any, Frozen], tuple[dict, dict | None]]  # -> (base, adapter)


def lora_weights(trained: Any, frozen: Frozen) -> tuple[dict, dict | None]:
    """(base, adapter) where the adapter is trained."""
    return frozen.base, trained


def full_weights(dtype: Any) -> Weights:
    """(base, adapter) where everything is trained: float32 masters, used in `dtype`."""
    return lambda trained, frozen: (
        jax.tree.map(lambda w: w.astype(dtype), without_heads(trained)),
        None,
    )


@dataclass(frozen=True)
class Term:
    """One objective of a phase."""

    name: str
    objective: Objective
    weight: float = 1.0
    every: int = 1  # it counts in every n-th update

    @property
    def share(self) -> float:
        """Its weight in the mean over updates."""
        return self.weight / self.every


class Inner(NamedTuple):
    """The steps within an update of rules that look ahead (`train.rules.meta`)."""

    rate: float = 0.0  # of plain SGD
    steps: int = 1


NO_STEPS = Inner()
FIXED = ("reference", "start")  # passes through models that no update changes


@dataclass(frozen=True)
class Phase:
    """How a batch becomes states, and the terms that read them.

    Attributes:
      states: (trained, frozen, batch, dropout key) -> States.
      terms: what is minimised.
      passes: what `states` runs.
      rule: name of the gradient rule (`train.rules`).
      number: its place among all phases; dropout's masks depend on it.
      kept: the taps that an evaluation returns.
      inner: the rule's own steps.
      layer_mask: [L], 1 where a block's adapter is trained, for steps of the rule's own; None: all.
    """

    states: Callable[[Any, Any, Any, Any], States]
    terms: tuple[Term, ...]
    passes: tuple[Pass, ...] = ()
    rule: str = "mean"
    number: int = 0
    kept: tuple[Tap, ...] = ()
    inner: Inner = NO_STEPS
    layer_mask: jax.Array | None = None

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All taps of all passes."""
        return tuple(dict.fromkeys(tap for one in self.passes for tap in one.taps))

    @property
    def formed(self) -> tuple[Tap, ...]:
        """Those whose mean and deviation are measured before the first update."""
        return tuple(tap for tap in self.taps if tap.states != "raw")

    @property
    def starts(self) -> bool:
        """Whether a pass runs with the adapter that training started from."""
        return any(one.model == "start" for one in self.passes)

    @property
    def answers(self) -> bool:
        """Whether a pass reaches the head."""
        return any(one.answers for one in self.passes)

    @property
    def whole(self) -> bool:
        """Whether a pass runs through all blocks and the final norm."""
        return any(one.whole for one in self.passes)

    def blocks(self, spec: ModelSpec) -> int:
        """The blocks of its deepest pass."""
        return max(one.blocks(spec) for one in self.passes)

    def tokens(self, rows: int, length: int, laid: bool = False) -> int:
        """Tokens of so many padded rows (pairs), in all passes; `laid`: of sequences that hold
        the rows of all sides."""
        return sum(rows * length * one.ways(laid) for one in self.passes)

    def least_flops(
        self,
        spec: ModelSpec,
        rows: int,
        length: int,
        adapter: int,
        answers: Mapping[str, int] | None = None,
        passes: str = "both",
        seen: int | None = None,
        vectors: int = 0,
        whole: bool = False,
    ) -> float:
        """What these rows cost at least; see `training_flops`.

        Args:
          answers: side -> its places that reach the head; None: all.
          seen: of rows end to end, twice the tokens that each sees on average; None: they are
            padded rows.
          vectors: of the adapter in front of each sequence.
        """
        total = 0.0
        for one in self.passes:
            blocks = one.blocks(spec)
            alone = one.model in FIXED  # the least that a start can be is the base
            beside = 0 if alone else adapter * blocks // spec.layers
            more = 0 if alone else vectors
            total += training_flops(
                spec,
                rows * (length + more) * one.ways(seen is not None),
                length + more if seen is None else seen + 2 * more,
                None if one.answers else blocks,
                beside,
                None if answers is None else sum(answers[side] for side in one.answers),
                passes if one.model == "trained" else "forward",
                whole,
            )
        return total


def build(
    decoder: Decoder,
    terms: Sequence[Term],
    *,
    weights: Weights = lora_weights,
    also: Mapping[str, Needs] | None = None,
    packed: bool = False,
    rule: str = "mean",
    number: int = 0,
    kept: tuple[Tap, ...] = (),
    inner: Inner = NO_STEPS,
    layer_mask: jax.Array | None = None,
) -> Phase:
    """The phase of these terms.

    Args:
      weights: where base and adapter are.
      also: needs that no term has, such as validation's.
      packed: several rows share a sequence.
      rule: as of `Phase`, and so are the others.

    Raises:
      UserError: a tap past the model, or of whole states in another form than raw.
    """
    passes = passes_of([*(term.objective.needs for term in terms), also or {}])
    for tap in (tap for one in passes for tap in one.taps):
        if tap.layer != FINAL:
            check_tap(decoder.spec, tap.layer)
        if tap.pool == TOKENS and tap.states != "raw":
            raise UserError(f"{tap}: whole states have no mean and deviation over sentences")
    # The adapter off: (base, no adapter).
    models: dict[str, Weights] = {
        "trained": weights,
        "stopped": lambda trained, frozen: jax.lax.stop_gradient(weights(trained, frozen)),
        "reference": lambda trained, frozen: (frozen.base, None),
        "start": lambda trained, frozen: (frozen.base, frozen.start),
    }

    def states(trained: Any, frozen: Frozen, batch: Any, key: Any) -> States:
        sides = batch.sides()
        seen: dict[str, dict[str, Any]] = {side: {"taps": {}, "reference": {}} for side in sides}
        head = None
        for one in passes:
            params, adapter = models[one.model](trained, frozen)
            dropout = key if one.model == "trained" else None
            chosen = {side: sides[side] for side in one.sides}
            laid = lay(chosen, batch, packed)
            found = walk(decoder, params, adapter, laid, one, frozen, dropout)
            for side, (taps, answers) in found.items():
                seen[side]["reference" if one.model == "reference" else "taps"] |= taps
                if answers is not None:
                    seen[side] |= {"answers": answers, "owners": laid.owners(side)}
            if one.answers and head is None:  # the trained pass is the first
                head = decoder.head(params)
        views = {side: View(sides[side].real, **found) for side, found in seen.items()}
        heads = trained.get(HEADS, {}) if isinstance(trained, Mapping) else {}
        return States(views, head, decoder.spec.logit_soft_cap, heads)

    return Phase(states, tuple(terms), passes, rule, number, kept, inner, layer_mask)


def passes_of(needs: Sequence[Mapping[str, Needs]]) -> tuple[Pass, ...]:
    """The passes that give all of this, in a fixed order: trained, stopped, reference, start."""
    union: dict[str, Needs] = {}
    for one in needs:
        for side, asked in one.items():
            union[side] = union.get(side, Needs()) + asked
    found: dict[str, dict[str, tuple[tuple[Tap, ...], bool]]] = {}
    for side, asked in union.items():
        own = "stopped" if asked.answers == "stopped" else "trained"
        given = asked.answers == own
        if asked.taps or given:
            found.setdefault(own, {})[side] = asked.taps, given
        for model, taps in (("reference", asked.reference), ("start", ())):
            given = asked.answers == model
            if taps or given:
                found.setdefault(model, {})[side] = taps, given
    return tuple(
        Pass(
            tuple(found[model]),
            tuple(dict.fromkeys(tap for taps, _ in found[model].values() for tap in taps)),
            tuple(side for side, (_, answers) in found[model].items() if answers),
            model,
        )
        for model in ("trained", "stopped", *FIXED)
        if model in found
    )


def phase_loss(
    phase: Phase, trained: Any, frozen: Any, batch: Any, key: Any, update: Any = 0
) -> tuple[jax.Array, dict[str, Loss]]:
    """Weighted sum of the terms' means on one micro-batch, and each term's Loss."""
    return terms_loss(phase, phase.states(trained, frozen, batch, key), batch, update)


def terms_loss(
    phase: Phase, states: States, batch: Any, update: Any = 0
) -> tuple[jax.Array, dict[str, Loss]]:
    """The same of states that are at hand; `update` is the number of updates before this one."""
    losses = {term.name: evaluated(term, states, batch) for term in phase.terms}
    means = (
        _weight(term, update) * losses[term.name].sum / jnp.maximum(losses[term.name].count, 1.0)
        for term in phase.terms
    )
    total = sum(means, start=jnp.zeros(()))
    return total, losses


def evaluated(term: Term, states: States, batch: Any) -> Loss:
    """The term's loss by the states that it asks for; one with a head of its own gets it.

    It gets a row of states and of answers for each row of the stream, whatever the layout, unless
    it adds up tokens.

    Raises:
      UserError: it reads rows, and the batch has several of them in one.
    """
    objective = term.objective
    own = {"head": states.heads[term.name]} if objective.head else {}
    seen = states.only(objective.needs)
    if objective.by_token:
        return objective.loss(seen, by_token(batch), **own)
    if mixed(batch):
        raise UserError(
            "batch.pack: segments puts several rows into a sequence, and the objective "
            f"{term.name} reads each of them; set batch.pack=auto"
        )
    return objective.loss(seen.by_rows(batch), batch, **own)


def _weight(term: Term, update: Any) -> Any:
    """The term's weight in this update; 0 in those that it leaves out."""
    if term.every == 1:
        return term.weight
    return jnp.where((update + 1) % term.every == 0, term.weight, 0.0)


def lost_rows(states: States) -> jax.Array:
    """[B] bool: rows whose states hold something that is not finite."""
    lost: list[jax.Array] = []
    for view in states.views.values():
        rows = view.real.shape[0]
        for x in (*view.taps.values(), *view.reference.values()):
            lost.append(jnp.any(~jnp.isfinite(x), axis=tuple(range(1, x.ndim))))
        if view.answers is None:
            continue
        each = jnp.any(~jnp.isfinite(view.answers), axis=-1)  # [B or W, A]
        if view.owners is None:
            lost.append(jnp.any(each, axis=-1))
        else:
            of = view.owners[:, :, None] == jnp.arange(rows // each.shape[0])
            lost.append(jnp.any(of & each[:, :, None], axis=1).reshape(-1))
    return jnp.any(jnp.stack(lost), axis=0)
