"""One update: micro-batches of each phase become a gradient, gradients one, and that a change.

A phase says how a batch becomes states and which objectives read them (`phases.build`), a rule how
micro-batches become its gradient (`rules`), a way to combine how the phases' gradients become one
(`combine`). The batches that a step is given decide which phases run, so the same code serves
alternation by micro-batch, by step, joint training and any phase alone.

    phases = {'task': build(decoder, ...), 'align': build(decoder, ...)}
    step = make_train_step(phases, optimiser, every='microbatch')
    state, metrics = step(state, frozen, {'task': [n, B, T] ..., 'align': ...}, key)

An update that is not finite is skipped on the device, without the host: parameters and moments stay
as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Wrapped

from jaxalign.train.apply import make_update
from jaxalign.train.combine import cosine
from jaxalign.train.optim import keep_layers
from jaxalign.train.phases.build import Phase, evaluated
from jaxalign.train.rules import RULES, Records, add_gradients, mean_gradient
from jaxalign.train.state import TrainState


@dataclass(frozen=True)
class TrainStep:
    """One update, made of a few compiled programs; see `make_train_step`."""

    gradient: Wrapped  # (phase, state, frozen, batches, key) -> (gradient, metrics)
    apply: Wrapped  # (state, gradients, losses, ((phase, micro-batches), ...)) -> (state, metrics)
    # For micro-batches of different lengths, one after the other:
    zeros: Wrapped  # (trained) -> sum of none
    add: Wrapped  # (phase, state, frozen, batches, key, sum, first) -> (sum, records)
    mean: Wrapped  # (sum, [records, ...]) -> (gradient, metrics)
    numbers: dict[str, int]  # phase -> its place among all phases
    # (phase, state, frozen, batches, key) -> what a rule's gradient is compared with
    plain: Wrapped
    compared: frozenset[str]  # phases whose rule has such a gradient

    def order(self, names: Iterable[str]) -> list[str]:
        """These phases, first things first."""
        return sorted(names, key=self.numbers.__getitem__)

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
        for name in self.order(batches):
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

    def look(
        self, name: str, state: TrainState, frozen: Any, batches: Any, gradient: Any
    ) -> dict[str, jax.Array]:
        """The cosine of a phase's gradient to the plain one, where its rule has a plain one.

        Args:
          batches: one micro-batch, as `phase` takes it.
        """
        if name not in self.compared:
            return {}
        stack = batches[0] if isinstance(batches, list) else batches
        plain, _ = self.plain(name, state, frozen, stack, None)
        return {f"{name}/plain_cosine": cosine(gradient, plain)}

    def programs(self) -> int:
        """How many programs of the phases were compiled up to now."""
        return sum(one._cache_size() for one in (self.gradient, self.zeros, self.add, self.mean))  # type: ignore[attr-defined]


def make_train_step(
    phases: dict[str, Phase],
    optimiser: optax.GradientTransformation,
    *,
    every: str = "microbatch",
    average: str = "tokens",
    combine: str = "weighted",
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
      every: turns of the phases; average: weights of micro-batches (`rules.rule.mean`).
      combine: a name of `combine.COMBINE`.
      layer_mask: [L], 1 where a block's adapter is trained; the others' gradients count nowhere.
      shardings: of the state, in and out: left to the compiler, the state could come out split
        differently from how it went in, and the second step would compile again.
      options: for the compiler (`jaxalign.compiler`).
    """
    whole = None if shardings is None else shardings.step  # of numbers: the same everywhere
    of_sum = None if shardings is None else (shardings.trained, whole)
    of_state = None if shardings is None else (shardings, whole)

    compiled = partial(jax.jit, compiler_options=options)

    def of_phase(name: str, key: Any, state: TrainState) -> Any:
        """The phase, the key of its dropout, and how many of its updates were before this one."""
        phase = phases[name]
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, state.step), phase.number)
        turn = state.step // len(phases) if every == "step" else state.step
        return phase, key, turn

    def of_layers(gradient: Any, metrics: dict) -> Any:
        return gradient if layer_mask is None else keep_layers(gradient, layer_mask), metrics

    @partial(compiled, static_argnums=0, out_shardings=of_sum)
    def gradient_step(name: str, state: TrainState, frozen: Any, batches: Any, key: Any) -> Any:
        phase, key, turn = of_phase(name, key, state)
        rule = RULES[phase.rule].gradient
        return of_layers(*rule(phase, state.trained, frozen, batches, key, average, turn))

    @partial(compiled, static_argnums=0, out_shardings=of_sum)
    def plain_step(name: str, state: TrainState, frozen: Any, batches: Any, key: Any) -> Any:
        phase, key, turn = of_phase(name, key, state)
        rule = RULES[phase.rule].plain
        assert rule is not None  # `compared` says so
        return of_layers(*rule(phase, state.trained, frozen, batches, key, average, turn))

    @partial(compiled, out_shardings=None if shardings is None else shardings.trained)
    def zeros_step(trained: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, trained)

    @partial(compiled, static_argnums=0, donate_argnums=5, out_shardings=of_sum)
    def add_step(
        name: str, state: TrainState, frozen: Any, batches: Any, key: Any, total: Any, first: Any
    ) -> Any:
        phase, key, turn = of_phase(name, key, state)
        given = (phase, state.trained, frozen, batches, key, average, turn)
        one = RULES[phase.rule].one
        assert one is not None  # else micro-batches come together
        return add_gradients(one, *given, total, first)

    @partial(compiled, donate_argnums=0, out_shardings=of_sum)
    def mean_step(total: Any, records: list[Records]) -> Any:
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *records)
        return of_layers(*mean_gradient(total, joined))

    apply_step = compiled(
        make_update(optimiser, every, rate, combine),
        static_argnums=3,
        donate_argnums=0,
        out_shardings=of_state,
    )

    numbers = {name: phase.number for name, phase in phases.items()}
    compared = frozenset(name for name, phase in phases.items() if RULES[phase.rule].plain)
    return TrainStep(
        gradient_step, apply_step, zeros_step, add_step, mean_step, numbers, plain_step, compared
    )


def make_eval_step(phase: Phase, options: dict[str, str] | None = None) -> Wrapped:
    """The jitted evaluation of one batch: (trained, frozen, batch) -> (losses, kept).

    Dropout is off. `kept` is side -> tap -> pooled states of the phase's kept taps.
    """

    @partial(jax.jit, compiler_options=options)
    def eval_step(trained: Any, frozen: Any, batch: Any) -> Any:
        states = phase.states(trained, frozen, batch, None)
        losses = {term.name: evaluated(term, states, batch) for term in phase.terms}
        kept = {
            side: {tap: view.taps[tap] for tap in phase.kept if tap in view.taps}
            for side, view in states.views.items()
        }
        return losses, kept

    return eval_step
