"""What a run computes, before any weight or row is read: its programs, and where arrays lie.

A design follows from the settings, the model's facts and a mesh. `setup.prepare` fills it with
weights and data; `jaxalign.plan` compiles it as it is, for machines that are not there.

    plan = design(config, load_spec(config.model.path), adapter, make_mesh(), total=1000)
    plan.phases, plan.step                           # what the loop calls
    plan.frozen, plan.state                          # shapes, dtypes and shardings
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Wrapped

from jaxalign import compiler
from jaxalign.adapters import lora as lora_adapter
from jaxalign.adapters.lora import Lora
from jaxalign.errors import UserError
from jaxalign.hf.load import abstract_params
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec, check_tap, parameter_count
from jaxalign.objectives import with_options
from jaxalign.objectives.standards import Standards
from jaxalign.settings import AUTO, Config
from jaxalign.sharding import replicated, shard_tree
from jaxalign.train.flops import training_flops
from jaxalign.train.optim import make_optimiser
from jaxalign.train.schedule import PHASES, learning_rate, turns, warmup_steps
from jaxalign.train.state import Frozen, TrainState
from jaxalign.train.step import (
    Phase,
    Term,
    TrainStep,
    Weights,
    align_phase,
    full_weights,
    lora_weights,
    make_eval_step,
    make_train_step,
    task_phase,
)


@dataclass
class Design:
    """The programs of a run and the arrays they take."""

    config: Config
    mesh: Mesh
    spec: ModelSpec
    adapter: Lora | None
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
        """The phases that are on, task first."""
        return tuple(self.phases)

    @property
    def trained_count(self) -> int:
        """Trained parameters."""
        if self.adapter is None:
            return parameter_count(self.spec)
        return lora_adapter.count(self.adapter, self.spec)

    @property
    def drops(self) -> bool:
        """Whether training draws dropout masks."""
        return self.adapter is not None and self.adapter.dropout > 0

    def turns(self, update: int) -> dict[str, range]:
        """Which micro-batches of each stream make up an update."""
        return turns(self.config.align.every, update, self.config.batch.accumulate, self.active)

    def micro_batches(self, phase: str) -> int:
        """How many micro-batches of this phase an update takes, at most."""
        return max(len(self.turns(update).get(phase, ())) for update in (0, 1))  # turns repeat

    def tokens(self, phase: str, rows: int, length: int) -> int:
        """Tokens of so many padded task rows, or of both sides of so many pairs."""
        return rows * length * (1 if phase == "task" else 2)

    def least_flops(
        self, phase: str, rows: int, length: int, answers: int | None = None, passes: str = "both"
    ) -> float:
        """What these rows cost at least; see `training_flops`."""
        blocks = None if phase == "task" else self.config.align.layer
        adapter = self.trained_count if self.adapter else 0
        if blocks is not None:
            adapter = adapter * blocks // self.spec.layers
        tokens = self.tokens(phase, rows, length)
        return training_flops(self.spec, tokens, length, blocks, adapter, answers, passes)


def active_phases(config: Config) -> tuple[str, ...]:
    """The phases that are on, task first.

    Raises:
      UserError: none is.
    """
    active = tuple(name for name in PHASES if getattr(config, name).weight > 0)
    if not active:
        raise UserError("task.weight and align.weight are both 0: nothing would be trained")
    return active


def design(config: Config, spec: ModelSpec, adapter: Lora | None, mesh: Mesh, total: int) -> Design:
    """The design of a run of `total` updates; its arrays are `jax.ShapeDtypeStruct`s.

    Args:
      adapter: what is trained beside the base; None under full fine-tuning.

    Raises:
      UserError: rows that the mesh does not divide, a tap past the model, an unknown objective.
    """
    check_fit(config, spec, mesh)
    active = active_phases(config)
    full = adapter is None
    dtype = jnp.dtype(config.model.dtype)
    decoder = Decoder(spec, adapter, config.model.remat, config.model.attention, train_base=full)
    weights: Weights = full_weights(dtype) if full else lora_weights
    phases = _phases(config, decoder, weights, active)
    optim = config.optim
    layer_mask = lora_adapter.layer_mask(adapter, spec) if adapter else None
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
        init = partial(lora_adapter.init, adapter, spec)
        trained = jax.eval_shape(init, jax.random.key(0), base if adapter.dora else None)
    state = jax.eval_shape(partial(TrainState.create, optimiser=optimiser), trained)
    shardings = shard_tree(mesh, state)
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
            rate=rate,
            layer_mask=layer_mask,
            shardings=shardings,
            options=asked,
        ),
        evaluate={name: make_eval_step(phase, asked) for name, phase in phases.items()},
        frozen=Frozen(None if full else base, _standards(config, spec, mesh)),
        state=placed(state, shardings),
        shardings=shardings,
    )


def _standards(config: Config, spec: ModelSpec, mesh: Mesh) -> dict[int, Standards] | None:
    """Shapes of what `align.states: standardised` needs; `train.standards` measures the values."""
    if config.align.states == "raw" or "align" not in active_phases(config):
        return None
    vector = jax.ShapeDtypeStruct((spec.dim,), jnp.float32, sharding=replicated(mesh))
    return {config.align.layer: Standards(vector, vector)}  # type: ignore[arg-type]


def placed(tree: Any, shardings: Any) -> Any:
    """The same shapes, each with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def adapter_of(config: Config, spec: ModelSpec) -> Lora | None:
    """What the settings train beside the base; None under full fine-tuning."""
    if config.trainable == "full":
        return None
    lora = config.lora
    return Lora.parse(
        spec,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        layers=lora.layers,
        scaling=lora.scaling,
        variant=lora.variant,
        ranks=lora.ranks,
        alphas=lora.alphas,
    )


def check_fit(config: Config, spec: ModelSpec, mesh: Mesh) -> None:
    """Whether settings, model and mesh go together.

    Raises:
      UserError: rows that data x fsdp does not divide; a tap past the model.
    """
    active = active_phases(config)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, key, rows in (
        ("task", "batch.size", config.batch.size),
        ("align", "batch.pairs", config.batch.pairs),
    ):
        if name in active and rows % ways:
            raise UserError(
                f"{key}: {rows} rows cannot be divided among {ways} devices (mesh.data x "
                f"mesh.fsdp); choose a multiple of {ways}, or another mesh"
            )
    if "align" in active:
        if config.align.layer == AUTO:
            raise UserError(
                "align.layer=auto needs the weights of the base; call jaxalign.train(config), "
                "which measures its layers, or name one"
            )
        check_tap(spec, config.align.layer)


def _phases(
    config: Config, decoder: Decoder, weights: Weights, active: tuple[str, ...]
) -> dict[str, Phase]:
    align = config.align
    taps = (align.layer,)
    # The built-in contrastive loss reads the alignment settings; any other takes its options.
    own = {
        "contrastive": {
            "layer": align.layer,
            "temperature": align.temperature,
            "direction": align.direction,
            "negatives": align.negatives,
            "group": align.group,
            "detach": align.detach,
        }
    }

    def term(key: str, part: Any) -> Term:
        chosen = own.get(part.objective, {}) | part.options
        function = with_options(part.objective, chosen, f"{key}.options")
        return Term(part.objective.rpartition(":")[2], function, part.weight)

    def terms(phase: str, part: Any) -> tuple[Term, ...]:
        extra = [(f"objectives[{i}]", o) for i, o in enumerate(config.objectives)]
        found = [term(phase, part), *(term(key, o) for key, o in extra if o.phase == phase)]
        names = [one.name for one in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(
                f"objectives: two terms of the {phase} phase are called {twice!r}, so their logs "
                "could not be told apart; give one function another name"
            )
        return tuple(found)

    packed = config.batch.pack == "segments"
    build = {
        "task": lambda: task_phase(
            decoder,
            terms("task", config.task),
            weights=weights,
            packed=packed,
            # Pooled states of the aligned layer cost little and serve objectives of one's own.
            taps=taps if any(o.phase == "task" for o in config.objectives) else (),
        ),
        "align": lambda: align_phase(
            decoder, terms("align", align), taps, weights=weights, pooling=align.pooling
        ),
    }
    return {name: build[name]() for name in active}
