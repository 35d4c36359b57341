"""LoRA: two thin matrices next to each frozen projection, and nothing else is trained.

`y = x W + s · drop(x) A B` with `A` [in, R] random and `B` [R, out] zero, so that step 0 is the
base model (Hu et al. 2021, eq. 3; names, scale and initialisation are PEFT's).

    adapter = Lora.parse(spec, r=8, targets=['q', 'v'], layers='1..16')
    lora = adapter.init(spec, jax.random.key(0), params)   # {'blocks': {'attention': {'q': ...}}}
    adapter.count(spec)                                    # trained parameters

Projections may differ in rank and alpha, or lack an adapter in some blocks. Factors are stacked
all the same: columns of `a` and rows of `b` beyond a projection's own rank are zero, and so are
their gradients, each being a product with the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.adapters import low_rank
from jaxalign.adapters.dropout import drop
from jaxalign.adapters.interface import Adapter, Stored
from jaxalign.adapters.peft import compare, from_tensors, to_tensors
from jaxalign.adapters.peft_config import PeftConfig, vllm_limits, vllm_rank, write_config
from jaxalign.adapters.ranks import Ranks, block_range
from jaxalign.errors import UserError
from jaxalign.frozen.projection import Projection
from jaxalign.frozen.quantised import Quantised, is_quantised, widen
from jaxalign.model.spec import ModelSpec
from jaxalign.model.spec.tensors import TARGETS, sizes

Factors = Mapping[str, jax.Array]  # of one projection: a, b and, of DoRA, m


@dataclass(frozen=True)
class Lora(Ranks, Adapter):
    """What a LoRA is, without its weights, and what is done with them: an `Adapter`."""

    name: ClassVar[str] = "LoRA"
    kind: ClassVar[str] = "lora"
    merges: ClassVar[bool] = True

    # --- weights --------------------------------------------------------------------------------

    def init(self, spec: ModelSpec, key: jax.Array, params: Any = None) -> dict:
        """Fresh factors, float32: A uniform in ±1/sqrt(in) (PEFT's kaiming, a = sqrt 5), B zero."""
        blocks: dict = {}
        for index, (target, row) in enumerate(TARGETS.items()):
            if target in self.targets:
                own = jax.random.fold_in(key, index)
                blocks.setdefault(row.half, {})[target] = self._fresh(target, spec, own, params)
        return {"blocks": blocks}

    def count(self, spec: ModelSpec) -> int:
        """Number of trained parameters."""
        total = 0
        for (target, _), (r, _) in self.table(spec.layers).items():
            fan_in, fan_out = map(math.prod, _axes(target, spec))
            total += r * (fan_in + fan_out) + self.dora * fan_out
        return total

    def layer_mask(self, spec: ModelSpec) -> jax.Array | None:
        """[L] float32 with 1 where a block's adapter is trained, or None where all are."""
        if not self.layers:
            return None
        return jnp.zeros(spec.layers).at[jnp.array(self.layers) - 1].set(1.0)

    def cleared(self, trained: Mapping[str, Any], spec: ModelSpec) -> dict:
        """A NumPy tree with zeros where nothing is adapted, as a PEFT folder has it."""

        def clear(target: str, name: str, leaf: np.ndarray) -> np.ndarray:
            kept = self._within(target, spec)  # [L, R]; a [L, ..., R], b [L, R, ...], m [L, ...]
            shape = (*kept.shape, *(1,) * (leaf.ndim - 2))
            if name == "m":
                kept, shape = kept[:, :1], (spec.layers, *(1,) * (leaf.ndim - 1))
            kept = kept.reshape(shape)
            return np.where(np.moveaxis(kept, 1, -1) if name == "a" else kept, leaf, 0)

        blocks = each(trained["blocks"], lambda t, f: {k: clear(t, k, f[k]) for k in f})
        return {"blocks": blocks}

    # --- in a pass ------------------------------------------------------------------------------

    def per_block(self, params: Any, trained: Mapping[str, Any], blocks: int | None = None) -> Any:
        """The stacked factors, and a constant `scale` [L] next to them where scales differ."""
        stacks = trained["blocks"]
        if blocks is not None:
            stacks = jax.tree.map(lambda leaf: leaf[:blocks], stacks)
        return self._seen(params, stacks)

    def project(
        self,
        x: jax.Array,
        outputs: Mapping[str, jax.Array],
        sites: Mapping[str, Projection],
        own: Mapping[str, Factors],
        key: jax.Array | None,
    ) -> dict[str, jax.Array]:
        """`x W + b + s · drop(x) A B`; projections of one input share a dropout mask."""
        dropped = drop(x, self.dropout, key)
        parts = low_rank.products(dropped, own, self.scale)
        return {
            name: self._add(
                outputs[name], part.reshape(outputs[name].shape), x, dropped, sites[name], own[name]
            )
            for name, part in parts
        }

    # --- after training -------------------------------------------------------------------------

    @partial(jax.jit, static_argnums=0)
    def merge(self, params: dict, trained: dict) -> dict:
        """The base with the update, in the base's dtype: a tree like `params`.

        It is formed in float32 and rounded once, one block at a time.

        Raises:
          UserError: the base is quantised.
        """
        if is_quantised(params):
            raise UserError(
                "model.quantize: an adapter cannot be merged into a quantised base, its rounding "
                "would swallow the update; set model.quantize=none"
            )
        blocks = {half: dict(params["blocks"][half]) for half in params["blocks"]}
        for target in self.targets:
            half, inputs = TARGETS[target].half, len(TARGETS[target].inputs)

            def one(layer: tuple, inputs: int = inputs) -> jax.Array:
                kernel, factors, scale = layer
                return self._merged(kernel, factors, scale, inputs).astype(kernel.dtype)

            site, factors = blocks[half][target], trained["blocks"][half][target]
            scales = self.scales(target, factors["a"].shape[0])
            kernel = jax.lax.map(one, (site["kernel"], factors, jnp.asarray(scales)))
            blocks[half][target] = site | {"kernel": kernel}
        return params | {"blocks": blocks}

    def alone(self, target: str, block: int) -> Self | None:
        """The adapter of this projection, as of a model of one block; None where there is none."""
        rank, alpha = self.cell(target, block)
        if not rank:
            return None
        table = {(target, 1): (rank, alpha)}
        return type(self).of_table(table, 1, rank_stabilised=self.rank_stabilised)

    # --- on disk --------------------------------------------------------------------------------

    @classmethod
    def claims(cls, content: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json speaks of such an adapter."""
        return content.get("peft_type") == "LORA" and bool(content.get("use_dora")) == cls.dora

    @classmethod
    def read(
        cls,
        file: Path,
        content: Mapping[str, Any],
        tensors: Callable[[], Mapping[str, Stored]],
        spec: ModelSpec,
    ) -> tuple[dict[str, Any], Self]:
        """The tree (NumPy float32) and what it is.

        Raises:
          UserError: a variant that is not supported, not for this base, incomplete, not finite, or
            a configuration that speaks of other tensors.
        """
        said = PeftConfig.of(file, content)
        index = tensors()
        adapter = cls.of_table(
            compare(said, index, spec),
            spec.layers,
            dropout=said.dropout,
            rank_stabilised=said.rank_stabilised,
        )
        return from_tensors(adapter, index, spec), adapter

    def config(self, spec: ModelSpec, base_name: str = "") -> dict[str, Any]:
        """The adapter_config.json."""
        return write_config(self, spec, base_name)

    def tensors(self, trained: Mapping[str, Any], spec: ModelSpec) -> dict[str, np.ndarray]:
        """What adapter_model.safetensors holds, from NumPy leaves."""
        return to_tensors(self, trained, spec)

    # --- words ----------------------------------------------------------------------------------

    def following(self, found: Any, where: str) -> Self:
        """What goes on from an adapter in the folder `where`, which is `found`.

        Raises:
          UserError: it is another adapter than this one.
        """
        if not isinstance(found, Lora):
            return super().following(found, where)
        wanted = self
        if not self.parts:
            # Words cannot describe every pattern that PEFT can; without any, the adapter's own
            # go on.
            wanted = dataclasses.replace(self, parts=getattr(found, "parts", ()))
        for field in ("r", "alpha", "targets", "layers", "rank_stabilised", "dora", "parts"):
            theirs, ours = getattr(found, field, None), getattr(wanted, field)
            if theirs != ours:
                raise UserError(
                    f"adapter.start: the adapter in {where} has {field} {theirs}, the "
                    f"configuration {ours}; set the lora settings to the adapter's"
                )
        return wanted

    def words(self) -> dict[str, Any]:
        """The settings under `lora` that describe it; patterns of single blocks are left out."""
        words = {
            "r": self.r,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "targets": list(self.targets),
            "layers": ",".join(map(str, self.layers)) or "all",
            "scaling": "rank_stabilised" if self.rank_stabilised else "standard",
            "variant": self.kind,
        }
        return {"lora": words}

    @property
    def brief(self) -> str:
        """`LoRA r 8`."""
        return f"{self.name} r {self.r}"

    def idle(self, trained: Mapping[str, Any]) -> tuple[int, ...]:
        """The adapted blocks, from 1, whose factors b are all zero."""
        factors = [own for sites in trained["blocks"].values() for own in sites.values()]
        changed = np.stack(
            [np.any(own["b"], axis=tuple(range(1, own["b"].ndim))) for own in factors]
        )
        adapted = {block for _, block in self.table(changed.shape[1])}
        return tuple(b for b in sorted(adapted) if not changed[:, b - 1].any())

    def facts(self, spec: ModelSpec) -> dict[str, str]:
        """For readers: what it is and how large."""
        scaling = "alpha / sqrt(r)" if self.rank_stabilised else "alpha / r"
        own = ", some projections their own" if self.parts else ""
        return {
            self.name: f"r {self.r}, alpha {self.alpha:g}{own}; scale {scaling}",
            "projections": ", ".join(self.targets),
            "blocks": block_range(self.layers) or f"all {spec.layers}",
            "dropout": f"{self.dropout:g}",
            "trained parameters": f"{self.count(spec):,}",
        }

    def limits(self) -> list[str]:
        """What vLLM refuses of it, or gets wrong; empty where vLLM serves it."""
        return vllm_limits(self)

    @property
    def served_rank(self) -> int | None:
        """The --max-lora-rank with which vLLM serves it; None where no rank does."""
        return vllm_rank(self.r)

    # --- what DoRA does otherwise ---------------------------------------------------------------

    def _fresh(self, target: str, spec: ModelSpec, key: jax.Array, params: Any) -> dict:
        """The first factors of one projection."""
        fan_in, fan_out = _axes(target, spec)
        bound = 1 / math.sqrt(math.prod(fan_in))
        shape = (spec.layers, *fan_in, self.r)
        a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        if self.parts:
            within = self._within(target, spec).reshape(-1, *(1,) * len(fan_in), self.r)
            a = jnp.where(within, a, 0.0)
        return {"a": a, "b": jnp.zeros((spec.layers, self.r, *fan_out), jnp.float32)}

    def _within(self, target: str, spec: ModelSpec) -> np.ndarray:
        """[L, R] bool: the ranks that a projection has in each block."""
        ranks = [self.rank_of(target, block + 1) for block in range(spec.layers)]
        return np.arange(self.r) < np.array(ranks)[:, None]

    def _seen(self, params: Any, stacks: dict) -> dict:
        """What the blocks read of the stacked factors."""
        if self.even:
            return stacks
        return each(stacks, partial(self._beside, params))

    def _beside(self, params: Any, target: str, factors: Factors) -> dict:
        own = {"a": factors["a"], "b": factors["b"]}
        if not self.even:
            own["scale"] = jnp.asarray(self.scales(target, factors["a"].shape[0]))
        return own

    def _add(
        self, y: jax.Array, part: jax.Array, x: jax.Array, dropped: jax.Array, site: Projection,
        own: Factors,
    ) -> jax.Array:  # fmt: skip
        """The output from y = `x W + b` and part = `s · drop(x) A B`."""
        return y + part

    def _merged(self, kernel: jax.Array, factors: Factors, scale: Any, inputs: int) -> jax.Array:
        """One projection's weight with its update, float32."""
        return summed(kernel, factors["a"], factors["b"], scale)


def summed(kernel: jax.Array | Quantised, a: jax.Array, b: jax.Array, scale: Any) -> jax.Array:
    """W + s A B in float32: kernel [in..., out...], a [in..., R], b [R, out...]."""
    rank = a.shape[-1]
    # Where a matrix unit rounds float32 factors to bfloat16 by default, ask it not to.
    update = jnp.matmul(a.reshape(-1, rank), b.reshape(rank, -1), precision="highest")
    return widen(kernel, jnp.float32) + scale * update.reshape(kernel.shape)


def _axes(target: str, spec: ModelSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a projection's input and output axes."""
    row, size = TARGETS[target], sizes(spec)
    return tuple(size[x] for x in row.inputs), tuple(size[x] for x in row.outputs)


def each(stacks: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict:
    """`change` of the name and the leaves of every projection in a tree of blocks."""
    return {
        half: {name: change(name, leaves) for name, leaves in sites.items()}
        for half, sites in stacks.items()
    }
