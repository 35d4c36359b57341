"""The two programs of generation, as a plan compiles them: prompts, and the loop over tokens.

prompt(plan).lower().compile()
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxalign.generate import shapes
from jaxalign.generate.decoding import Decoding
from jaxalign.generate.loop import Model, advance, start
from jaxalign.plan.job import Job
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

    @classmethod
    def of(cls, plan: Design) -> _Generation:
        generate = plan.config.generate
        whole = replicated(plan.mesh)
        give = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)  # noqa: E731
        rule = Decoding(generate.max_new_tokens, generate.method, beams=generate.beams).rule
        longest = TASK.longest(plan.config)  # answers belong to task rows
        width = shapes.padded(max(longest - generate.max_new_tokens, 1))
        numbers = {
            "lengths": give(jnp.int32, generate.batch),
            "numbers": give(jnp.uint32, generate.batch),
            "stops": give(jnp.int32, len(plan.spec.eos_ids) or 1),
            "seed": give(jnp.uint32),
            "few": give(jnp.int32),
        }
        base = plan.state.trained if plan.frozen.base is None else plan.frozen.base
        lora = None if plan.frozen.base is None else plan.state.trained
        return cls(
            model=Model(base, lora),
            tokens=give(jnp.int32, generate.batch, width),
            numbers=numbers,
            rule=rule,
            new=generate.max_new_tokens,
            slots=plan.vectors + width + generate.max_new_tokens - 1,
        )

    def cache(self, plan: Design) -> Any:
        """Keys and values of all rows."""
        spec, rows = plan.spec, self.tokens.shape[0] * self.rule.rows
        shape = (spec.layers, rows, spec.kv_heads, self.slots, spec.head_dim)
        one = _left(plan.mesh, jax.ShapeDtypeStruct(shape, jnp.dtype(plan.config.model.dtype)))
        return [one, one]

    def least(self, plan: Design, tokens: int, length: int) -> float:
        rows = self.tokens.shape[0]
        return training_flops(
            plan.spec, tokens, length, adapter=plan.multiplied, answers=rows, passes="forward"
        )


def prompt(plan: Design) -> Job:
    """A batch of prompts in one pass."""
    with_, decoder = _Generation.of(plan), plan.decoder
    given = [with_.numbers[name] for name in ("lengths", "numbers", "stops", "seed")]
    static = (decoder, with_.rule, with_.new, with_.slots)
    rows, width = with_.tokens.shape
    whole = plan.vectors + width
    return Job(
        lower=partial(start.lower, with_.model, with_.tokens, *given, *static),
        what=f"{rows} x {width}",
        given=with_.tokens,
        tokens=rows * width,
        least=with_.least(plan, rows * whole, whole),
    )


def token(plan: Design) -> Job:
    """The loop over new tokens."""
    with_ = _Generation.of(plan)
    rows = with_.tokens.shape[0] * with_.rule.rows
    return Job(
        lower=partial(_lower_token, plan, with_),
        what=f"{rows} x 1, {with_.slots} slots",
        given=with_.cache(plan),
        tokens=rows,
        least=with_.least(plan, rows, 2 * with_.slots),
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
