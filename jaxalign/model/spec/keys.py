"""Keys of a `config.json`, read with one sentence for what is wrong.

The file decides how much memory is asked for and how long loops are, and it may come from anyone:
each number has bounds, far beyond every model there is.

    size(config, 'hidden_size')               # 4096, or a UserError that names the key
    positive(config, 'query_pre_attn_scalar')                 # 256.0
    flag(config, 'tie_word_embeddings')                       # False where the file is silent
    ids_to_hf(ids(config, 'eos_token_id'))                    # 2, or [2, 3]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError, brief

# The largest whole numbers that are believed; others may fill 31 bits, as positions do.
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
}
_INT32 = (1 << 31) - 1
_REAL = 1e15  # and of fractions


def size(config: Mapping[str, Any], key: str, least: int = 1) -> int:
    """The whole number under this key, positive unless `least` is another.

    Raises:
        UserError: it is absent or something else.
    """
    value = config.get(key)
    most = LARGEST.get(key, _INT32)
    if type(value) is not int or value < least:
        what = "a positive whole number" if least == 1 else f"a whole number from {least}"
        raise UserError(f"config.json: {key} should be {what}, found {brief(value)}")
    if value > most:
        raise UserError(f"config.json: {key} {brief(value)} is absurd; models have up to {most:,}")
    return value


def positive(facts: Mapping[str, Any], key: str, of: str = "") -> float:
    """The positive number under this key; `of` says of what in the error.

    Raises:
        UserError: it is absent, not finite, or something else.
    """
    value: Any = facts.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < _REAL:
        raise UserError(f"config.json: {of}needs a positive {key}, found {brief(value)}")
    return float(value)


def positive_or(facts: Mapping[str, Any], key: str, default: float) -> float:
    """The positive number under this key; the default where it is absent, null or zero.

    Raises:
        UserError: it is something else.
    """
    absent = facts.get(key) is None or facts[key] == 0
    return default if absent else positive(facts, key)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """The yes or no under this key; the default where it is absent or null.

    Raises:
        UserError: it is something else: the text "false" would count as yes.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} should be true or false, found {brief(value)}")
    return value


def table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under this key; an empty one where it is absent or null.

    Raises:
        UserError: it is something else.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"config.json: {key} should be an object, found {brief(value)}")
    return value or {}


def ids(config: Mapping[str, Any], key: str, file: str = "config.json") -> tuple[int, ...]:
    """Token ids under this key, however many the file names.

    Raises:
        UserError: something else.
    """
    value = config.get(key)
    found = [] if value is None else value if isinstance(value, list) else [value]
    # Some old files say -1 where there is no such token.
    if len(found) > 1000 or not all(type(one) is int and -1 <= one <= _INT32 for one in found):
        raise UserError(f"{file}: {key} should be token ids, found {brief(value)}")
    return tuple(found)


def single_id(config: Mapping[str, Any], key: str) -> int | None:
    """The token id under this key.

    Raises:
        UserError: something else, or several.
    """
    found = ids(config, key)
    if len(found) > 1:
        raise UserError(f"config.json: {key} should be one token id, found {list(found)}")
    return found[0] if found else None


def ids_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    """The same as the file spells them."""
    if len(ids) < 2:
        return ids[0] if ids else None
    return list(ids)
