"""A folder that appears whole: written under a temporary name beside its place, then moved there.

A process that dies leaves only a folder called `.NAME.*.partial`, never half of NAME; the next
export into the same place removes it. What is being written is locked, so that another export
running at the same time is noticed and not removed.

    with fresh_folder(Path('out'), existing='refuse') as folder:      # not there yet
        save_peft(folder, ...)
    # now out/ is there
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxalign.errors import UserError

NEW, OLD = "new", "old"
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


@contextmanager
def fresh_folder(target: Path, existing: str, keep: Sequence[Path] = ()) -> Iterator[Path]:
    """A path to write to, which takes the place of `target` when the block ends well.

    Args:
        target: where the result appears.
        existing: what becomes of a folder there that is not empty: refuse, or replace (as a
            whole, in one step).
        keep: folders that must not go with it, whatever is asked.

    Raises:
        UserError: `target` is a file, not empty, being written to, or cannot be written.
    """
    target = target.expanduser().resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        check_target(target, existing, keep)
        work = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        )
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work / NEW
        _settle(work / NEW)
        if target.exists():
            target.rename(work / OLD)
        (work / NEW).rename(target)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); nothing was changed there"
        ) from error
    finally:
        if (work / OLD).exists() and not target.exists():
            (work / OLD).rename(target)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def check_target(target: Path, existing: str, keep: Sequence[Path] = ()) -> None:
    """Refuses a place that must not be written to; cheap, for asking before the work begins.

    Raises:
        UserError: it is a file, holds something, or holds something that must stay.
    """
    target = target.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; choose another folder for --out")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if existing == "refuse":
        raise UserError(f"{target}: is not empty; choose another --out, or --force to replace it")
    for path in keep:
        if path.expanduser().resolve().is_relative_to(target):
            raise UserError(
                f"{target}: --force would remove {path.expanduser().resolve()} with it; choose "
                "another --out"
            )


def _clear(target: Path) -> None:
    """Removes what dead exports left, and puts back what one of them had moved away."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        handle = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{target}: another export is writing there; wait for it, or choose another --out"
            ) from error
        finally:
            os.close(handle)
        if (left / OLD).is_dir() and not target.exists():
            (left / OLD).rename(target)
        shutil.rmtree(left, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Ordinary permissions, and everything on disk before the folder gets its name."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
