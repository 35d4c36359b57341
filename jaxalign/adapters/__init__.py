"""What is trained next to a frozen base: an interface, and the kinds that stand behind it.

    adapter = parse(spec, 'dora', r=8, layers='1..16')         # what it is, without weights
    adapter = parse(spec, 'prefix', num_virtual_tokens=16)
    trained = adapter.init(spec, key, params)                  # {'blocks': {...: [L, ...]}}
    decoder = Decoder(spec, adapter)                           # its passes take `trained`
    save_peft('out', trained, spec, adapter)                   # jaxalign.hf.peft: any kind
    trained, adapter = load_peft('out', spec)

A kind is one file with a frozen, hashable dataclass that has the methods of `Adapter`, a row of
`KINDS`, and its word among the choices of `adapter.kind` in `settings/model.py`. A class that
derives from `Adapter` inherits what most kinds share. LoRA and DoRA change projections (`project`),
a prefix hands more keys and values to a block's attention (`per_block`), soft prompts and a pool of
them bring vectors in front of the embeddings (`prompt`).
"""

from __future__ import annotations

from typing import Any

from jaxalign.adapters.dora import Dora
from jaxalign.adapters.interface import Adapter
from jaxalign.adapters.lora import Lora
from jaxalign.adapters.pool import Pool
from jaxalign.adapters.prefix import Prefix
from jaxalign.adapters.prompt import Prompt
from jaxalign.model.spec import ModelSpec

__all__ = ["KINDS", "Adapter", "Dora", "Lora", "Pool", "Prefix", "Prompt", "parse"]

# The word in `adapter.kind` (of a LoRA, in `lora.variant`) -> the class. An adapter folder is read
# by the first that claims it.
KINDS: dict[str, type[Adapter]] = {
    "lora": Lora,
    "dora": Dora,
    "prefix": Prefix,
    "prompt": Prompt,
    "pool": Pool,
}


def parse(spec: ModelSpec, kind: str, **words: Any) -> Adapter:
    """The adapter that the settings under `lora`, or of another kind under `adapter`, describe.

    Raises:
      UserError: words that do not fit this model.
    """
    return KINDS[kind].parse(spec, **words)
