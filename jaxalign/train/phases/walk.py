"""One pass of a batch's sides through the model, in whichever layout its rows have.

Padded rows run one behind the other, those of several sides interleaved. Rows end to end run as the
few sequences that hold them (`data/flat.py`), after what they have in common. Both give the same to
objectives: a vector or the states of each row, and the states that predict its answer.

    found = walk(decoder, params, adapter, lay(sides, batch.flat, packed), one, frozen, key)
    found['text']                                    # {Tap: [B, D], ...}, answers [B, A, D]
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.data.batch import ANSWER, PREDICTED, ROLE_OF, Flat, Side
from jaxalign.errors import UserError
from jaxalign.model.decoder import Decoder, Output
from jaxalign.model.front import Stem
from jaxalign.model.layers import pool
from jaxalign.model.spec import ModelSpec
from jaxalign.objectives import FINAL, TOKENS, Tap
from jaxalign.objectives.pooling import POOLINGS, pooling_weights
from jaxalign.objectives.standards import standardise
from jaxalign.sharding import constrain
from jaxalign.train.state import Frozen

NO_ROLES = "a tap asks for the prompt or the answer of rows that have none"
BY_INPUT = "an adapter whose vectors depend on the text needs padded rows, one in a sequence"
POOLS = (*POOLINGS, *ROLE_OF, *PREDICTED, TOKENS)  # that a tap may ask for
Found = dict[str, tuple[dict[Tap, jax.Array], jax.Array | None]]


@dataclass(frozen=True)
class Pass:
    """One walk of some sides through the model."""

    sides: tuple[str, ...]
    taps: tuple[Tap, ...]
    answers: tuple[str, ...] = ()  # the sides whose answers are wanted of it
    # `stopped`: no gradient; `reference`: the base without the adapter; `start`: with its first one
    model: str = "trained"

    @property
    def whole(self) -> bool:
        """Whether it runs through all blocks and the final norm."""
        return bool(self.answers) or any(tap.layer == FINAL for tap in self.taps)

    def blocks(self, spec: ModelSpec) -> int:
        """How many blocks it runs."""
        return spec.layers if self.whole else max((tap.layer for tap in self.taps), default=0)

    def ways(self, laid: bool) -> int:
        """How many sequences of a batch become one of the pass: one of each side, or all in one."""
        return 1 if laid else len(self.sides)


class Laid(abc.ABC):
    """How the rows of some sides stand in the sequences that the model runs over."""

    sides: Mapping[str, Side]

    @abc.abstractmethod
    def sequences(self) -> dict[str, Any]:
        """What `Decoder.forward` takes of them."""

    @abc.abstractmethod
    def asked(self) -> jax.Array:
        """[rows, T] bool: tokens before the answers; an adapter's vectors may depend on them.

        Raises:
          ValueError: texts share a sequence.
        """

    @abc.abstractmethod
    def weights(self, pooling: str) -> jax.Array:
        """Of all rows of these sides: [rows, T], or [W, rows, T] of those in a sequence."""

    @abc.abstractmethod
    def vectors(self, name: str, x: jax.Array) -> jax.Array:
        """[B, D] of a side, from the pooled vectors of all."""

    @abc.abstractmethod
    def states(self, name: str, x: jax.Array) -> jax.Array:
        """[B, T, D] of a side, from the states of the sequences."""

    def answers(self, name: str, x: jax.Array) -> jax.Array:
        """[B, A, D] (or [W, A, D]): the states that predict an answer."""
        return _at(x, self.sides[name].answer_at)

    def owners(self, name: str) -> jax.Array | None:
        """[W, A] int32: whose each answer is, from 0 in its sequence; None: row b has answers b."""
        return None


@dataclass(frozen=True)
class Rows(Laid):
    """Each row in a sequence of its own, or packed with others."""

    sides: Mapping[str, Side]
    packed: bool

    def sequences(self) -> dict[str, Any]:
        """They are interleaved, so that a device keeps its own rows."""
        packed = {"segments": "segments", "positions": "positions"} if self.packed else {}
        return {name: self._joined(name) for name in ("tokens", *packed)}

    def asked(self) -> jax.Array:
        """See `Laid`."""
        if self.packed:
            raise ValueError(BY_INPUT)
        real = self._joined("real") != 0
        if any(side.roles is None for side in self.sides.values()):
            return real
        return real & (self._joined("roles") != ANSWER)

    def weights(self, pooling: str) -> jax.Array:
        """See `Laid`."""
        if self.packed:
            raise UserError(
                "batch.pack: segments puts several rows into a sequence, and an objective reads "
                "one vector of each; set batch.pack=auto"
            )
        if pooling in ROLE_OF:
            return pooling_weights(self._joined("roles") == ROLE_OF[pooling], "mean")
        if pooling in PREDICTED:
            mine = self._joined("roles") == PREDICTED[pooling]
            return pooling_weights(jnp.pad(mine[:, 1:], ((0, 0), (0, 1))), "mean")
        return pooling_weights(self._joined("real"), pooling)

    def vectors(self, name: str, x: jax.Array) -> jax.Array:
        """See `Laid`."""
        number, place = len(self.sides), list(self.sides).index(name)
        return x if number == 1 else x.reshape(-1, number, *x.shape[1:])[:, place]

    states = vectors

    def answers(self, name: str, x: jax.Array) -> jax.Array:
        """See `Laid`."""
        return super().answers(name, self.states(name, x))

    def _joined(self, what: str) -> jax.Array:
        """[B, T] of each of n sides -> [n B, T].

        Raises:
          ValueError: these sides do not have such an array, as pairs have no roles.
        """
        arrays = [getattr(side, what) for side in self.sides.values()]
        if any(array is None for array in arrays):
            raise UserError(NO_ROLES)
        if len(arrays) == 1:
            return arrays[0]
        stacked = jnp.stack(arrays, axis=1).reshape(-1, arrays[0].shape[-1])
        return constrain(stacked, "B T")


@dataclass(frozen=True)
class EndToEnd(Laid):
    """All rows of a device's share in one sequence; all sides of the batch run together."""

    sides: Mapping[str, Side]
    flat: Flat
    places: Mapping[str, int]  # of the sides among all of the batch

    def sequences(self) -> dict[str, Any]:
        """See `Laid`."""
        flat = self.flat
        return {
            "tokens": flat.tokens,
            "segments": flat.segments,
            "positions": flat.positions,
            "reach": flat.reach.shape[-1],
            "stem": Stem(flat.nodes, flat.sees) if flat.nodes.shape[-1] else None,
        }

    def asked(self) -> jax.Array:
        """See `Laid`."""
        raise ValueError(BY_INPUT)

    def weights(self, pooling: str) -> jax.Array:
        """See `Laid`."""
        members = jnp.concatenate([self._members(name) for name in self.sides], axis=1)
        role = ROLE_OF.get(pooling, PREDICTED.get(pooling))
        if role is None:
            return pooling_weights(members, pooling)
        if self.flat.roles is None:
            raise UserError(NO_ROLES)
        mine = members & (self.flat.roles == role)[:, None]
        if pooling in PREDICTED:
            mine = members & _next(members, mine)
        return pooling_weights(mine, "mean")

    def vectors(self, name: str, x: jax.Array) -> jax.Array:
        """See `Laid`."""
        number, place = len(self.sides), list(self.sides).index(name)
        own = x.reshape(x.shape[0], number, -1, x.shape[-1])[:, place]
        return own.reshape(-1, x.shape[-1])

    def states(self, name: str, x: jax.Array) -> jax.Array:
        """See `Laid`; a shared state stands in each row that begins with it."""
        members, length = self._members(name), self.sides[name].tokens.shape[-1]
        # Members first, in their order: the stem stands in front of all texts.
        order = jnp.argsort(~members, axis=-1, stable=True)[..., :length]  # [W, R, T]
        here = jnp.take_along_axis(members, order, axis=-1)
        found = jax.vmap(lambda states, at: states[at])(x, order)
        found = jnp.where(here[..., None], found, 0)
        short = length - found.shape[2]  # rows may be longer than sequences whose stem they share
        found = jnp.pad(found, ((0, 0), (0, 0), (0, max(short, 0)), (0, 0)))
        return found.reshape(-1, length, x.shape[-1])

    def owners(self, name: str) -> jax.Array | None:
        """See `Laid`."""
        own = jnp.take_along_axis(self.flat.segments, self.sides[name].answer_at, axis=1)
        return own - 1 - self.places[name] * self._each

    @property
    def _each(self) -> int:
        """R, texts of a side in a sequence."""
        return self.flat.texts.shape[-1] // len(self.places)

    def _members(self, name: str) -> jax.Array:
        """[W, R, T] bool: which tokens a text consists of."""
        flat, first = self.flat, self.places[name] * self._each
        numbers = first + jnp.arange(self._each)
        own = flat.segments[:, None] == numbers[:, None] + 1
        shared = (flat.texts[:, first : first + self._each, None] & flat.nodes[:, None]) != 0
        behind = flat.tokens.shape[-1] - flat.nodes.shape[-1]
        return own | jnp.pad(shared, ((0, 0), (0, 0), (0, behind)))


def lay(sides: Mapping[str, Side], batch: Any, packed: bool) -> Laid:
    """These sides of a batch, in its layout."""
    flat: Flat | None = getattr(batch, "flat", None)
    if flat is None:
        return Rows(sides, packed)
    return EndToEnd(sides, flat, {name: place for place, name in enumerate(batch.sides())})


def walk(
    decoder: Decoder,
    params: dict,
    adapter: dict | None,
    laid: Laid,
    one: Pass,
    frozen: Frozen,
    dropout: Any,
) -> Found:
    """Side -> (its taps, its answers' final states) after one pass over all of them."""
    pools = tuple(dict.fromkeys(tap.pool for tap in one.taps if tap.pool != TOKENS))
    weights = [laid.weights(pooling) for pooling in pools]
    inner = tuple(dict.fromkeys(t.layer for t in one.taps if t.layer != FINAL and t.pool != TOKENS))
    kept = tuple(dict.fromkeys(t.layer for t in one.taps if t.layer != FINAL and t.pool == TOKENS))
    by_input = decoder.adapter is not None and decoder.adapter.by_input
    out = decoder.forward(
        params,
        adapter,
        **laid.sequences(),
        asked=laid.asked() if by_input else None,
        stop=None if one.whole else one.blocks(decoder.spec),
        taps=inner,
        whole=kept,
        pool_weights=jnp.stack(weights) if weights else None,
        dropout=dropout,
    )
    tapped = partial(_tapped, out=out, pools=pools, weights=weights, frozen=frozen)
    found = {tap: tapped(tap) for tap in one.taps}
    of: dict[bool, Callable] = {True: laid.states, False: laid.vectors}
    result: Found = {}
    for name, side in laid.sides.items():
        answers = None
        if name in one.answers and side.answer_at is not None:
            assert out.hidden is not None  # the pass did not stop early
            answers = laid.answers(name, out.hidden)
        taps = {tap: of[tap.pool == TOKENS](name, states) for tap, states in found.items()}
        result[name] = taps, answers
    return result


def _tapped(
    tap: Tap, out: Output, pools: tuple[str, ...], weights: list[jax.Array], frozen: Frozen
) -> jax.Array:
    """What a tap gives of all rows."""
    if tap.pool == TOKENS:
        found = out.hidden if tap.layer == FINAL else out.whole[tap.layer]
        assert found is not None
        return found
    number = pools.index(tap.pool)
    if tap.layer == FINAL:
        assert out.hidden is not None
        found = pool(out.hidden, weights[number][None])[0]
    else:
        found = out.pooled[tap.layer][number]
    if tap.states == "raw":
        return found
    assert frozen.standards is not None  # measured before the first update
    return standardise(found, frozen.standards[tap])


def _next(members: jax.Array, mine: jax.Array) -> jax.Array:
    """[..., T] bool: whether the next member of each place is one of `mine`; members are of a text
    in its order, though others may stand between them."""
    length = members.shape[-1]
    places = jnp.where(members, jnp.arange(length), length)
    ahead = jax.lax.cummin(places, axis=places.ndim - 1, reverse=True)[..., 1:]
    ends = [(0, 0)] * (members.ndim - 1) + [(0, 1)]
    ahead = jnp.pad(ahead, ends, constant_values=length)
    return jnp.take_along_axis(jnp.pad(mine, ends), ahead, axis=-1)


def _at(hidden: jax.Array, places: jax.Array) -> jax.Array:
    """[B, A, D]: rows of hidden [B, T, D] at `places` [B, A]."""
    # A one-hot product picks rows exactly and, unlike a gather, splits and transposes cheaply.
    pick = (places[:, :, None] == jnp.arange(hidden.shape[1])).astype(hidden.dtype)  # [B, A, T]
    return jnp.einsum("BAT,BTD->BAD", pick, hidden)
