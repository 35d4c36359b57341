"""The two programs of generation, as a plan compiles them: prompts, and the loop over tokens.

prompt(plan).lower().compile()                   # prompts of the longest length
prompt(plan, rows["prompt"]).lower().compile()   # the run's own, behind what all of them share
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxalign.generate import shapes
from jaxalign.generate.decoding import Decoding
from jaxalign.generate.loop import Model, advance, share, start
from jaxalign.plan.attends import of_prompts
from jaxalign.plan.job import Job
from jaxalign.plan.rows import Prompts
from jaxalign.sharding import activation_spec, replicated
from jaxalign.train.design import Design
from jaxalign.train.flops import training_flops
from jaxalign.train.phases.task import TASK


@dataclass(frozen=True)
class _Generation:
    """What the two programs of generation are called with."""

    model: Model
    tokens: Any
    numbers: dict[str, Any]
    rule: Decoding
    new: int
    slots: int
    ahead: int  # tokens that all prompts share, of `model.shared`

    @classmethod
    def of(cls, plan: Design, prompts: Prompts | None) -> _Generation:
        generate = plan.config.generate
        whole = replicated(plan.mesh)
        give = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)  # noqa: E731
        rule = Decoding(generate.max_new_tokens, generate.method, beams=generate.beams).rule
        if prompts:
            rows, ahead, width = prompts.size, prompts.ahead, prompts.width
        else:
            longest = TASK.longest(plan.config)  # answers belong to task rows
            rows, ahead = generate.batch, 0
            width = shapes.padded(max(longest - generate.max_new_tokens, 1))
        numbers = {
            "lengths": give(jnp.int32, rows),
            "numbers": give(jnp.uint32, rows),
            "stops": give(jnp.int32, len(plan.spec.eos_ids) or 1),
            "seed": give(jnp.uint32),
            "few": give(jnp.int32),
        }
        base = plan.state.trained if plan.frozen.base is None else plan.frozen.base
        lora = None if plan.frozen.base is None else plan.state.trained
        model = Model(base, lora)
        if ahead:
            first = give(jnp.int32, 1, shapes.padded(ahead))
            shared = jax.eval_shape(lambda *given: share(*given, plan.decoder), model, first, 0)
            place = partial(_left, plan.mesh)
            model = dataclasses.replace(model, shared=jax.tree.map(place, shared))
        return cls(
            model=model,
            tokens=give(jnp.int32, rows, width),
            numbers=numbers,
            rule=rule,
            new=generate.max_new_tokens,
            slots=(0 if ahead else plan.vectors) + width + generate.max_new_tokens - 1,
            ahead=ahead,
        )

    @property
    def behind(self) -> str:
        """For people: what the rows go on from."""
        return f" behind {self.ahead}" if self.ahead else ""

    def cache(self, plan: Design) -> Any:
        """Keys and values of all rows."""
        spec, rows = plan.spec, self.tokens.shape[0] * self.rule.rows
        shape = (spec.layers, rows, spec.kv_heads, self.slots, spec.head_dim)
        one = _left(plan.mesh, jax.ShapeDtypeStruct(shape, jnp.dtype(plan.config.model.dtype)))
        return [one, one]

    def least(self, plan: Design, tokens: int, seen: float) -> float:
        """Of so many tokens, each of which sees `seen` others of its row and all shared ones."""
        rows, length = self.tokens.shape[0], int(2 * (seen + self.ahead))
        return training_flops(
            plan.spec, tokens, length, adapter=plan.multiplied, answers=rows, passes="forward"
        )


def prompt(plan: Design, prompts: Prompts | None = None) -> Job:
    """A batch of prompts in one pass."""
    with_, decoder = _Generation.of(plan, prompts), plan.decoder
    given = [with_.numbers[name] for name in ("lengths", "numbers", "stops", "seed")]
    static = (decoder, with_.rule, with_.new, with_.slots)
    rows, width = with_.tokens.shape
    whole = width + (0 if with_.ahead else plan.vectors)
    return Job(
        lower=partial(start.lower, with_.model, with_.tokens, *given, *static),
        what=f"{rows} x {width}{with_.behind}",
        given=(with_.tokens, with_.model.shared),
        made=with_.cache(plan),
        attends=of_prompts(plan, rows, width, with_.ahead),
        tokens=rows * width,
        least=with_.least(plan, rows * whole, whole / 2),
        mean=prompts.mean() if prompts else 1.0,
        counted=prompts.counted if prompts else None,
    )


def token(plan: Design, prompts: Prompts | None = None) -> Job:
    """The loop over new tokens."""
    with_ = _Generation.of(plan, prompts)
    rows = with_.tokens.shape[0] * with_.rule.rows
    return Job(
        lower=partial(_lower_token, plan, with_),
        what=f"{rows} x 1, {with_.slots} slots{with_.behind}",
        given=(with_.cache(plan), with_.model.shared),
        tokens=rows,
        least=with_.least(plan, rows, with_.slots),
    )


def _lower_token(plan: Design, with_: _Generation) -> Any:
    decoder = plan.decoder
    given = [with_.numbers[name] for name in ("lengths", "numbers", "stops", "seed")]

    def begin(model: Model, tokens: Any, *given: Any) -> Any:
        return start(model, tokens, *given, decoder, with_.rule, with_.new, with_.slots)

    batch = jax.tree.map(
        partial(_left, plan.mesh), jax.eval_shape(begin, with_.model, with_.tokens, *given)
    )
    few, stops, seed = (with_.numbers[name] for name in ("few", "stops", "seed"))
    return advance.lower(with_.model, batch, stops, seed, few, decoder, with_.rule)


def _left(mesh: Any, leaf: Any) -> Any:
    """A leaf of the batch as `start` leaves it: the cache split by rows and heads."""
    letters = "L B K S H" if leaf.ndim == 5 else " ".join("-" * leaf.ndim)
    sharding = NamedSharding(mesh, activation_spec(letters, leaf.shape, mesh))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
