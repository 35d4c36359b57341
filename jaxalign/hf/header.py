"""The header of a safetensors file, taken at its word only where the format's rules hold.

A file says itself where its tensors are: 8 bytes for the header's length, a JSON object, then the
tensors' bytes. A header that is wrong by one byte still points at numbers, which would be loaded as
weights. The rules are those of the safetensors library: known dtypes, sizes that follow from dtype
and shape, and tensors that cover the rest of the file one after the other, without a hole, an
overlap or a byte at the end.

    entries = parse_header(text, room=4096)       # ValueError: what is wrong
    entries['model.norm.weight'].start            # bytes from the end of the header
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Bits of one number, by the names of the format.
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
LENGTH = 8  # bytes that hold the header's length
MAX_HEADER = 100_000_000  # bytes; the library's limit, too
MAX_AXES = 32


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    start: int  # bytes from the end of the header
    stop: int


def header_length(start: bytes, size: int) -> int:
    """The bytes of the header.

    Args:
        start: the file's first 8 bytes.
        size: of the whole file.

    Raises:
        ValueError: the file is too short, or no header is that long.
    """
    if len(start) < LENGTH:
        raise ValueError("it has no header")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise ValueError("the length of its header is absurd")
    if LENGTH + length > size:
        raise ValueError("the header is longer than the file")
    return length


def parse_header(text: bytes, room: int) -> dict[str, Entry]:
    """Every tensor by name.

    Args:
        text: the header.
        room: bytes behind it.

    Raises:
        ValueError: it breaks a rule of the format.
    """
    if not text.startswith(b"{"):
        raise ValueError("its header is not JSON")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_number)
        if b"\\u" in text:  # Python takes half of a character, the format does not
            json.dumps(header, ensure_ascii=False).encode()
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError("its header is not JSON") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ of its header should map texts to texts")
    entries = {name: _entry(name, said) for name, said in header.items()}
    end = 0
    for name, one in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if one.start != end:
            what = "overlaps the one before it" if one.start < end else "leaves a hole before it"
            raise ValueError(f"tensor {name} {what}")
        end = one.stop
    if end != room:
        raise ValueError(f"its tensors should end at byte {end} behind the header, not at {room}")
    return entries


def _no_number(name: str) -> None:
    raise ValueError(f"its header holds {name}, which is not JSON")


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"its header names {key} twice")
        found[key] = value
    return found


def _entry(name: str, said: Any) -> Entry:
    said = said if isinstance(said, dict) else {}
    if not name.isprintable():
        raise ValueError(f"its header names a tensor {name[:40]!r}")
    dtype, shape, offsets = (said.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name} has the unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape):
        raise ValueError(f"the shape of tensor {name} is not a list of whole numbers")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets of tensor {name} are not a first and a last byte")
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"tensor {name} has not as many bytes as its shape and dtype ask for")
    return Entry(tuple(shape), dtype, *offsets)


def _counts(value: Any) -> bool:
    """A short list of whole numbers that 64 bits hold."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_AXES
        and all(type(one) is int and 0 <= one < 1 << 63 for one in value)
    )
