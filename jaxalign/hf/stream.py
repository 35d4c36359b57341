"""Weights leave tensor by tensor: safetensors files and their index, one tensor in memory.

The safetensors library takes a dictionary of finished tensors. A model larger than what is left of
the host's memory needs the opposite: tensors that are made when their turn comes, and are gone
when they are written.

    tensors = [Pending('model.norm.weight', (4096,), np.dtype('float32'), lambda: norm)]
    write_shards(Path('out'), tensors, max_bytes=5_000_000_000)   # model.safetensors, or shards
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxalign.errors import UserError
from jaxalign.hf.files import write_json
from jaxalign.hf.tensors import DTYPES, all_finite

# Transformers refuses a file that does not say which framework it is for.
METADATA = {"format": "pt"}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn comes."""

    name: str  # as Hugging Face spells it
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path | None, tensors: Sequence[Pending], max_bytes: int) -> None:
    """Write `model.safetensors`, or numbered shards and their index.

    Args:
        folder: an existing folder; None makes every tensor and drops it, for a process that only
            helps to gather them.
        tensors: in the order of writing.
        max_bytes: a new file begins where the next tensor would pass this.

    Raises:
        ValueError: a tensor came out with another shape or dtype than it said.
    """
    shards = plan_shards(tensors, max_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        of_all = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{of_all}.safetensors"
        weight_map |= {tensor.name: file for tensor in shard}
        if folder:
            write_file(folder / file, shard)
        else:
            for tensor in shard:
                _made(tensor)
    if folder and len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def plan_shards(tensors: Sequence[Pending], max_bytes: int) -> list[list[Pending]]:
    """Which tensors go into which file; one that is larger than a file has it for itself."""
    shards: list[list[Pending]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_file(file: Path, tensors: Sequence[Pending]) -> None:
    """Write one safetensors file: the header's length, the header, the tensors' bytes."""
    # Wide numbers first, as the library does it, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for tensor in ordered:
            # Seen as bytes: bfloat16 has no buffer format of its own.
            out.write(_made(tensor).reshape(-1).view(np.uint8).data)


def finite(tensor: Pending, advice: str) -> Pending:
    """The same tensor, refused when it is made and holds NaN or infinity.

    Args:
        tensor: not made yet.
        advice: what the user can do, the end of the sentence.
    """

    def make() -> np.ndarray:
        array = tensor.make()
        if not all_finite(array):
            raise UserError(f"tensor {tensor.name} holds NaN or infinity; {advice}")
        return array

    return Pending(tensor.name, tensor.shape, tensor.dtype, make)


def _made(tensor: Pending) -> np.ndarray:
    array = np.ascontiguousarray(tensor.make())
    # A scalar comes out of ascontiguousarray with one axis; there is none among weights.
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(
            f"{tensor.name} came out as {array.dtype} {array.shape}, announced were "
            f"{tensor.dtype} {tensor.shape}"
        )
    return array
