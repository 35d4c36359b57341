"""A device that ran out of memory, in two sentences and a profile of what filled it.

with telling_memory('runs/demo'):
    state, metrics = run.step(...)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from jaxalign.errors import UserError
from jaxalign.multihost import is_main

FULL = "RESOURCE_EXHAUSTED"


@contextmanager
def telling_memory(folder: str | Path) -> Iterator[None]:
    """Turns XLA's message into one that says what to do.

    `folder/memory.prof`, for `pprof`, holds what was in memory (of process 0), where JAX knows it.

    Raises:
      UserError: a device is out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
        kept = _save(Path(folder, "memory.prof"))
        raise UserError(
            f"out of device memory{_devices()}{_wanted(str(error))}: try a smaller batch.size with "
            "more batch.accumulate, model.remat=full, more devices on mesh.fsdp, or "
            "model.quantize=int8. `jaxalign plan CONFIG --topology v5e:4x4` reports what fits "
            f"before a run{kept}"
        ) from error


def _save(path: Path) -> str:
    if not is_main():
        return ""
    # Where memory is exhausted the profile may fail; the sentence stays.
    with contextlib.suppress(Exception):
        path.parent.mkdir(parents=True, exist_ok=True)
        jax.profiler.save_device_memory_profile(path)
        return f"; the contents of the memory: {path}"
    return ""


def _devices() -> str:
    """` (4 x TPU v5 lite, 15.7 GiB each)`, as far as the devices report it."""
    devices = jax.local_devices()
    with contextlib.suppress(Exception):
        limit = (devices[0].memory_stats() or {})["bytes_limit"]
        return f" ({len(devices)} x {devices[0].device_kind}, {limit / 2**30:.1f} GiB each)"
    return f" ({len(devices)} x {devices[0].device_kind})"


def _wanted(text: str) -> str:
    """What XLA could not get, in its own words."""
    found = re.search(
        r"(?:allocat\w*|Used|requires?)\s+([\d.]+\s?(?:[KMGT]i?B?|bytes?))\b", text, re.I
    )
    return f", {found[1]} were requested" if found else ""
