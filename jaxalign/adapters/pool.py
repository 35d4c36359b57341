"""Retrieved prompts, after XLM-P (2306.07610): a pool of soft prompts, mixed by what the input is.

    q = mean of the frozen embeddings of the input       [D]
    a = softmax(cos(q, k_j) / τ)                         over the M keys k_j of the pool
    [Σ_j a_j P_j, E(x_1), ..., E(x_T)]                   P_j [P, D]; keys and prompts are trained

The paper's code holds a README alone. That prompts are looked up by attention over a pool and put
in front is the paper's; query, cosine, temperature, the mixture of all M and every size are our
choices. The input is what is known before the answer: a query that read the answer would hand it
to the model in training, and find other prompts when the answer is written.

Vectors differ between rows, so rows are padded (`data/streams.py`) and prompts share no start. PEFT
has no such kind: the folder has the form of a PEFT folder, `peft_type` is JAXALIGN_POOL, and only
jaxalign loads it.

    adapter = Pool(8, pool_size=32, temperature=0.1)
    adapter.init(spec, key, params)                  # {'pool': {'keys': [M, D], 'prompts': ...}}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.adapters.interface import Stored
from jaxalign.adapters.prompt import words
from jaxalign.adapters.virtual import MOST, Virtual
from jaxalign.errors import UserError, brief
from jaxalign.model.spec import ModelSpec


@dataclass(frozen=True)
class Pool(Virtual):
    """M prompts of P vectors each, and a key for each of them."""

    name: ClassVar[str] = "prompt pool"
    kind: ClassVar[str] = "pool"
    peft_type: ClassVar[str] = "JAXALIGN_POOL"
    options: ClassVar[frozenset[str]] = frozenset({"pool_size", "temperature"})
    in_peft: ClassVar[bool] = False

    pool_size: int = 32  # M
    temperature: float = 0.1

    @property
    def prompt_length(self) -> int:
        """See `Attached`."""
        return self.num_virtual_tokens

    @property
    def by_input(self) -> bool:
        """Yes."""
        return True

    def init(self, spec: ModelSpec, key: jax.Array, params: Any) -> dict[str, Any]:
        """Embeddings of random tokens, float32, keys and prompts alike."""
        one, other = jax.random.split(key)
        keys = words(spec, one, params, (self.pool_size,))
        prompts = words(spec, other, params, (self.pool_size, self.num_virtual_tokens))
        return {"pool": {"keys": keys, "prompts": prompts}}

    def count(self, spec: ModelSpec) -> int:
        """M (P + 1) D."""
        return self.pool_size * (self.num_virtual_tokens + 1) * spec.dim

    def prompt(self, trained: Mapping[str, Any], x: jax.Array, asked: jax.Array) -> jax.Array:
        """[B, P, D]."""
        shares = self.shares(trained, x, asked)
        return jnp.einsum("BM,MPD->BPD", shares, trained["pool"]["prompts"], precision="highest")

    def shares(self, trained: Mapping[str, Any], x: jax.Array, asked: jax.Array) -> jax.Array:
        """[B, M]: how much of each prompt a row gets; embeddings x [B, T, D], asked [B, T] bool."""
        # A mean's length does not matter to a cosine: the sum has its direction.
        query = jnp.einsum("BT,BTD->BD", asked.astype(jnp.float32), x.astype(jnp.float32))
        return self.retrieved(trained, query)

    def retrieved(self, trained: Mapping[str, Any], query: jax.Array) -> jax.Array:
        """[B, M]: how much of each prompt queries [B, D] get."""
        keys = trained["pool"]["keys"]
        near = jnp.einsum("BD,MD->BM", _unit(query), _unit(keys), precision="highest")
        return jax.nn.softmax(near / self.temperature, axis=-1)

    @classmethod
    def read(
        cls,
        file: Path,
        content: Mapping[str, Any],
        tensors: Callable[[], Mapping[str, Stored]],
        spec: ModelSpec,
    ) -> tuple[dict[str, Any], Self]:
        """See `Adapter`."""
        count = cls.said(file, content, {})
        size: Any = content.get("pool_size")
        temperature: Any = content.get("temperature")
        if type(size) is not int or not 1 <= size <= MOST:
            raise UserError(f"{file}: pool_size should be a whole number, found {brief(size)}")
        if type(temperature) not in (int, float) or not 0 < temperature < np.inf:
            raise UserError(
                f"{file}: temperature should be a number above 0, found {brief(temperature)}"
            )
        shapes = {"keys": (size, spec.dim), "prompts": (size, count, spec.dim)}
        return {"pool": cls.held(file, tensors, shapes)}, cls(count, size, float(temperature))

    def config(self, spec: ModelSpec, base_name: str = "") -> dict[str, Any]:
        """See `Adapter`."""
        return self.written(base_name, pool_size=self.pool_size, temperature=self.temperature)

    def tensors(self, trained: Mapping[str, Any], spec: ModelSpec) -> dict[str, np.ndarray]:
        """See `Adapter`."""
        pool, dim = trained["pool"], spec.dim
        shapes = {
            "keys": (self.pool_size, dim),
            "prompts": (self.pool_size, self.num_virtual_tokens, dim),
        }
        for name, shape in shapes.items():
            if np.shape(pool[name]) != shape:
                raise ValueError(f"{name} of a pool of this base are {list(shape)}")
        return {name: np.asarray(pool[name], np.float32) for name in shapes}

    @classmethod
    def parse(cls, spec: ModelSpec, *, num_virtual_tokens: int, **words: Any) -> Self:
        """The adapter that the settings under `adapter` describe."""
        return cls(num_virtual_tokens, words["pool_size"], words["temperature"])

    def words(self) -> dict[str, Any]:
        """The settings under `adapter` that describe it."""
        more = {"pool_size": self.pool_size, "temperature": self.temperature}
        return {"adapter": super().words()["adapter"] | more}

    @property
    def brief(self) -> str:
        """`prompt pool of 32 x 8, temperature 0.1`."""
        own = f"{self.pool_size} x {self.num_virtual_tokens}"
        return f"{self.name} of {own}, temperature {self.temperature:g}"

    def facts(self, spec: ModelSpec) -> dict[str, str]:
        """For readers: what it is and how large."""
        return super().facts(spec) | {self.name: self.brief.partition(" of ")[2]}

    def limits(self) -> list[str]:
        """Also what PEFT does not know."""
        return ["PEFT has no such kind: `jaxalign` alone loads this folder", *super().limits()]


def _unit(x: jax.Array) -> jax.Array:
    """x [.., D] at length 1; zeros, of rows without tokens, stay zeros and have no slope."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
