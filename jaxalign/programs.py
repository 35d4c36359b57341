"""Compiled programs kept on disk, so that the second start of a run compiles nothing.

JAX's own cache does the work and its own variables rule it: JAX_ENABLE_COMPILATION_CACHE=false
turns it off, JAX_COMPILATION_CACHE_DIR names another folder (of a bucket, too).

    keep_programs()                  # before the first computation
    begin()                          # the same, after this process has found the others of its run
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxalign import multihost
from jaxalign.errors import UserError, first_line

LIMIT = 8 << 30  # bytes; what was not used for longest goes first
# Not on a CPU: XLA keeps code for this machine, which on another kind with the same home folder
# may end in an illegal instruction; and on many machines it takes what it wrote itself for such
# code: an error on the screen for each program (JAX 0.10).
PLATFORMS = ("tpu", "gpu")


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/jaxalign/xla`, or the same under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jaxalign", "xla")


def begin() -> None:
    """Joins the other processes of the run, then keeps programs: how a computing command starts.

    Raises:
      UserError: as of `multihost.start`; JAX can use no device.
    """
    import jax

    multihost.start()
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"JAX cannot use any device here ({first_line(error)}); check whether other "
            "processes hold its memory (nvidia-smi shows them; XLA_PYTHON_CLIENT_MEM_FRACTION=0.3 "
            "leaves them some), or compute on the CPU with JAX_PLATFORMS=cpu"
        ) from error
    keep_programs()


def keep_programs() -> Path | None:
    """Turns JAX's cache on disk on, on TPUs and GPUs; its folder, or None where nothing changed.

    Programs that took a second or more are kept (JAX's default). Where JAX already has a folder
    this changes nothing; neither in a run of several processes: only the first of them writes, so
    a folder that the others do not see would leave them compiling alone, and on GPUs compilers that
    share their autotuning would wait for a process that has loaded its program instead. There
    JAX_COMPILATION_CACHE_DIR must name a folder that all see.
    """
    import jax

    known = jax.config.values  # as attributes they are unknown to type checkers
    if known["jax_compilation_cache_dir"] or not known["jax_enable_compilation_cache"]:
        return None
    if jax.default_backend() not in PLATFORMS or jax.process_count() > 1:
        return None
    try:
        folder = default_folder()
        # Programs from this folder are run: nobody else may write into it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return None
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ and _can_lock():
        jax.config.update("jax_compilation_cache_max_size", LIMIT)
    return folder


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Within, a program that this process compiled once is not compiled again by a later run.

    On TPUs and GPUs the folder of `keep_programs` does it. On a CPU it is a folder that goes with
    the process: what XLA keeps for this machine is not found on another one.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    known = jax.config.values
    if known["jax_compilation_cache_dir"] or not known["jax_enable_compilation_cache"]:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="jaxalign_programs_") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # it looked for a folder before
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()


def _can_lock() -> bool:
    # JAX can only limit the folder where this package is there; huggingface_hub brings it.
    try:
        import filelock  # noqa: F401
    except ImportError:
        return False
    return True
