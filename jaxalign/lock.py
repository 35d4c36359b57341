"""One run at a time in a folder: two would overwrite each other's checkpoints.

    with only_run('runs/demo'):      # UserError where another process is at work there
        ...
    with held('work/part_3.lock') as mine:   # False where another process holds it
        ...

The lock is the kernel's (flock), so that it ends with the process, however that dies. On file
systems without such locks, and in buckets, nothing is protected.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxalign.errors import UserError

FILE = ".lock"
# What file systems without locks answer.
WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds a lock file, which is made with its folder.

    Args:
      wait: until the process that holds it lets it go, or has died.

    Yields:
      Whether this process holds it; always true where the file system has no locks.

    Raises:
      OSError: the file cannot be written or locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _locked(file, wait)
    finally:
        os.close(file)


def _locked(file: int, wait: bool = False) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
    return True


@contextmanager
def only_run(folder: str | Path) -> Iterator[None]:
    """Makes the folder and holds its lock.

    Raises:
      UserError: another process holds it, or nothing can be written there.
    """
    path = Path(folder, FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"output: {folder} is a file, or is below one; name a folder") from error
    except OSError as error:
        raise UserError(
            f"output: {folder} cannot be written ({error.strerror}); name a folder in which this "
            "user may write"
        ) from error
    try:
        try:
            free = _locked(file)
        except OSError as error:
            raise UserError(f"output: {path} cannot be locked ({error.strerror})") from error
        if not free:
            raise UserError(
                f"output: {folder} is in use by {_holder(file)}; wait until it has ended, stop it, "
                "or choose another output"
            )
        holder = {"process": os.getpid(), "host": socket.gethostname()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(file)


def _holder(file: int) -> str:
    try:
        said = json.loads(os.pread(file, 4096, 0))
        return f"process {int(said['process'])} on {said['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
