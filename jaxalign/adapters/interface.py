"""What an adapter is to the rest of the house.

A class that derives from `Adapter` inherits what most kinds share and says the rest itself: its
weights (`init`, `count`), what a block reads of them (`per_block`, `project`), its words (`parse`)
and its files (`claims`, `read`, `config`, `tensors`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import jax
import numpy as np

from jaxalign.errors import UserError
from jaxalign.frozen.projection import Attached
from jaxalign.model.spec import ModelSpec

Tree = Any  # nested dicts of arrays


class Stored(Protocol):
    """A tensor in a file, as `jaxalign.hf.tensors` finds it; nothing is read before `view`."""

    @property
    def file(self) -> object:
        """Where it is, for messages."""
        ...

    @property
    def name(self) -> str:
        """Its name in the file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file has it."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """As the file has it; UserError where NumPy has none of that kind."""
        ...

    def view(self) -> np.ndarray:
        """Its numbers."""
        ...


class Adapter(Attached, Protocol):
    """What an adapter is, without its weights: what they are, and everything done with them.

    What a decoder uses, and who runs it, is described in `Attached`.
    """

    name: ClassVar[str]  # for readers
    kind: ClassVar[str]  # its word in KINDS
    merges: ClassVar[bool] = False  # whether it is a change of weights
    in_peft: ClassVar[bool] = True  # whether PEFT loads its folder

    # --- weights --------------------------------------------------------------------------------

    def init(self, spec: ModelSpec, key: jax.Array, params: Tree) -> Tree:
        """Fresh weights, float32, with which the model is the base.

        Returns:
          `{'blocks': ...}` with leaves [L, ...], of which a run may train some (`layer_mask`), and
          under other names what belongs to no block, such as `prompt`.
        """
        ...

    def count(self, spec: ModelSpec) -> int:
        """Number of trained parameters."""
        ...

    def layer_mask(self, spec: ModelSpec) -> jax.Array | None:
        """[L] float32 with 1 where a block's weights are trained, or None where all are."""
        return None

    def cleared(self, trained: Tree, spec: ModelSpec) -> Tree:
        """A NumPy tree with zeros where nothing is adapted, as `read` returns it."""
        return trained

    def multiplied(self, spec: ModelSpec) -> int:
        """By how many numbers each token is multiplied in a pass through all blocks."""
        return self.count(spec)

    # --- after training -------------------------------------------------------------------------

    def settle(self, params: Tree, trained: Tree) -> Tree:
        """See `Attached`."""
        return trained

    def merge(self, params: Tree, trained: Tree) -> Tree:
        """See `Attached`."""
        raise UserError(
            f"generate.adapter: {self.name} cannot be merged into a base; set "
            "generate.adapter=unmerged"
        )

    def alone(self, target: str, block: int) -> Self | None:
        """The adapter of one projection of a block (from 1), as of a model of this block alone.

        With it a base is merged tensor by tensor. None: nothing is adapted there.
        """
        return None

    # --- on disk --------------------------------------------------------------------------------

    @classmethod
    def claims(cls, content: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this kind."""
        ...

    @classmethod
    def read(
        cls,
        file: Path,
        content: Mapping[str, Any],
        tensors: Callable[[], Mapping[str, Stored]],
        spec: ModelSpec,
    ) -> tuple[Tree, Self]:
        """The weights (NumPy float32) and what they are, checked against the base.

        Args:
          file: the adapter_config.json, for messages.
          content: what it says.
          tensors: opens adapter_model.safetensors; name -> tensor.
          spec: the base's facts.

        Raises:
          UserError: an adapter that could be loaded only in part, or not on this base.
        """
        ...

    def config(self, spec: ModelSpec, base_name: str = "") -> dict[str, Any]:
        """What adapter_config.json says."""
        ...

    def tensors(self, trained: Tree, spec: ModelSpec) -> dict[str, np.ndarray]:
        """What adapter_model.safetensors holds, from NumPy leaves; only what is adapted.

        Raises:
          ValueError: a tree that is not this adapter's.
        """
        ...

    # --- words ----------------------------------------------------------------------------------

    @classmethod
    def parse(cls, spec: ModelSpec, *_: Any, **words: Any) -> Self:
        """The adapter that the settings describe.

        Raises:
          UserError: words that do not fit this model.
        """
        ...

    def words(self) -> dict[str, Any]:
        """The settings that describe it, as nested dicts."""
        return {"adapter": {"kind": self.kind}}

    def following(self, found: Adapter, where: str) -> Self:
        """What goes on from an adapter in the folder `where`, which is `found`.

        Raises:
          UserError: it is another adapter than this one.
        """
        if found != self:
            raise UserError(
                f"adapter.start: the adapter in {where} is a {found.brief}, the configuration asks "
                f"for a {self.brief}; set the adapter settings to the adapter's"
            )
        return self

    @property
    def brief(self) -> str:
        """For readers: what it is in a few words."""
        return self.name

    def idle(self, trained: Tree) -> tuple[int, ...]:
        """The blocks, from 1, that it adapts but does not change."""
        return ()

    def facts(self, spec: ModelSpec) -> dict[str, str]:
        """For readers: what it is and how large."""
        return {self.name: f"{self.count(spec):,} trained parameters"}

    def limits(self) -> list[str]:
        """What vLLM refuses of it, or gets wrong; empty where vLLM serves it."""
        return [f"vLLM does not know {self.name}"]

    @property
    def served_rank(self) -> int | None:
        """The --max-lora-rank with which vLLM serves it; None where no rank does."""
        return None
