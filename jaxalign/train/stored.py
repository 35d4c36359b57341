"""Checkpoints on disk or in a bucket: where they are, and whether what is read was written so.

for place in local_places('runs/demo'):          # the furthest first
    meta = read_meta(place)                      # Damaged: it is not what was written
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from jaxalign.checksums import seal_holds
from jaxalign.errors import UserError
from jaxalign.multihost import is_main, text_from_main
from jaxalign.paths import CHECKPOINTS

NEWEST, BEST = CHECKPOINTS, "best"  # folders of a run; in each a folder a step
DAMAGED = "damaged"  # where what cannot be trusted is kept
# What storage and devices say where nothing is wrong with the files; the names are those of gRPC.
NOT_DAMAGE = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "UNAUTHENTICATED",
    "DEADLINE_EXCEEDED",
    "Permission denied",
    "Too many open files",
)


class Damaged(Exception):
    """What is stored is not what was written; the text says in what way."""


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is."""

    run: str
    kind: str  # NEWEST | BEST
    step: int

    @property
    def name(self) -> str:
        """As a reader finds it: `best/200`."""
        return f"{self.kind}/{self.step}"

    @property
    def folder(self) -> Any:
        """The step's folder, local or in the cloud."""
        return root_of(self.run) / self.kind / str(self.step)


def root_of(output: str | Path) -> Any:
    """A run's folder as Orbax wants it: absolute, unless it is in the cloud."""
    text = str(output)
    return epath.Path(text if "://" in text else str(Path(text).absolute()))


def places(output: str | Path) -> list[Place]:
    """As `local_places`; every process calls it and gets the first one's list."""
    found = [(place.kind, place.step) for place in local_places(output)] if is_main() else []
    return [Place(str(output), *one) for one in json.loads(text_from_main(json.dumps(found)))]


def local_places(output: str | Path) -> list[Place]:
    """All complete checkpoints of a run as this process sees them, the furthest first.

    Of one step the best one comes first: it was saved after the validation.
    """
    root = root_of(output)
    found = [Place(str(output), kind, n) for kind in (NEWEST, BEST) for n in _steps(root / kind)]
    return sorted(found, key=lambda place: (-place.step, place.kind != BEST))


def read_meta(place: Place) -> dict[str, Any]:
    """What was saved with the arrays: step, base, model, configuration, progress, sums.

    Raises:
      Damaged: it is not what was written.
    """
    with reading():
        meta = dict(ocp.JsonCheckpointHandler().restore(place.folder / "meta"))
        if ("sums" in meta or "sha256" in meta) and not seal_holds(meta):
            raise Damaged("meta is not what was written")
        if "base" not in meta or int(meta["step"]) != place.step:
            raise Damaged("meta is not that of a checkpoint of this step")
        return meta


@contextlib.contextmanager
def reading() -> Any:
    """Turns what storage raises where a file is missing, cut short or not its own into `Damaged`.

    Raises:
      Damaged: as said.
      UserError: the files may be whole, but cannot be read now.
    """
    _hush()
    try:
        yield
    except (Damaged, UserError, MemoryError):
        raise
    except Exception as error:  # Orbax, TensorStore and each file system have their own
        reason = reason_of(error)[:80]
        if isinstance(error, PermissionError) or any(w in str(error) for w in NOT_DAMAGE):
            raise UserError(f"a checkpoint cannot be read now ({reason})") from error
        raise Damaged(reason) from error


@functools.cache
def _hush() -> None:
    """What other reads of a damaged checkpoint say, after the first has failed and was reported.

    TensorStore's threads find Orbax's event loop closed, and asyncio reports results that nobody
    asked for any more.
    """
    before = sys.unraisablehook

    def tell(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            before(what)

    sys.unraisablehook = tell
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )


def move(folder: Any, target: Any) -> None:
    """A rename; in a bucket, where objects cannot be renamed, a copy of each."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if "://" not in str(folder):
        folder.rename(target)
        return
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            move(path, target / path.name)
        else:
            path.copy(target / path.name, overwrite=True)
    folder.rmtree()


def _steps(folder: Any) -> list[int]:
    """Steps whose folder was finished; in the cloud a last object says so, elsewhere the name."""
    if not folder.is_dir():
        return []
    paths: Any = folder.iterdir()
    if "://" in str(folder):
        paths = ocp.utils.checkpoint_steps_paths(folder)
    return [int(path.name) for path in paths if path.name.isdigit()]


def reason_of(error: BaseException) -> str:
    """The first line of what another library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
