"""What a run computes, before any weight or row is read: its programs, and where its arrays are.

A design follows from the settings, the model's facts and a mesh. `setup.prepare` fills it with
weights and data; `jaxalign.plan` compiles it as it is, for machines that are not there.

    made = design(config, load_spec(config.model.path), adapter, make_mesh(), total=1000)
    made.phases, made.step                           # what the loop calls
    made.frozen, made.state                          # shapes, dtypes and shardings
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Wrapped

from jaxalign import compiler
from jaxalign.adapters import Adapter, parse
from jaxalign.errors import UserError
from jaxalign.hf.load import abstract_params
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import parameter_count
from jaxalign.objectives import Tap, resolve
from jaxalign.objectives.standards import Standards
from jaxalign.objectives.subspace import Subspace
from jaxalign.settings import Config
from jaxalign.sharding import replicated, row_ways, shard_tree
from jaxalign.train.flops import Work
from jaxalign.train.optim import make_optimiser
from jaxalign.train.phases import PHASES, active_phases, facts_of
from jaxalign.train.phases.build import Phase, Weights, full_weights, lora_weights
from jaxalign.train.rules import RULES
from jaxalign.train.schedule import learning_rate, turns, warmup_steps
from jaxalign.train.state import HEADS, Frozen, TrainState, without_heads
from jaxalign.train.step import TrainStep, make_eval_step, make_train_step


@dataclass
class Design:
    """The programs of a run and the arrays they take."""

    config: Config
    mesh: Mesh
    spec: ModelSpec
    adapter: Adapter | None
    decoder: Decoder
    phases: dict[str, Phase]
    optimiser: optax.GradientTransformation
    step: TrainStep
    held: Any  # dtype in which the weights of the base are kept
    evaluate: dict[str, Wrapped]  # phase -> the jitted evaluation of one batch
    frozen: Frozen
    state: TrainState
    shardings: TrainState  # of the state

    @property
    def active(self) -> tuple[str, ...]:
        """The phases that are on, in the order of their turns."""
        return tuple(self.phases)

    @property
    def trained_count(self) -> int:
        """Trained parameters."""
        heads = sum(leaf.size for leaf in jax.tree.leaves(self.heads))
        if self.adapter is None:
            return parameter_count(self.spec) + heads
        return self.adapter.count(self.spec) + heads

    @property
    def multiplied(self) -> int:
        """By how many trained numbers each token is multiplied; see `Adapter.multiplied`."""
        if self.adapter is None:
            return 0
        heads = self.trained_count - self.adapter.count(self.spec)
        return self.adapter.multiplied(self.spec) + heads

    @property
    def vectors(self) -> int:
        """Vectors of the adapter in front of each sequence."""
        return self.adapter.prompt_length if self.adapter else 0

    @property
    def heads(self) -> dict[str, Any]:
        """What terms train next to the adapter."""
        return self.state.trained.get(HEADS, {})

    @property
    def measured(self) -> dict[str, tuple[str, Subspace]]:
        """Options that were files, as in `lens.subspace`: the phase, and what is in them."""
        return {
            f"{term.name}.{option}": (name, one)
            for name, phase in self.phases.items()
            for term in phase.terms
            for option, one in term.objective.measured.items()
        }

    @property
    def drops(self) -> bool:
        """Whether training draws dropout masks."""
        return self.adapter is not None and self.adapter.dropout > 0

    def turns(self, update: int) -> dict[str, range]:
        """Which micro-batches of each stream make up an update."""
        return turns(self.config.align.every, update, self.config.batch.accumulate, self.active)

    def micro_batches(self, phase: str) -> int:
        """How many micro-batches of this phase an update takes, at most."""
        updates = range(len(self.active))  # then turns repeat
        return max(len(self.turns(update).get(phase, ())) for update in updates)

    def tokens(self, phase: str, rows: int, length: int, laid: bool = False) -> int:
        """Tokens of so many padded rows (pairs) of a phase, or of sequences of rows end to end."""
        return self.phases[phase].tokens(rows, length, laid)

    def least_flops(
        self,
        phase: str,
        rows: int,
        length: int,
        answers: Mapping[str, int] | None = None,
        passes: str = "both",
        seen: int | None = None,
    ) -> float:
        """What these rows cost at least; see `Phase.least_flops`."""
        built, beside, vectors = self.phases[phase], self.multiplied, self.vectors
        # A rule may run its rows several times; an evaluation runs them once.
        times = RULES[built.rule].cost(built.inner) if passes == "both" else 1.0
        whole = self.adapter is None
        return times * built.least_flops(
            self.spec, rows, length, beside, answers, passes, seen, vectors, whole
        )

    def work(self, phase: str, batch: Any, passes: str = "both") -> Work:
        """What a batch of this shape (stacked or not, arrays or their shapes) has to do."""
        flat, sides = batch.flat, batch.sides()
        *micro, rows, length = (flat or next(iter(sides.values()))).tokens.shape
        rows *= math.prod(micro)
        places = {name: side.answer_at for name, side in sides.items()}
        answers = {name: math.prod(at.shape) for name, at in places.items() if at is not None}
        # A text's own tokens see the shared ones and half of its own, of which there are C at most.
        seen = flat and 2 * flat.nodes.shape[-1] + flat.reach.shape[-1] // 2
        tokens = self.tokens(phase, rows, length, flat is not None)
        least = self.least_flops(phase, rows, length, answers, passes, seen)
        return Work(tokens, least)


def design(
    config: Config, spec: ModelSpec, adapter: Adapter | None, mesh: Mesh, total: int
) -> Design:
    """The design of a run of `total` updates; its arrays are `jax.ShapeDtypeStruct`s.

    Args:
      adapter: what is trained on the base; None under full fine-tuning.

    Raises:
      UserError: rows that the mesh does not divide, a tap past the model, an unknown objective.
    """
    check_fit(config, spec, mesh)
    full = adapter is None
    dtype = jnp.dtype(config.model.dtype)
    decoder = Decoder(spec, adapter, config.model.remat, config.model.attention, train_base=full)
    weights: Weights = full_weights(dtype) if full else lora_weights
    layer_mask = adapter.layer_mask(spec) if adapter else None
    phases = {}
    for name in active_phases(config):
        facts = facts_of(config, name)
        twice = RULES[facts.part(config).rule].twice
        runs = dataclasses.replace(decoder, attention="reference") if twice else decoder
        phases[name] = facts.build(config, runs, weights, layer_mask)
    optim = config.optim
    rate = learning_rate(
        optim.schedule,
        optim.learning_rate,
        total,
        warmup_steps(total, optim.warmup_steps, optim.warmup_ratio),
    )
    optimiser = make_optimiser(
        rate,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
        missing=optim.missing,
        layer_mask=layer_mask,
    )
    held = jnp.dtype(jnp.float32) if full else dtype
    base = abstract_params(spec, held, config.model.quantize)
    base = placed(base, shard_tree(mesh, base))
    trained = base
    if adapter is not None:
        trained = jax.eval_shape(partial(adapter.init, spec), jax.random.key(0), base)
    if heads := jax.eval_shape(partial(heads_of, phases, spec), jax.random.key(0)):
        trained = trained | {HEADS: heads}
    state = jax.eval_shape(partial(TrainState.create, optimiser=optimiser), trained)
    shardings = shard_tree(mesh, state)
    start = None
    if config.adapter.start and any(phase.starts for phase in phases.values()):
        start = placed(*(without_heads(tree) for tree in (state.trained, shardings.trained)))
    shapes_only = isinstance(mesh, AbstractMesh)  # to look at, not to compile
    asked = None if shapes_only else compiler.options(mesh.devices.flat[0])
    return Design(
        config=config,
        mesh=mesh,
        spec=spec,
        adapter=adapter,
        decoder=decoder,
        phases=phases,
        optimiser=optimiser,
        held=held,
        step=make_train_step(
            phases,
            optimiser,
            every=config.align.every,
            average=config.optim.average,
            combine=config.optim.combine,
            rate=rate,
            layer_mask=layer_mask,
            shardings=shardings,
            options=asked,
        ),
        evaluate={name: make_eval_step(phase, asked) for name, phase in phases.items()},
        frozen=Frozen(None if full else base, _standards(phases, spec, mesh), start),
        state=placed(state, shardings),
        shardings=shardings,
    )


def _standards(
    phases: Mapping[str, Phase], spec: ModelSpec, mesh: Mesh
) -> dict[Tap, Standards] | None:
    """Shapes of what taps in another form than raw need; `train.standards` measures the values."""
    vector = jax.ShapeDtypeStruct((spec.dim,), jnp.float32, sharding=replicated(mesh))
    taps = (tap for phase in phases.values() for tap in phase.formed)
    return {tap: Standards(vector, vector) for tap in taps} or None  # type: ignore[arg-type]


def heads_of(phases: Mapping[str, Phase], spec: ModelSpec, key: jax.Array) -> dict[str, Any]:
    """What terms train next to the adapter, as it begins: term -> its tree.

    Raises:
      UserError: two phases have a term of one name with a head, which would be one head.
    """
    heads = [
        (term.name, term.objective.head)
        for phase in phases.values()
        for term in phase.terms
        if term.objective.head
    ]
    names = [name for name, _ in heads]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"objectives: {twice!r} trains a head in both phases, which would be one head; give "
            "one function another name"
        )
    return {
        name: head(spec, jax.random.fold_in(key, number))
        for number, (name, head) in enumerate(heads)
    }


def placed(tree: Any, shardings: Any) -> Any:
    """The same shapes, each with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def adapter_of(config: Config, spec: ModelSpec) -> Adapter | None:
    """What the settings train on the base; None under full fine-tuning."""
    if config.trainable == "full":
        return None
    own, lora = dataclasses.asdict(config.adapter), dataclasses.asdict(config.lora)
    kind, variant = own.pop("kind"), lora.pop("variant")
    return parse(spec, variant, **lora) if kind == "lora" else parse(spec, kind, **own)


def check_fit(config: Config, spec: ModelSpec, mesh: Mesh) -> None:
    """Whether settings, model and mesh go together.

    Raises:
      UserError: rows that data x fsdp does not divide; a tap past the model.
    """
    active = active_phases(config)
    for name in set(PHASES) - set(active):  # a name that is wrong is wrong in a baseline, too
        for _, part in facts_of(config, name).objectives(config):
            resolve(part.objective)
    ways = row_ways(mesh)
    for facts in (facts_of(config, name) for name in active):
        shares, rows = facts.shares(config), facts.rows(config)
        if rows % (ways * shares):
            halves = f", {shares} equal parts on each" if shares > 1 else ""
            raise UserError(
                f"{facts.rows_key}: {rows} rows cannot be divided among {ways} devices (mesh.data "
                f"x mesh.fsdp{halves}); choose a multiple of {ways * shares}, or another mesh"
            )
        rule, kernel = facts.part(config).rule, config.model.attention
        if RULES[rule].twice and kernel not in ("auto", "reference"):
            raise UserError(
                f"model.attention: {facts.name}.rule={rule} differentiates twice, which the kernel "
                f"{kernel} does not allow; set model.attention=auto"
            )
        facts.check(config, spec, full=config.trainable == "full")
