"""Content hashes of what is saved, checked when it is loaded again.

A disk, a copy or a memory module can change a bit without an error. A folder that is written whole
(an adapter, an exported model) gets a file `SHA256SUMS` in the format of coreutils, so that
`sha256sum -c SHA256SUMS` checks it without this package.

    write_sums(folder)                       # after the last file is written
    check_sums(folder, ["adapter_model.safetensors"])     # UserError if a byte has changed

A JSON record carries its hash inside: `seal(record)`, `seal_holds(record)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError, reading

SUMS = "SHA256SUMS"
_READERS = 4  # files hashed side by side
# Digests of this process by path, inode, size and time; of files that nobody has just written.
_KNOWN: dict[tuple[Path, int, int, int], str] = {}
_SETTLED = 2e9  # nanoseconds; clocks of file systems tick slowly


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file is streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_sums(folder: Path, names: Sequence[str] | None = None) -> None:
    """Writes `SHA256SUMS`; call it as the last step of a writer.

    Links are left out: what they lead to is not of this folder.

    Args:
      folder: where it is written, whole or not at all.
      names: the files that are listed; None: every file below `folder`.
    """
    files = [folder / name for name in names or ()]
    if names is None:
        below = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [path for path in below if path.name != SUMS and not path.is_symlink()]
    lines = [
        f"{digest}  {path.relative_to(folder).as_posix()}\n"
        for path, digest in zip(files, file_digests(files), strict=True)
    ]
    new = folder / f"{SUMS}.new"
    new.write_text("".join(lines), "utf-8")
    new.replace(folder / SUMS)


@contextlib.contextmanager
def summed(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Within, these files of a folder that is never whole are written; then they are listed.

    The old list goes first, so that a writer that dies leaves files without a hash, never files
    with the hash of others.
    """
    (folder / SUMS).unlink(missing_ok=True)
    yield
    write_sums(folder, names)


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 as recorded; empty where the folder has no `SHA256SUMS`.

    Raises:
      UserError: the list itself is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if gap not in ("  ", " *") or not name or set(digest) - set("0123456789abcdef"):
            raise UserError(f"{path}:{number}: damaged; copy the folder again, or remove this list")
        found[name] = digest
    return found


def check_sums(folder: Path, names: Sequence[str] | None = None) -> None:
    """Compares files with the recorded hashes; files without a recorded hash pass.

    Args:
      folder: where `SHA256SUMS` may be.
      names: the files that are about to be read; None: every recorded file.

    Raises:
      UserError: a file is missing or its content has changed.
    """
    recorded = read_sums(folder)
    names = [name for name in (recorded if names is None else names) if name in recorded]
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing, though {SUMS} lists it; copy the folder again"
            )
    for name, digest in zip(names, file_digests(folder / name for name in names), strict=True):
        if digest != recorded[name]:
            raise UserError(
                f"{folder / name}: the content is not what was written ({SUMS}); copy or export it "
                f"again, or remove {SUMS} if you changed the file on purpose"
            )


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of its own content (keys sorted) under `sha256`."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return rest | {"sha256": text_digest(json.dumps(rest, sort_keys=True))}


def seal_holds(content: Mapping[str, Any]) -> bool:
    """Whether a sealed object is as it was written; one without a seal never is."""
    return content.get("sha256") == seal(content)["sha256"]


def read_sealed(file: Path) -> dict[str, Any]:
    """The sealed JSON object of a file; {} where it is not there, or not as it was written."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and seal_holds(found) else {}


def file_digests(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of each file, in their order; one that a command asks for again is hashed once.

    Raises:
      UserError: a file that cannot be read.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(_digest_once, paths))


def _digest_once(path: Path) -> str:
    """The digest; a file that one command reads several times is hashed once."""
    with reading(str(path), "a file"):
        stat = path.stat()
        key = (path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key in _KNOWN:
            return _KNOWN[key]
        digest = file_digest(path)
    if time.time_ns() - stat.st_mtime_ns > _SETTLED:
        _KNOWN[key] = digest
    return digest
