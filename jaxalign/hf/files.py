"""Folders of safetensors: found (locally or on the hub), indexed, read in part, written atomically.

Reading goes through our own header index and short-lived memory maps: any slice of any tensor, in
bfloat16 too, without torch and without the whole file becoming resident.

    folder = locate('meta-llama/Llama-3.2-1B')           # or a local folder, returned as it is
    folder = small_files('meta-llama/Llama-3.2-1B')      # for config and tokenizer alone
    index = open_index(folder, 'model')
    index['model.norm.weight'].shape, index['model.norm.weight'].dtype
    half = index['model.norm.weight'].view()[:1024]
    with atomic_folder(Path('out'), marker='config.json') as folder: ...
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxalign.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SMALL = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
_ALL = (*_SMALL, "*.safetensors")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype_name: str  # as safetensors spells it: F32, BF16, ...
    start: int  # bytes from the beginning of the file
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype."""
        return DTYPES[self.dtype_name]

    def view(self) -> np.ndarray:
        """The tensor as a read-only memory map; its pages leave memory when the array does."""
        return np.memmap(self.file, self.dtype, "r", offset=self.start, shape=self.shape)

    def sample(self, size: int = 256) -> bytes:
        """A few bytes from the beginning, the middle and the end."""
        parts = []
        with open(self.file, "rb") as file:
            for offset in (0, self.nbytes // 2, max(self.nbytes - size, 0)):
                file.seek(self.start + offset)
                parts.append(file.read(min(size, self.nbytes - offset)))
        return b"".join(parts)


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: `path` itself, or the snapshot of that hub name.

    Args:
        path: folder in Hugging Face layout, or a hub name such as `meta-llama/Llama-3.2-1B`.
        revision: hub branch, tag or commit; ignored for a folder.

    Raises:
        UserError: no such folder, and the hub cannot give it either.
    """
    return _found(path, revision, _ALL)


def small_files(path: str | Path, revision: str | None = None) -> Path:
    """As `locate`, for configuration and tokenizer: weights are there only where they lie already.

    Raises:
        UserError: as `locate`.
    """
    return _found(path, revision, _SMALL)


def _found(path: str | Path, revision: str | None, wanted: tuple[str, ...]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path}: is a file; give the folder that holds it")
    if not _HUB_NAME.fullmatch(str(path)) or str(path).startswith("."):
        raise UserError(f"{path}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(path), revision=revision, allow_patterns=list(wanted), ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError as error:
        raise UserError(
            f"{path}: this hub repository asks for consent; accept its terms on its page, then run "
            "`hf auth login`, or give a local folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{path}: neither a local folder nor a hub repository that can be read; check the "
            "spelling, or run `hf auth login` for a private one"
        ) from error
    except Exception as error:
        raise UserError(
            f"{path}: no local folder of that name, and the hub did not give it "
            f"({type(error).__name__}); without network, give the path of a downloaded folder"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; UserError naming the file where there is none or it is broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; is this a Hugging Face folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: should hold a JSON object, found {type(content).__name__}")
    return content


def open_index(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Every tensor of `stem.safetensors`, or of the shards that its `.index.json` names.

    Raises:
        UserError: no safetensors there, a shard is missing, or a file is cut short.
    """
    single, index_file = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
    if not index_file.is_file():
        raise _no_safetensors(folder, stem)
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index_file}: has no weight_map; download the file again")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard}: missing, though {index_file.name} names it")
        tensors |= _read_header(folder / shard)
    if lost := [name for name in weight_map if name not in tensors]:
        raise UserError(
            f"{folder / weight_map[lost[0]]}: {index_file.name} says that tensor {lost[0]} is in "
            "it, but it is not; download the folder again"
        )
    return tensors


def _no_safetensors(folder: Path, stem: str) -> UserError:
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        return UserError(
            f"{pickles[0]}: pickled .bin weights can run code and are not read; load the model "
            "once in PyTorch and save it again with save_pretrained(..., safe_serialization=True)"
        )
    return UserError(
        f"{folder}: holds neither {stem}.safetensors nor {stem}.safetensors.index.json"
    )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    # Layout: 8 bytes little-endian header length, the JSON header, then the tensors' bytes.
    size = path.stat().st_size
    broken = UserError(
        f"{path}: cut short or not a safetensors file ({size} bytes); download it again"
    )
    if size < 8:
        raise broken
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise broken
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(
                    path,
                    tuple(entry["shape"]),
                    entry["dtype"],
                    8 + length + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise broken from error
    for tensor in tensors.values():
        items = math.prod(tensor.shape)
        wrong = tensor.dtype_name in DTYPES and tensor.nbytes != items * tensor.dtype.itemsize
        if wrong or tensor.start + tensor.nbytes > size:
            raise broken
    return tensors


@contextmanager
def atomic_folder(folder: Path, marker: str) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block ends well.

    An interrupted save leaves the old folder, or none, never half of one. An older save of the same
    kind is replaced; its files that are not weights and were not written again are kept.

    Args:
        folder: where the result appears.
        marker: the file by which an older save of the same kind is known (`adapter_config.json`).

    Raises:
        UserError: `folder` is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; choose another folder to save into")
    old = list(folder.iterdir()) if folder.exists() else []
    if old and not (folder / marker).is_file():
        raise UserError(
            f"{folder}: holds other files and no {marker}; save into a new or empty folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        yield new
        for entry in old:
            if ".safetensors" not in entry.name and not (new / entry.name).exists():
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, new / entry.name)
        new.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        for file in new.iterdir():
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors, too, writes for its owner alone
            _flush(file)
        if folder.exists():
            replaced = new.with_suffix(".replaced")
            folder.rename(replaced)
            new.rename(folder)
            shutil.rmtree(replaced)
        else:
            new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def write_json(file: Path, content: dict[str, Any]) -> None:
    """`content` as indented JSON with a final newline."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(file: Path) -> None:
    if file.is_file():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
