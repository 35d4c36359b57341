"""Several processes, one run: start together, wait together, let one of them speak.

start()                       # joins jax.distributed where the environment names a cluster
if is_main(): print(...)
barrier('saved')
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
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


def in_cluster(environment: Mapping[str, str], platforms: str | None) -> bool:
    """Whether this process is, or may be, one of several.

    On a Cloud TPU VM nothing in the environment tells: the hosts stand in the machine's metadata,
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
      UserError: the others did not answer.
    """
    import jax

    settle_platform()
    platforms = getattr(jax.config, "jax_platforms", None)  # unknown to type checkers
    if not in_cluster(os.environ, platforms) or jax.distributed.is_initialized():
        return
    number, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=int(number) if number else None,
            process_id=int(index) if index else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the other processes of this run could not be reached ({reason}); start the command "
            "on every host of a TPU, or elsewhere check JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


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
