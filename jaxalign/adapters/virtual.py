"""What adapters of virtual tokens have in common: a number of them, and one small file.

A virtual token is trained and stands in front of a text, where no word is. Text goes on behind it:
its first token has position P. Nothing of the base changes, so there is nothing to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np

from jaxalign.adapters.interface import Adapter, Stored
from jaxalign.adapters.peft import read_tensor
from jaxalign.adapters.peft_options import COMMON, check_kinds, check_known
from jaxalign.errors import UserError, brief
from jaxalign.frozen.projection import Projection
from jaxalign.hf.find import unpinned
from jaxalign.model.spec import ModelSpec

MOST = 1 << 16  # virtual tokens of a file


@dataclass(frozen=True)
class Virtual(Adapter):
    """P virtual tokens; a kind says what they are."""

    peft_type: ClassVar[str]
    # What a file may say besides: read by the kind, or no matter of what its tensors mean.
    options: ClassVar[frozenset[str]]

    num_virtual_tokens: int = 16  # P

    @property
    def dropout(self) -> float:
        """None: PEFT's have none."""
        return 0.0

    def project(
        self,
        x: jax.Array,
        outputs: Mapping[str, jax.Array],
        sites: Mapping[str, Projection],
        own: Mapping[str, Any],
        key: jax.Array | None,
    ) -> Mapping[str, jax.Array]:
        """No projection changes."""
        return outputs

    def per_block(self, params: Any, trained: Any, blocks: int | None = None) -> Any:
        """Nothing, unless a kind has weights in blocks."""
        return None

    def multiplied(self, spec: ModelSpec) -> int:
        """None: vectors in front of embeddings are tokens, and counted as such."""
        return 0

    # --- on disk --------------------------------------------------------------------------------

    @classmethod
    def claims(cls, content: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this kind."""
        return content.get("peft_type") == cls.peft_type

    @classmethod
    def said(cls, file: Path, content: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
        """P, of a configuration whose other numbers are those of this base.

        Args:
          file: the adapter_config.json, for messages.
          content: what it says.
          wanted: key -> what it has to be where it is there.

        Raises:
          UserError: they are not, more than the virtual tokens is trained, or an option is not
            known.
        """
        check_known(file, content, COMMON | {"num_virtual_tokens"} | wanted.keys() | cls.options)
        check_kinds(file, content)
        if content.get("modules_to_save"):
            raise UserError(
                f"{file}: modules_to_save={brief(content['modules_to_save'])} is not supported; "
                f"a {cls.name} is its virtual tokens alone"
            )
        for key, ours in wanted.items():
            if content.get(key) not in (None, ours):
                raise UserError(
                    f"{file}: {key} is {brief(content[key])} and this base asks for {ours}; the "
                    "adapter was trained on another base"
                )
        count = content.get("num_virtual_tokens")
        if type(count) is not int or not 1 <= count <= MOST:
            raise UserError(
                f"{file}: num_virtual_tokens should be a whole number from 1 to {MOST}, found "
                f"{brief(count)}"
            )
        return count

    @classmethod
    def held(
        cls,
        file: Path,
        tensors: Callable[[], Mapping[str, Stored]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """The tensors of a file, float32, which holds these and no others.

        Raises:
          UserError: it does not, or their numbers are not finite.
        """
        index = tensors()
        for name in dict.fromkeys([*shapes, *index]):
            if name not in index:
                raise UserError(f"{file.parent}: tensor {name} is missing; it is the {cls.name}")
            found = index[name]
            if name not in shapes:
                raise UserError(
                    f"{found.file}: tensor {name} has no place in a {cls.name}; it holds "
                    f"{', '.join(shapes)}"
                )
            if found.shape != shapes[name]:
                raise UserError(
                    f"{found.file}: tensor {name} has shape {list(found.shape)}, but "
                    f"num_virtual_tokens and this base ask for {list(shapes[name])}; the adapter "
                    "was trained on another base"
                )
        return {name: read_tensor(index[name]) for name in shapes}

    def written(self, base_name: str, **more: Any) -> dict[str, Any]:
        """An adapter_config.json."""
        name, revision = unpinned(base_name)
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": name,
            **({"revision": revision} if revision else {}),
            "num_virtual_tokens": self.num_virtual_tokens,
            "inference_mode": True,
            **more,
        }

    # --- words ----------------------------------------------------------------------------------

    @classmethod
    def parse(cls, spec: ModelSpec, *, num_virtual_tokens: int, **_: Any) -> Self:
        """The adapter that the settings under `adapter` describe."""
        return cls(num_virtual_tokens)

    def words(self) -> dict[str, Any]:
        """The settings under `adapter` that describe it."""
        return {"adapter": {"kind": self.kind, "num_virtual_tokens": self.num_virtual_tokens}}

    @property
    def brief(self) -> str:
        """`prefix of 16`."""
        return f"{self.name} of {self.num_virtual_tokens}"

    def facts(self, spec: ModelSpec) -> dict[str, str]:
        """For readers: what it is and how large."""
        return {
            self.name: f"{self.num_virtual_tokens} virtual tokens",
            "trained parameters": f"{self.count(spec):,}",
        }
