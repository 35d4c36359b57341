"""The output of a run: a folder of this machine, or a bucket (`gs://bucket/run`).

An object in a bucket can neither be appended to nor renamed. So what a run writes next to its
checkpoints (settings, log, adapter, traces) goes into a folder of this machine and is copied to the
bucket with every checkpoint and at the end; Orbax writes the checkpoints there by itself.

    with Desk('gs://bucket/run') as desk:        # of 'runs/demo' the folder is runs/demo itself
        (desk.folder / 'config.yaml').write_text('...')
        desk.publish()
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxalign.errors import UserError, first_line, missing_extra
from jaxalign.lock import only_run
from jaxalign.multihost import is_main, text_from_main
from jaxalign.terminal import complain

SETTINGS = "config.yaml"  # of a run
CHECKPOINTS = "checkpoints"  # its folder of them
HANDED_OVER = ("adapter", "model")  # its folders for others
RECORD = "result.json"  # of a run that is over
# Whoever reads a folder looks for one of these first, so they come when the rest is there.
LAST = (
    "adapter_config.json",
    "config.json",
    "model.safetensors.index.json",
    RECORD,
)
CHUNK = 16 << 20  # bytes
LONGEST = 200  # bytes of a file's name, which may get an ending; file systems take 255


def is_remote(path: str | Path) -> bool:
    """Whether this is an address such as gs://bucket/run and no path of this machine."""
    return "://" in str(path)


def unfinished(folder: Path, shown: str) -> str:
    """A sentence where these weights are of a run that was continued and is not finished; else ''.

    Args:
      folder: what a run hands over; other folders say nothing.
      shown: what the folder is called; of a copy, where it was copied from.
    """
    run = folder.parent
    handed_over = folder.name in HANDED_OVER and folder.is_dir()
    started = (run / SETTINGS).is_file() and (run / CHECKPOINTS).is_dir()
    if not handed_over or not started or (run / RECORD).exists():
        return ""
    output = os.path.dirname(shown)
    return (
        f"note: the run in {output} is not finished, so {shown} may be older than its checkpoints; "
        f"`jaxalign export {output} --step latest` writes the newest weights"
    )


def check_local(path: str, key: str) -> str:
    """The path again.

    Raises:
      UserError: it is an address; `key` is what names it.
    """
    if is_remote(path):
        raise UserError(
            f"{key}: {path} is in the cloud, where only `jaxalign train` writes; name a folder of "
            "this machine"
        )
    return path


def check_writable(folder: Path, key: str) -> None:
    """Makes the folder, if it is not there, and tries to write into it.

    Raises:
      UserError: it is a file, or nothing can be written there; `key` is what names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        what = "is a file" if os.path.isfile(folder) else first_line(error)
        raise UserError(
            f"{key}: {folder} cannot be written ({what}); name another folder"
        ) from error


def check_file(path: Path, key: str) -> None:
    """Makes the folder of a file that is to be written, and sees that the file can be.

    Raises:
      UserError: it is a folder or a device, its name is too long, or its folder cannot be written.
    """
    if os.path.isdir(path):
        raise UserError(f"{key}: {path} is a folder; name a file in it")
    # A device would be replaced by a file of its name.
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{key}: {path} is a device or a broken link; name a plain file")
    if len(os.fsencode(path.name)) > LONGEST:
        raise UserError(f"{key}: the name of this file has more than {LONGEST} bytes; shorten it")
    check_writable(path.parent, key)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when the block ends well.

    A process that dies leaves the old file, or none, never half of one.

    Raises:
      UserError: as `check_file`; a device is never replaced.
    """
    check_file(path, "output")
    path = path.resolve()  # a link stays one
    new = path.with_name(f"{path.stem}.new{path.suffix}")
    yield new
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


class Desk:
    """Where a run writes its files, and how they get to its output.

    Attributes:
      output: as it was given.
      folder: of this machine; the output itself, or for a bucket a temporary one.
    """

    def __init__(self, output: str) -> None:
        """Opens the output; a bucket is tried with a small object, before anything is trained.

        Raises:
          UserError: not a bucket that this can write to, or a package is missing.
        """
        self.output = output.rstrip("/")
        self._remote = _open(self.output) if is_remote(output) else None
        self._sent: dict[Path, tuple[int, int]] = {}
        self._lock = contextlib.ExitStack()
        self.folder = Path(output)
        if self._remote is not None:
            self.folder = Path(tempfile.mkdtemp(prefix="jaxalign-"))
            log = self.folder / "log.jsonl"  # a resumed run writes on
            with contextlib.suppress(FileNotFoundError):
                log.write_bytes((self._remote / log.name).read_bytes())
                self._sent[log] = _stamp(log)  # only the process that changes it sends it back

    def __enter__(self) -> Desk:
        """Takes the folder for this run; in a bucket nothing says that another run is at work.

        Raises:
          UserError: another process is at work there, or this one may not write.
        """
        refused = ""
        if self._remote is None and is_main():
            try:
                self._lock.enter_context(only_run(self.folder))
            except UserError as error:
                refused = str(error)
        if refused := text_from_main(refused):
            raise UserError(refused)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Copies what is left; the copy of this machine goes once all is in the bucket."""
        with self._lock:
            if error is None:
                self._send()
            elif not self.publish():
                return
            if self._remote is not None:
                shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, name: str) -> bytes | None:
        """A file of the output, or None."""
        file = (self.folder if self._remote is None else self._remote) / name
        try:
            return file.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def remove(self, name: str) -> None:
        """Takes a file away, here and in the bucket."""
        (self.folder / name).unlink(missing_ok=True)
        if self._remote is not None:
            (self._remote / name).unlink(missing_ok=True)

    def publish(self) -> bool:
        """Copies what is new; if the bucket does not answer, says so and tries again next time."""
        try:
            self._send()
        except UserError as error:
            complain(error)
            return False
        return True

    def _send(self) -> None:
        if self._remote is None:
            return
        files = (file for file in self.folder.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: (file.name in LAST, file)):
            stamp = _stamp(file)
            if self._sent.get(file) == stamp:
                continue
            try:
                _put(file, self._remote / file.relative_to(self.folder).as_posix())
            except Exception as error:  # each backend has errors of its own
                raise UserError(
                    f"{self.output}: {file.name} could not be written ({first_line(error)}); it "
                    f"is in {self.folder} on this machine, `gcloud storage cp -r` copies it"
                ) from error
            self._sent[file] = stamp


def _open(output: str) -> Any:
    scheme, _, rest = output.partition("://")
    if scheme != "gs":
        raise UserError(
            f"output: {output} is unknown here; name a folder, or gs://BUCKET/FOLDER of Google "
            "Cloud Storage (other buckets can be mounted as folders)"
        )
    if not rest.partition("/")[2]:
        raise UserError(f"output: {output} names no folder in the bucket; write {output}/NAME")
    # epath reads and writes by TensorFlow where it is installed, else by gcsfs.
    if not any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")):
        raise missing_extra("gcsfs", "gcs")
    from etils import epath

    folder = epath.Path(output)
    try:
        trial = folder / f".jaxalign-{uuid.uuid4()}"  # every process of a run has its own
        trial.write_text("This folder is written by jaxalign train.\n")
        trial.unlink()
    except Exception as error:
        raise UserError(
            f"output: {output} cannot be written ({first_line(error)}); see that the bucket "
            "exists and that this machine may write to it (gcloud auth application-default login)"
        ) from error
    return folder


def _put(file: Path, target: Any) -> None:
    with file.open("rb") as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, CHUNK)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size
