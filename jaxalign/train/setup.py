"""A configuration becomes a run: everything the loop needs, built and checked before any step.

What can be refused is refused here, cheapest first (settings, then data, then weights), so that a
mistake costs seconds and not an hour.

    run = prepare(load('configs/demo.yaml').config)
    run.total, run.phases, run.step                  # what `loop.train` walks over
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.adapters import lora as lora_adapter
from jaxalign.adapters.lora import Lora
from jaxalign.data.chat import load_tokenizer
from jaxalign.data.loader import Stream, pair_stream, task_stream
from jaxalign.errors import UserError
from jaxalign.hf.load import abstract_params, fingerprint, load_params, load_spec
from jaxalign.hf.peft import load_peft
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec, check_tap, parameter_count
from jaxalign.objectives import resolve
from jaxalign.settings import AUTO, AlignConfig, Config, TaskConfig
from jaxalign.sharding import make_mesh, shard_tree
from jaxalign.train.optim import make_optimiser
from jaxalign.train.schedule import PHASES, learning_rate, turns, warmup_steps
from jaxalign.train.state import TrainState
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

STREAMS: dict[str, Callable[..., Stream]] = {"task": task_stream, "align": pair_stream}


@dataclass
class Run:
    """One prepared run."""

    config: Config
    mesh: Mesh
    spec: ModelSpec
    adapter: Lora | None
    decoder: Decoder
    tokenizer: Any
    frozen: Any  # the base, sharded; None under full fine-tuning
    state: TrainState
    shardings: Any  # of the state
    phases: dict[str, Phase]
    train: dict[str, Stream]
    valid: dict[str, Stream]
    step: TrainStep
    evaluate: dict[str, Callable]  # phase -> the jitted evaluation of one batch
    total: int  # updates
    base: str  # fingerprint of the base

    @property
    def active(self) -> tuple[str, ...]:
        """The phases that are on, task first."""
        return tuple(self.phases)

    def turns(self, update: int) -> dict[str, range]:
        """Which micro-batches of each stream make up an update."""
        return turns(self.config.align.every, update, self.config.batch.accumulate, self.active)

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored onto."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(lambda state: state, self.state),
            self.shardings,
        )

    @property
    def trained_count(self) -> int:
        """Trained parameters."""
        if self.adapter is None:
            return parameter_count(self.spec)
        return lora_adapter.count(self.adapter, self.spec)


def prepare(config: Config) -> Run:
    """Reads data and model and builds the jitted step.

    Raises:
      UserError: anything in the configuration, the data or the checkpoint that cannot work.
    """
    parts: dict[str, TaskConfig | AlignConfig] = {"task": config.task, "align": config.align}
    active = tuple(name for name in PHASES if parts[name].weight > 0)
    if not active:
        raise UserError("task.weight and align.weight are both 0: nothing would be trained")
    for name in active:
        if not parts[name].train:
            raise UserError(
                f"{name}.train is empty; name its files, or set {name}.weight=0 to train without it"
            )
    if not config.model.path:
        raise UserError("model.path is empty; name a folder in Hugging Face layout or a hub model")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _check_rows(config, mesh, active)
    spec = load_spec(config.model.path, config.model.revision)
    if "align" in active:
        if config.align.layer == AUTO:
            raise UserError(
                "align.layer=auto is for the command line; from Python call "
                "jaxalign.probe.auto.choose(config) first and set align.layer to its layer"
            )
        check_tap(spec, config.align.layer)
    adapter, start = _adapter(config, spec)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    if len(tokenizer) > spec.vocab:
        raise UserError(
            f"{config.model.path}: the tokenizer knows {len(tokenizer)} tokens, the model only "
            f"{spec.vocab}; they do not belong together"
        )
    train = {name: STREAMS[name](config, tokenizer) for name in active}
    valid = {
        name: STREAMS[name](config, tokenizer, "valid") for name in active if parts[name].valid
    }
    total = config.train.steps or _steps_of_epochs(config, train)

    full = config.trainable == "full"
    dtype = jnp.dtype(config.model.dtype)
    decoder = Decoder(spec, adapter, config.model.remat, config.model.attention, train_base=full)
    weights: Weights = full_weights(dtype) if full else lora_weights
    phases = _phases(config, decoder, weights, active)
    rate = learning_rate(
        config.optim.schedule,
        config.optim.learning_rate,
        total,
        warmup_steps(total, config.optim.warmup_steps, config.optim.warmup_ratio),
    )
    optimiser = make_optimiser(
        rate,
        beta1=config.optim.beta1,
        beta2=config.optim.beta2,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
        missing=config.optim.missing,
        layer_mask=lora_adapter.layer_mask(adapter, spec) if adapter else None,
    )
    held = jnp.float32 if full else dtype
    params = load_params(
        config.model.path,
        spec,
        held,
        shard_tree(mesh, abstract_params(spec, held)),
        config.model.revision,
        config.model.quantize,
    )

    def create(trained: Any) -> TrainState:
        return TrainState.create(trained, optimiser)

    if adapter is None:
        trained, frozen = params, None
    else:
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        fresh = jax.jit(partial(lora_adapter.init, adapter, spec))
        trained = start or fresh(key, params if adapter.dora else None)
        frozen = params
    shardings = shard_tree(mesh, jax.eval_shape(create, trained))
    trained = jax.device_put(trained, shardings.trained)
    state = jax.jit(create, out_shardings=shardings)(trained)
    return Run(
        config=config,
        mesh=mesh,
        spec=spec,
        adapter=adapter,
        decoder=decoder,
        tokenizer=tokenizer,
        frozen=frozen,
        state=state,
        shardings=shardings,
        phases=phases,
        train=train,
        valid=valid,
        step=make_train_step(
            phases,
            optimiser,
            every=config.align.every,
            average=config.optim.average,
            rate=rate,
            shardings=shardings,
        ),
        evaluate={name: make_eval_step(phases[name]) for name in valid},
        total=total,
        base=fingerprint(config.model.path, config.model.revision),
    )


def _check_rows(config: Config, mesh: Mesh, active: tuple[str, ...]) -> None:
    """A micro-batch is split over data and fsdp."""
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


def _adapter(config: Config, spec: ModelSpec) -> tuple[Lora | None, Any]:
    """What is trained beside the base, and the factors to start from, if any."""
    if config.trainable == "full":
        return None, None
    wanted = Lora.parse(
        spec,
        r=config.lora.r,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        targets=config.lora.targets,
        layers=config.lora.layers,
        scaling=config.lora.scaling,
        variant=config.lora.variant,
        ranks=config.lora.ranks,
        alphas=config.lora.alphas,
    )
    if not config.lora.start:
        return wanted, None
    factors, found = load_peft(config.lora.start, spec)
    if not wanted.parts:
        # Words cannot tell every pattern that PEFT can; without any, the adapter's own go on.
        wanted = dataclasses.replace(wanted, parts=found.parts)
    for field in ("r", "alpha", "targets", "layers", "rank_stabilised", "dora", "parts"):
        if getattr(found, field) != getattr(wanted, field):
            raise UserError(
                f"lora.start: the adapter in {config.lora.start} has {field} "
                f"{getattr(found, field)}, the configuration {getattr(wanted, field)}; "
                "set the lora settings to the adapter's"
            )
    return wanted, factors


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

    def term(name: str, weight: float, options: dict) -> Term:
        chosen = own.get(name, {}) | options
        return Term(name.rpartition(":")[2], partial(resolve(name), **chosen), weight)

    def terms(phase: str, part: Any) -> tuple[Term, ...]:
        extra = [o for o in config.objectives if o.phase == phase]
        found = [term(o.objective, o.weight, o.options) for o in (part, *extra)]
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


def _steps_of_epochs(config: Config, train: dict[str, Stream]) -> int:
    """Updates of `train.epochs` passes over the leading stream (the task's, where it is on)."""
    leading = next(iter(train))
    every, accumulate = config.align.every, config.batch.accumulate
    alternating = len(train) == 2 and every != "joint"
    per_update = accumulate / 2 if alternating else accumulate
    return max(1, math.ceil(config.train.epochs * train[leading].epoch_batches / per_update))
