"""Files of a Hugging Face folder: JSON in and out, and folders that appear whole or not at all.

config = read_json(folder / 'config.json')
with atomic_folder(Path('out'), marker='config.json') as folder: ...
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError, first_line

MAX_JSON = 256 << 20  # bytes: many times the largest index there is


@contextmanager
def reading(file: object) -> Iterator[None]:
    """The net under what reads a file: whatever a parser raises becomes one sentence.

    Raises:
        UserError: as it was raised inside, or naming the file and what went wrong.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{file}: cannot be read ({reason})") from error
    except Exception as error:
        raise UserError(
            f"{file}: damaged, or not what it should be ({first_line(error)}); download or copy "
            "it again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; UserError naming the file where there is none or it is broken."""
    with reading(file):
        try:
            if file.stat().st_size > MAX_JSON:
                raise UserError(f"{file}: is too large for such a file; download it again")
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{file}: no such file; is this a Hugging Face folder?") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: should hold a JSON object, found {type(content).__name__}")
    return content


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
