"""A folder that appears whole: written under a temporary name next to its place, then moved there.

A process that dies leaves only a folder called `.NAME.*.partial`, never half of NAME; the next
save into the same place removes it. What is being written is locked, so that another process that
writes there is noticed and not removed. The last file is `SHA256SUMS`, by which every other one is
known again. Inside a folder that is being written nothing else needs to be whole: a second
`whole_folder` there is an ordinary folder.

    with whole_folder(Path('out'), existing='refuse') as folder:
        (folder / 'model.safetensors').write_bytes(...)
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

from jaxalign.checksums import SUMS, write_sums
from jaxalign.errors import UserError

NEW, OLD = "new", "old"
OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EEXIST,
}  # fmt: skip
# What this process is writing.
_OPEN: set[Path] = set()


@contextmanager
def whole_folder(
    target: Path,
    existing: str,
    *,
    markers: Sequence[str] = (),
    keep: Sequence[Path] = (),
    sealed: Sequence[str] = (".",),
) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of `target` when the block ends well.

    Args:
        target: where the result appears.
        existing: what becomes of a folder there that is not empty: refuse; replace (as a whole, in
            one step); update (replaced by a save of the same kind, but files that are not weights
            and were not written again are kept).
        markers: files by any of which an older save is known; a folder of something else is
            refused. None: whatever is there is replaced.
        keep: folders that must not go with it, whatever is asked.
        sealed: the parts of it, of which each gets a `SHA256SUMS`.

    Raises:
        UserError: `target` is a file, not empty, being written to, or cannot be written.
    """
    target = target.resolve()
    if any(target.is_relative_to(work) for work in _OPEN):
        target.mkdir(parents=True, exist_ok=True)
        yield target
        return
    with _disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        check_target(target, existing, keep, markers)
        work = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        )
        lock = os.open(work, os.O_RDONLY)
    try:
        with _disk(target):
            fcntl.flock(lock, fcntl.LOCK_EX)
            new = work / NEW
            new.mkdir()
            _OPEN.add(work)
            yield new
            if existing == "update" and target.is_dir():
                _take_over(target, new)
            for part in sealed:
                write_sums(new / part)
            _settle(new)
            if target.exists():
                target.rename(work / OLD)
            new.rename(target)
    finally:
        _OPEN.discard(work)
        if (work / OLD).exists() and not target.exists():
            (work / OLD).rename(target)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def check_target(
    target: Path, existing: str, keep: Sequence[Path] = (), markers: Sequence[str] = ()
) -> None:
    """Refuses a place that must not be written to; cheap, for asking before the work begins.

    Raises:
        UserError: it is a file, holds something, or holds something that must stay.
    """
    target = target.resolve()
    with _disk(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"{target}: is a file; choose another folder to write to")
        _check_writable(target)
        if not target.is_dir() or not any(target.iterdir()):
            return
        if existing == "refuse":
            raise UserError(
                f"{target}: is not empty; choose another --out, or --force to replace it"
            )
        if markers and not any((target / marker).is_file() for marker in markers):
            raise UserError(
                f"{target}: holds other files and no {' or '.join(markers)}; save into a new or "
                "empty folder"
            )
        for path in keep:
            if path.resolve().is_relative_to(target):
                raise UserError(
                    f"{target}: --force would remove {path.resolve()} with it; choose another --out"
                )


@contextmanager
def _disk(target: Path) -> Iterator[None]:
    """What the disk refuses, as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        about = str(error.filename or target)
        if not Path(about).absolute().is_relative_to(target.parent):
            raise UserError(f"{about}: cannot be read ({error.strerror})") from error
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); nothing was changed there"
        ) from error


def _check_writable(target: Path) -> None:
    """The nearest folder that is there must take new ones, as the result is moved into place."""
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _clear(target: Path) -> None:
    """Removes what dead processes left, and puts back what one of them had moved away."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        handle = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{target}: another process is writing there; wait for it, or choose another folder"
            ) from error
        finally:
            os.close(handle)
        if (left / OLD).is_dir() and not target.exists():
            (left / OLD).rename(target)
        shutil.rmtree(left, ignore_errors=True)


def _take_over(old: Path, new: Path) -> None:
    """Copies what is neither weights nor written again; links stay links."""
    for entry in old.iterdir():
        if ".safetensors" in entry.name or entry.name == SUMS or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def _settle(folder: Path) -> None:
    """Ordinary permissions, and everything on disk before the folder gets its name."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            continue
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
