"""Folders in Google Cloud Storage (`gs://bucket/folder`), read as folders of this machine are.

What is small is copied into a temporary folder; weights stay in the bucket, and this module knows
of each copy which they are. A request brings one range of bytes, so a host of many fetches no more
than its share. An adapter or model comes with the record of its run, so that a copy reads as the
run's own folder does.

    folder = copied('gs://bucket/llama')        # config.json, tokenizer.json, ...; once a process
    left_in_bucket(folder)['model.safetensors'].read(0, 8)
    origin(folder)                              # 'gs://bucket/llama'
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import UserError, first_line, missing_extra
from jaxalign.paths import CHECKPOINTS, HANDED_OVER, RECORD, SETTINGS

# Of a model or an adapter, all but the weights.
SMALL = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "SHA256SUMS")
_CHUNK = 32 << 20  # bytes of one request; requests of a range run side by side


@dataclass(frozen=True)
class BucketFile:
    """An object that stays where it is."""

    address: str
    size: int  # bytes

    @property
    def name(self) -> str:
        """Within its folder."""
        return self.address.rpartition("/")[2]

    def __str__(self) -> str:
        return self.address

    def read(self, start: int, stop: int) -> bytes:
        """Its bytes from `start` to before `stop`.

        Raises:
          UserError: the bucket does not give them.
        """
        starts = list(range(start, stop, _CHUNK))
        stops = [min(one + _CHUNK, stop) for one in starts]
        try:
            parts = _storage().cat_ranges(
                [self.address] * len(starts), starts, stops, on_error="raise"
            )
        except Exception as error:  # the client has many of its own
            raise UserError(f"{self.address}: cannot be read ({first_line(error)})") from error
        content = b"".join(parts) if len(parts) != 1 else parts[0]
        if len(content) != stop - start:
            raise UserError(
                f"{self.address}: {len(content)} bytes arrived instead of {stop - start}; has the "
                "file been replaced? Start again"
            )
        return content


class Copy(NamedTuple):
    """Where a folder of this machine was copied from, and by name the files left there."""

    address: str
    left: Mapping[str, BucketFile]


# Copies of this process. Not noted in the folder itself, where others could have written it.
_COPIES: dict[Path, Copy] = {}


@cache
def copied(address: str) -> Path:
    """A temporary folder with the small files of a folder in a bucket; it goes with the process.

    Args:
      address: gs://BUCKET/FOLDER; its weights are left there, see `left_in_bucket`.

    Raises:
      UserError: another kind of address, no such folder, or none that can be read.
    """
    if not address.startswith("gs://"):
        raise UserError(
            f"{address}: addresses of this kind are not read; give a folder, a hub name, or "
            "gs://BUCKET/FOLDER of Google Cloud Storage"
        )
    address = address.rstrip("/")
    entries = _files(_listed(address))
    if not entries:
        raise UserError(f"{address}: holds no files; name the folder that holds config.json")
    home = Path(tempfile.mkdtemp(prefix="jaxalign-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    run, _, name = address.rpartition("/")
    folder = home / name
    folder.mkdir()
    left = {}
    for file in entries:
        if any(fnmatch(file.name, pattern) for pattern in SMALL):
            (folder / file.name).write_bytes(file.read(0, file.size))
        else:
            left[file.name] = file
    if name in HANDED_OVER:
        _copy_record(run, home)
    _COPIES[folder] = Copy(address, left)
    return folder


def left_in_bucket(folder: Path) -> Mapping[str, BucketFile]:
    """By name, the files that the folder of this copy has in its bucket; of others none."""
    return _COPIES[folder].left if folder in _COPIES else {}


def origin(folder: Path) -> str:
    """The address that a folder was copied from; the folder itself where it is no copy."""
    return _COPIES[folder].address if folder in _COPIES else str(folder)


def _copy_record(run: str, home: Path) -> None:
    """Copies the settings and the result of a run; its checkpoints become an empty folder."""
    listed = _listed(run)
    for file in _files(listed):
        if file.name in (SETTINGS, RECORD):
            (home / file.name).write_bytes(file.read(0, file.size))
    if any(Path(one["name"]).name == CHECKPOINTS for one in listed if one["type"] != "file"):
        (home / CHECKPOINTS).mkdir()


def _files(listed: list[dict[str, Any]]) -> list[BucketFile]:
    files = (one for one in listed if one["type"] == "file")
    return [BucketFile(f"gs://{one['name']}", one["size"]) for one in files]


def _listed(address: str) -> list[dict[str, Any]]:
    try:
        return _storage().ls(address, detail=True)
    except Exception as error:
        raise UserError(
            f"{address}: cannot be read ({first_line(error)}); see that the folder exists and that "
            "this machine may read it (gcloud auth application-default login)"
        ) from error


@cache
def _storage() -> Any:
    try:
        import gcsfs
    except ImportError as error:
        raise missing_extra("gcsfs", "gcs") from error
    return gcsfs.GCSFileSystem(use_listings_cache=False)
