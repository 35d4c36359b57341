"""One update: micro-batches of either phase, summed, clipped, applied.

A phase says how a batch becomes states (`task`: the whole model on task rows; `align`: the lower
blocks on both sides of sentence pairs) and which objectives read them. The batches that a step is
given decide which phases run, so the same code serves alternation by micro-batch, by step, joint
training and either objective alone.

    phases = {'task': task_phase(...), 'align': align_phase(...)}
    step = make_train_step(phases, optimiser, every='microbatch')
    state, metrics = step(state, frozen, {'task': [n, B, T] ..., 'align': ...}, key)

An update that is not finite is skipped on the device, without the host: parameters and moments stay
as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Wrapped

from jaxalign.data.batch import PairBatch, TaskBatch
from jaxalign.model.decoder import Decoder
from jaxalign.objectives.contrastive import pooling_weights
from jaxalign.objectives.standards import standardise
from jaxalign.objectives.states import Loss, PairStates, TaskStates
from jaxalign.sharding import Array, constrain
from jaxalign.train.apply import make_update
from jaxalign.train.optim import keep_layers
from jaxalign.train.schedule import PHASES
from jaxalign.train.state import Frozen, TrainState

Weights = Callable[[Any, Frozen], tuple[dict, dict | None]]  # -> (base, adapter)


# Of n micro-batches: weights [n], losses [n], and each term's (mean, count, logs), all [n].
Records = tuple[jax.Array, jax.Array, dict[str, Any]]


@dataclass(frozen=True)
class Term:
    """One objective of a phase."""

    name: str
    objective: Callable[..., Loss]
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """How a batch becomes states, and the terms that read them."""

    states: Callable[[Any, Any, Any, Any], Any]  # (trained, frozen, batch, dropout key)
    terms: tuple[Term, ...]


def lora_weights(trained: Any, frozen: Frozen) -> tuple[dict, dict | None]:
    """(base, adapter) where the adapter is trained."""
    return frozen.base, trained


def full_weights(dtype: Any) -> Weights:
    """(base, adapter) where everything is trained: float32 masters, used in `dtype`."""
    return lambda trained, frozen: (jax.tree.map(lambda w: w.astype(dtype), trained), None)


def task_phase(
    decoder: Decoder,
    terms: tuple[Term, ...],
    *,
    weights: Weights = lora_weights,
    packed: bool = False,
    taps: tuple[int, ...] = (),
) -> Phase:
    """Task rows through the whole model; `packed`: several rows share a sequence."""

    def states(trained: Any, frozen: Frozen, batch: TaskBatch, key: Any) -> TaskStates:
        params, lora = weights(trained, frozen)
        real = batch.segments != 0
        out = decoder.forward(
            params,
            lora,
            batch.tokens,
            segments=batch.segments if packed else None,
            positions=batch.positions if packed else None,
            taps=taps,
            pool_weights=pooling_weights(real, "mean")[None] if taps else None,
            dropout=key,
        )
        pooled = {tap: vectors[0] for tap, vectors in out.pooled.items()}
        assert out.hidden is not None  # the pass did not stop early
        cap = decoder.spec.logit_soft_cap
        return TaskStates(out.hidden, decoder.head(params), pooled, cap)

    return Phase(states, terms)


def align_phase(
    decoder: Decoder,
    terms: tuple[Term, ...],
    taps: tuple[int, ...],
    *,
    weights: Weights = lora_weights,
    pooling: str = "mean",
) -> Phase:
    """Both sides of sentence pairs through the blocks below the highest tap, and no further.

    Objectives see standardised states where `Frozen.standards` has the tapped layers'.
    """

    def states(trained: Any, frozen: Frozen, batch: PairBatch, key: Any) -> PairStates:
        params, lora = weights(trained, frozen)
        # One pass for both sides. They are interleaved, so that a device keeps its own pairs.
        tokens = constrain(_interleave(batch.source, batch.target), "B T")  # [2B, T]
        mask = constrain(_interleave(batch.source_mask, batch.target_mask), "B T")
        out = decoder.forward(
            params,
            lora,
            tokens,
            stop=max(taps),
            taps=taps,
            pool_weights=pooling_weights(mask, pooling)[None],
            dropout=key,
        )
        pooled = {tap: vectors[0] for tap, vectors in out.pooled.items()}  # [2B, D]
        if frozen.standards is not None:
            pooled = {tap: standardise(v, frozen.standards[tap]) for tap, v in pooled.items()}
        sides = {tap: v.reshape(-1, 2, v.shape[-1]) for tap, v in pooled.items()}
        return PairStates(
            {tap: side[:, 0] for tap, side in sides.items()},
            {tap: side[:, 1] for tap, side in sides.items()},
        )

    return Phase(states, terms)


def phase_loss(
    phase: Phase, trained: Any, frozen: Any, batch: Any, key: Any
) -> tuple[jax.Array, dict[str, Loss]]:
    """Weighted sum of the terms' means on one micro-batch, and each term's Loss."""
    states = phase.states(trained, frozen, batch, key)
    losses = {term.name: term.objective(states, batch) for term in phase.terms}
    means = (
        term.weight * losses[term.name].sum / jnp.maximum(losses[term.name].count, 1.0)
        for term in phase.terms
    )
    total = sum(means, start=jnp.zeros(()))
    return total, losses


def lost_rows(states: TaskStates | PairStates) -> jax.Array:
    """[B] bool: rows whose states hold something that is not finite."""
    if isinstance(states, TaskStates):
        leaves = [states.hidden]
    else:
        leaves = [*states.source.values(), *states.target.values()]
    each = [jnp.any(~jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in leaves]
    return jnp.any(jnp.stack(each), axis=0)


def phase_gradient(
    phase: Phase, trained: Any, frozen: Any, batches: Any, key: Any, average: str
) -> tuple[Any, dict[str, jax.Array]]:
    """The phase's mean gradient over stacked micro-batches [n, B, ...], and what to log.

    Args:
      average: `tokens`: a micro-batch weighs as many answer tokens (pairs) as it has, so the
        result does not depend on how rows fell into micro-batches; `microbatch`: all weigh the
        same, a mean of means (what the paper's code does).
    """
    zeros = jax.tree.map(jnp.zeros_like, trained)
    return mean_gradient(*add_gradients(phase, trained, frozen, batches, key, average, zeros))


def add_gradients(
    phase: Phase,
    trained: Any,
    frozen: Any,
    batches: Any,
    key: Any,
    average: str,
    total: Any,
    first: Any = 0,
) -> tuple[Any, Records]:
    """`total` and the weighted gradients of stacked micro-batches [n, B, ...], one after the other.

    Args:
      average: as of `phase_gradient`.
      total: sum of the micro-batches before these; like `trained`.
      first: the number of the first micro-batch in its update, which dropout's masks depend on.
    """

    def weighted(trained: Any, batch: Any, key: Any) -> Any:
        loss, terms = phase_loss(phase, trained, frozen, batch, key)
        count = terms[phase.terms[0].name].count
        weight = jnp.minimum(count, 1.0) if average == "microbatch" else count
        return weight * loss, (weight, loss, terms)

    def body(total: Any, item: Any) -> Any:
        batch, index = item
        micro_key = None if key is None else jax.random.fold_in(key, index)
        gradient, (weight, loss, terms) = jax.grad(weighted, has_aux=True)(
            trained, batch, micro_key
        )
        means = {
            name: (term.sum / jnp.maximum(term.count, 1.0), term.count, term.logs)
            for name, term in terms.items()
        }
        return jax.tree.map(jnp.add, total, gradient), (weight, loss, means)

    number = jax.tree.leaves(batches)[0].shape[0]
    return jax.lax.scan(body, total, (batches, first + jnp.arange(number)))


def mean_gradient(total: Any, records: Records) -> tuple[Any, dict[str, jax.Array]]:
    """The mean gradient and what to log, from a sum and what was recorded of its micro-batches."""
    weights, losses, means = records
    whole = jnp.maximum(jnp.sum(weights), 1.0)
    metrics = {"micro_losses": losses, "loss": jnp.sum(weights * losses) / whole}
    for name, (mean, count, logs) in means.items():
        metrics[name] = jnp.sum(weights * mean) / whole
        metrics[f"{name}/count"] = jnp.sum(count)
        for key, values in logs.items():
            metrics[f"{name}/{key}"] = jnp.sum(values) / jnp.maximum(jnp.sum(count), 1.0)
    return jax.tree.map(lambda g: g / whole, total), metrics


@dataclass(frozen=True)
class TrainStep:
    """One update, made of a few compiled programs; see `make_train_step`."""

    gradient: Wrapped  # (phase, state, frozen, batches, key) -> (gradient, metrics)
    apply: Wrapped  # (state, gradients, losses, ((phase, micro-batches), ...)) -> (state, metrics)
    # For micro-batches of different lengths, one after the other:
    zeros: Wrapped  # (trained) -> sum of none
    add: Wrapped  # (phase, state, frozen, batches, key, sum, first) -> (sum, records)
    mean: Wrapped  # (sum, [records, ...]) -> (gradient, metrics)

    def __call__(
        self,
        state: TrainState,
        frozen: Any,
        batches: dict[str, Any],
        key: jax.Array | None,
        phase: Callable[..., Any] | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after the update, and what to log; the state before it is donated.

        Args:
          batches: phase -> its micro-batches, as `phase` takes them.
          phase: takes the place of the method, to watch it.
        """
        gradients: dict[str, Any] = {}
        metrics: dict[str, jax.Array] = {}
        for name in sorted(batches, key=PHASES.index):
            gradients[name], logs = (phase or self.phase)(name, state, frozen, batches[name], key)
            metrics |= {f"{name}/{what}": value for what, value in logs.items()}
        sizes = tuple((name, metrics[f"{name}/micro_losses"].shape[0]) for name in gradients)
        losses = {name: metrics[f"{name}/loss"] for name in gradients}
        state, more = self.apply(state, gradients, losses, sizes)
        return state, metrics | more

    def phase(
        self, name: str, state: TrainState, frozen: Any, batches: Any, key: jax.Array | None
    ) -> tuple[Any, dict[str, jax.Array]]:
        """A phase's mean gradient and what to log.

        Args:
          batches: micro-batches of one length, stacked [n, B, ...], or a list of such stacks, each
            padded to its own: one program for each length, whatever their order and number.
        """
        if not isinstance(batches, list):
            return self.gradient(name, state, frozen, batches, key)
        total, records, first = self.zeros(state.trained), [], 0
        for stack in batches:
            total, record = self.add(name, state, frozen, stack, key, total, np.int32(first))
            records.append(record)
            first += jax.tree.leaves(stack)[0].shape[0]
        return self.mean(total, records)

    def programs(self) -> int:
        """How many programs of the phases were compiled up to now."""
        return sum(one._cache_size() for one in (self.gradient, self.zeros, self.add, self.mean))  # type: ignore[attr-defined]


def make_train_step(
    phases: dict[str, Phase],
    optimiser: optax.GradientTransformation,
    *,
    every: str = "microbatch",
    average: str = "tokens",
    rate: optax.Schedule | None = None,
    layer_mask: jax.Array | None = None,
    shardings: Any = None,
    options: dict[str, str] | None = None,
) -> TrainStep:
    """The update: (state, frozen, batches, key) -> (state, metrics); the state is donated.

    `batches` maps a phase to its micro-batches (`TrainStep.phase`); its keys and shapes are static.
    Each phase's gradient is one jitted function and the optimiser another, so that a run compiles
    as many programs as the phases have bucket lengths, not as many as these have combinations.

    Where the gradient, a loss or what would become of the parameters is not finite, the update is
    skipped: parameters and moments stay, `skipped` is 1; the state's step and the schedule go on.

    Args:
      layer_mask: [L], 1 where a block's adapter is trained; the others' gradients count nowhere.
      shardings: of the state, in and out: left to the compiler, the state could come out split
        otherwise than it went in, and the second step would compile again.
      options: for the compiler (`jaxalign.compiler`).
    """
    whole = None if shardings is None else shardings.step  # of numbers: the same everywhere
    of_sum = None if shardings is None else (shardings.trained, whole)
    of_state = None if shardings is None else (shardings, whole)

    compiled = partial(jax.jit, compiler_options=options)

    def of_phase(key: Any, state: TrainState, name: str) -> Any:
        if key is None:
            return None
        return jax.random.fold_in(jax.random.fold_in(key, state.step), PHASES.index(name))

    def of_layers(gradient: Any, metrics: dict) -> Any:
        return gradient if layer_mask is None else keep_layers(gradient, layer_mask), metrics

    @partial(compiled, static_argnums=0, out_shardings=of_sum)
    def gradient_step(name: str, state: TrainState, frozen: Any, batches: Any, key: Any) -> Any:
        key, phase = of_phase(key, state, name), phases[name]
        return of_layers(*phase_gradient(phase, state.trained, frozen, batches, key, average))

    @partial(compiled, out_shardings=None if shardings is None else shardings.trained)
    def zeros_step(trained: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, trained)

    @partial(compiled, static_argnums=0, donate_argnums=5, out_shardings=of_sum)
    def add_step(
        name: str, state: TrainState, frozen: Any, batches: Any, key: Any, total: Any, first: Any
    ) -> Any:
        key, phase = of_phase(key, state, name), phases[name]
        return add_gradients(phase, state.trained, frozen, batches, key, average, total, first)

    @partial(compiled, donate_argnums=0, out_shardings=of_sum)
    def mean_step(total: Any, records: list[Records]) -> Any:
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *records)
        return of_layers(*mean_gradient(total, joined))

    apply_step = compiled(
        make_update(optimiser, every, rate),
        static_argnums=3,
        donate_argnums=0,
        out_shardings=of_state,
    )

    return TrainStep(gradient_step, apply_step, zeros_step, add_step, mean_step)


def make_eval_step(phase: Phase, options: dict[str, str] | None = None) -> Wrapped:
    """The jitted evaluation of one batch: (trained, frozen, batch) -> (losses, states).

    Dropout is off. States are the pooled vectors of either side for `align`, empty for `task`.
    """

    @partial(jax.jit, compiler_options=options)
    def eval_step(trained: Any, frozen: Any, batch: Any) -> Any:
        states = phase.states(trained, frozen, batch, None)
        losses = {term.name: term.objective(states, batch) for term in phase.terms}
        return losses, states if isinstance(states, PairStates) else None

    return eval_step


def _interleave(a: Array, b: Array) -> jax.Array:
    return jnp.stack([a, b], axis=1).reshape(-1, a.shape[-1])  # [B, T] twice -> [2B, T]
