"""Several processes, one run: start together, wait together, let one of them speak.

start()                       # joins jax.distributed where the environment names a cluster
if is_main(): print(...)
barrier('saved')

Where one process dies, JAX ends the others: at once where their connection to the first one breaks,
else when its heartbeats have been missing for `JAXALIGN_HEARTBEAT_SECONDS` (100).
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.errors import UserError

# Any of these, other than 1, means that a launcher has started several processes and JAX can find
# the others: its own variable, SLURM's and Open MPI's ranks, the slices of a TPU.
CLUSTER = (
    "JAX_COORDINATOR_ADDRESS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "MEGASCALE_NUM_SLICES",
)
# Where GKE and hosted notebooks list the hosts of a TPU slice, in the order in which JAX looks.
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")

HEARTBEAT = "JAXALIGN_HEARTBEAT_SECONDS"
GOES_ON = "the same command on every host goes on from the last checkpoint"
ABORTED = (
    "jaxalign: this process was aborted, as a rule because another process of this run ended or "
    f"could not be reached (its output says why); {GOES_ON}"
)
# What collectives say when the process at the other end is gone: Gloo's, NCCL's, gRPC's words.
GONE = re.compile(
    r"(?i)(gloo|nccl|coordination|collective|barrier).*(connection (closed|reset)|broken pipe|"
    r"remote|timed? ?out|heartbeat|unavailable|socket closed|aborted)",
    re.DOTALL,
)
LOST = 75  # exit code, EX_TEMPFAIL: worth another try
_speakers: list[subprocess.Popen] = []


def in_cluster(environment: Mapping[str, str], platforms: str | None) -> bool:
    """Whether this process is, or may be, one of several.

    On a Cloud TPU VM the environment says nothing: the hosts are listed in the machine's metadata,
    which JAX asks. `jax.distributed.initialize` belongs into every program there and does no harm
    on a single host (JAX docs, "Introduction to multi-controller JAX").

    Args:
      environment: variables, as in `os.environ`, after JAX was imported.
      platforms: `jax.config.jax_platforms`. Where JAX finds TPU chips it sets it to `tpu,cpu`;
        `TPU_SKIP_MDS_QUERY` says that there is no metadata to ask.
    """
    if any(environment.get(name, "1") != "1" for name in CLUSTER):
        return True
    for name in TPU_HOSTS:
        if environment.get(name):
            return "," in environment[name]
    return "tpu" in (platforms or "") and "TPU_SKIP_MDS_QUERY" not in environment


def without_chips(environment: Mapping[str, str], platforms: str | None) -> bool:
    """Whether JAX would ask libtpu for chips on a machine that has none.

    libtpu answers that with six lines of warnings, which say nothing that JAX does not know.

    Args:
      environment: variables, as in `os.environ`, after JAX was imported: where it finds no chip it
        sets `TPU_SKIP_MDS_QUERY`.
      platforms: `jax.config.jax_platforms`; None: the user did not choose, and no chip was found.
    """
    if platforms is not None or environment.get("TPU_SKIP_MDS_QUERY") != "1":
        return False
    from importlib.metadata import entry_points

    # Other accelerators come as plugins, which JAX finds in these two ways; it should ask them.
    plugins = entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins")
    return bool(importlib.util.find_spec("libtpu")) and not plugins


def settle_platform() -> None:
    """Leaves the CPU alone where nothing else is; call before any other use of JAX."""
    import jax

    if without_chips(os.environ, getattr(jax.config, "jax_platforms", None)):
        jax.config.update("jax_platforms", "cpu")


def start() -> None:
    """Joins the cluster that the environment names, if any; call before any other use of JAX.

    `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name one by
    hand; on SLURM, Open MPI and TPU slices JAX finds the rest by itself.

    Raises:
      UserError: the others did not answer, or the heartbeat is not a number of seconds.
    """
    import jax

    settle_platform()
    platforms = getattr(jax.config, "jax_platforms", None)  # unknown to type checkers
    if not in_cluster(os.environ, platforms) or jax.distributed.is_initialized():
        return
    number, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    patience = _heartbeat(os.environ.get(HEARTBEAT) or "100")
    try:
        jax.distributed.initialize(
            num_processes=int(number) if number else None,
            process_id=int(index) if index else None,
            heartbeat_timeout_seconds=patience,
            # One that failed waits so long for the others to end, too.
            shutdown_timeout_seconds=patience,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the other processes of this run could not be reached ({reason}); start the command "
            "on every host of a TPU, or elsewhere check JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    if jax.process_count() > 1:
        speak_when_aborted()
        if jax.default_backend() == "cpu":
            # A CPU's program from the cache may start its collectives in another order than the
            # same one just compiled in another process: both would wait for ever.
            jax.config.update("jax_enable_compilation_cache", False)


def _heartbeat(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 10 <= int(text) <= 86_400):
        raise UserError(f"{HEARTBEAT}: {text!r} should be a number of seconds from 10 to 86400")
    return int(text)


def speak_when_aborted() -> None:
    """Lets this process end with a sentence where JAX aborts it because another one is gone.

    JAX aborts from a thread of its own, in C++, and no Python runs any more. What Python's signal
    handler still does, in any thread, is to write the signal's number into a pipe; at its other end
    a small process waits, says the sentence where the number was SIGABRT's, and ends.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only there are signals handled
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listen = "import sys\nif 6 in sys.stdin.buffer.read(): print(sys.argv[1], file=sys.stderr)"
    _speakers.append(
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", listen, ABORTED],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not meant for it
        )
    )
    os.close(reader)
    signal.signal(signal.SIGABRT, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


def lost(error: BaseException) -> str | None:
    """A sentence where this error says that another process is gone; None where it does not."""
    import jax

    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    if isinstance(error, UserError) or not GONE.search(str(error)):
        return None
    reason = str(error).splitlines()[0][:200]
    return f"another process of this run ended or cannot be reached ({reason}); {GOES_ON}"


def is_main() -> bool:
    """Whether this process prints and writes."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_main(array: Any) -> Any:
    """The first process's array on every process, as NumPy; shapes must agree."""
    import jax

    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(array)


def agree(digests: Mapping[str, str]) -> None:
    """Checks that all processes hold the same, before they work on it together.

    Args:
      digests: what -> SHA-256 of it; every process gives the same names.

    Raises:
      UserError: in every process, where one differs from the first; names what and which.
    """
    import jax

    if jax.process_count() == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    mine = np.stack([np.frombuffer(bytes.fromhex(digest), np.uint8) for digest in digests.values()])
    gathered = multihost_utils.process_allgather(mine)  # [processes, digests, 32]
    for what, column in zip(digests, np.swapaxes(gathered, 0, 1), strict=True):
        others = np.flatnonzero((column != column[0]).any(axis=-1))
        if len(others):
            raise UserError(
                f"{what} of process {', '.join(map(str, others))} (counted from 0) differ from "
                "those of process 0; give every process the same settings and the same files"
            )


def everywhere(flags: Sequence[bool]) -> list[bool]:
    """Which of the flags are set in every process; all processes give equally many."""
    import jax

    if jax.process_count() == 1:
        return list(flags)
    import numpy as np
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.array(flags, bool))  # [processes, flags]
    return np.all(np.reshape(gathered, (-1, len(flags))), axis=0).tolist()


def text_from_main(text: str) -> str:
    """The first process's text on every process."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    size = int(from_main(np.array(len(content), np.int32)))
    if not is_main() or size != len(content):
        content = np.zeros(size, np.uint8)
    return np.asarray(from_main(content)).tobytes().decode("utf-8", "surrogatepass")
