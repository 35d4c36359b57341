"""Keys of a `config.json`, read with one sentence for what is wrong.

size(config, 'hidden_size')               # 4096, or a UserError that names the key
positive(config, 'query_pre_attn_scalar')                 # 256.0
ids_to_hf(ids(config.get('eos_token_id')))                # 2, or [2, 3]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError


def size(config: Mapping[str, Any], key: str) -> int:
    """The positive whole number under this key.

    Raises:
        UserError: it is absent or something else.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} should be a positive whole number, found {value!r}")
    return value


def positive(facts: Mapping[str, Any], key: str, of: str = "") -> float:
    """The positive number under this key; `of` says of what in the error.

    Raises:
        UserError: it is absent or something else.
    """
    value = facts.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UserError(f"config.json: {of}needs a positive {key}, found {value!r}")
    return float(value)


def ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids, however many the file names."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def ids_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    """The same as the file spells them."""
    if len(ids) < 2:
        return ids[0] if ids else None
    return list(ids)
