"""Safetensors files, indexed and read in part.

Reading goes through our own header index and short-lived memory maps (or, of a bucket, requests for
ranges of bytes): any rows of any tensor, in bfloat16 too, without torch and without the whole file
becoming resident.

    index = open_index(folder, 'model')
    index['model.norm.weight'].shape, index['model.norm.weight'].dtype
    half = index['model.embed_tokens.weight'].rows(0, 1024)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxalign.bucket import BucketFile, left_in_bucket
from jaxalign.checksums import check_sums
from jaxalign.errors import UserError, reading
from jaxalign.hf.files import read_json
from jaxalign.hf.header import LENGTH, header_length, parse_header

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bits of infinity by the width of a number: a number whose bits, without the sign, are these or
# more is infinite or NaN.
_INFINITY = {
    np.dtype(np.float64): 0x7FF0 << 48,
    np.dtype(np.float32): 0x7F80 << 16,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
}


@dataclass(frozen=True)
class DiskFile:
    """A file of this machine, read as one of a bucket is."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        """Its bytes from `start` to before `stop`."""
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is."""

    name: str
    file: DiskFile | BucketFile
    shape: tuple[int, ...]
    dtype_name: str  # as safetensors spells it: F32, BF16, ...
    start: int  # bytes from the beginning of the file
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype.

        Raises:
            UserError: there is none of that kind.
        """
        if self.dtype_name not in DTYPES:
            raise UserError(
                f"{self.file}: tensor {self.name} is stored as {self.dtype_name}; supported: "
                f"{', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype_name]

    def view(self) -> np.ndarray:
        """The tensor as a read-only memory map; its pages leave memory when the array does.

        Of a bucket it is read whole.
        """
        return self._array(self.start, self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """As `view`, its first axis from `start` to before `stop`, and nothing else read."""
        each = math.prod(self.shape[1:])
        return self._array(
            self.start + start * each * self.dtype.itemsize, (stop - start, *self.shape[1:])
        )

    def _array(self, start: int, shape: tuple[int, ...]) -> np.ndarray:
        if isinstance(self.file, DiskFile):
            return np.memmap(self.file.path, self.dtype, "r", offset=start, shape=shape)
        content = self.file.read(start, start + math.prod(shape) * self.dtype.itemsize)
        return np.frombuffer(content, self.dtype).reshape(shape)

    def refuse_broken(self, part: np.ndarray) -> None:
        """Looks at numbers of this tensor that were read.

        Raises:
            UserError: they hold NaN or infinity, which no model works with.
        """
        if not all_finite(part):
            raise UserError(
                f"{self.file}: tensor {self.name} holds NaN or infinity; the file is damaged, or "
                "the training that wrote it diverged"
            )

    def sample(self, size: int = 256) -> bytes:
        """A few bytes from the beginning, the middle and the end."""
        parts = []
        for offset in (0, self.nbytes // 2, max(self.nbytes - size, 0)):
            start = self.start + offset
            parts.append(self.file.read(start, start + min(size, self.nbytes - offset)))
        return b"".join(parts)


def all_finite(array: np.ndarray) -> bool:
    """Whether an array of one of `DTYPES` holds neither NaN nor infinity.

    Read as whole numbers the bits of a float grow with its size, so two maxima tell, without an
    array in between: of signed numbers the largest positive float, of unsigned ones the largest
    negative float.
    """
    if not array.size:
        return True
    bits, width = _INFINITY[array.dtype], 8 * array.dtype.itemsize
    return bool(
        array.view(f"i{width // 8}").max() < bits
        and array.view(f"u{width // 8}").max() < bits + (1 << width - 1)
    )


def weights_in(folder: Path) -> dict[str, DiskFile | BucketFile]:
    """By name, the files of weights that belong to this folder, be they in it or in its bucket."""
    here = (file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    found = {file.name: DiskFile(file) for file in sorted(here) if file.is_file()}
    return dict(left_in_bucket(folder)) | found


def open_index(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Every tensor of `stem.safetensors`, or of the shards that its `.index.json` names.

    Raises:
        UserError: no safetensors there, a shard is missing, or a file is cut short or damaged.
    """
    files = weights_in(folder)
    single, index_file = f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single in files:
        return _read_header(files[single])
    if not index_file.is_file():
        raise _no_safetensors(folder, stem, files)
    check_sums(folder, [index_file.name])
    weight_map = read_weight_map(index_file)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if shard not in files:
            raise UserError(f"{folder / shard}: missing, though {index_file.name} names it")
        for name, tensor in _read_header(files[shard]).items():
            if weight_map.get(name, shard) != shard:
                continue  # of two copies the index says which one counts
            if name in tensors:
                raise UserError(
                    f"{folder / shard}: tensor {name} is in {tensors[name].file}, too, and "
                    f"{index_file.name} does not say which one counts; download the folder again"
                )
            tensors[name] = tensor
    if lost := [name for name in weight_map if name not in tensors]:
        raise UserError(
            f"{folder / weight_map[lost[0]]}: {index_file.name} says that tensor {lost[0]} is in "
            "it, but it is not; download the folder again"
        )
    return tensors


def check_content(index: Mapping[str, StoredTensor], part: int = 0, parts: int = 1) -> None:
    """Compares the files of an index with the hashes that their folder has of them.

    Args:
        index: from `open_index`.
        part: which share of the files this process looks at.
        parts: how many processes there are.

    Raises:
        UserError: a byte of one is not what was written.
    """
    paths = {one.file.path for one in index.values() if isinstance(one.file, DiskFile)}
    for folder in {path.parent for path in paths}:
        names = sorted(path.name for path in paths if path.parent == folder)
        check_sums(folder, names[part::parts])


def read_weight_map(index_file: Path) -> dict[str, str]:
    """Tensor -> file, as an `.index.json` has it.

    Raises:
        UserError: not such a file, or it names files elsewhere.
    """
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_file}: has no weight_map; download the file again")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard != ""
        if not plain:
            raise UserError(
                f"{index_file}: tensor {name[:80]!r} should be in a file of this folder, not in "
                f"{str(shard)[:80]!r}; download the folder again"
            )
    return weight_map


def _no_safetensors(
    folder: Path, stem: str, files: Mapping[str, DiskFile | BucketFile]
) -> UserError:
    if pickles := [file for name, file in files.items() if name.endswith(".bin")]:
        return UserError(
            f"{pickles[0]}: pickled .bin weights can run code and are not read; load the model "
            "once in PyTorch and save it again with save_pretrained(..., safe_serialization=True)"
        )
    return UserError(
        f"{folder}: holds neither {stem}.safetensors nor {stem}.safetensors.index.json"
    )


def _read_header(file: DiskFile | BucketFile) -> dict[str, StoredTensor]:
    with reading(str(file), "safetensors"):
        size = file.size
        try:
            length = header_length(file.read(0, min(LENGTH, size)), size)
            begin = LENGTH + length
            entries = parse_header(file.read(LENGTH, begin), size - begin)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"{file}: cut short or not a safetensors file ({error}; {size} bytes in all); "
                "download or copy it again"
            ) from error
    return {
        name: StoredTensor(
            name, file, one.shape, one.dtype, begin + one.start, one.stop - one.start
        )
        for name, one in entries.items()
    }
