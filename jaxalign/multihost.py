"""Several processes, one run: start together, wait together, let one of them speak.

start()                       # joins jax.distributed where the environment names a cluster
if is_main(): print(...)
barrier('saved')
"""

from __future__ import annotations

import os
from typing import Any

from jaxalign.errors import UserError

# Any of these means that a launcher has started several processes and JAX can find the others:
# its own variables, SLURM's and Open MPI's ranks, a TPU pod's worker list.
CLUSTER = ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def start() -> None:
    """Joins the cluster that the environment names, if any; call before any other use of JAX.

    `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name one by
    hand; on SLURM, Open MPI and TPU pods JAX finds the rest by itself.

    Raises:
      UserError: the others did not answer.
    """
    import jax

    pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    several = any(os.environ.get(name, "1") != "1" for name in CLUSTER)
    if not (pod or several) or jax.distributed.is_initialized():
        return
    number, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=int(number) if number else None,
            process_id=int(index) if index else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the other processes of this run could not be reached ({str(error).splitlines()[0]}); "
            "check JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
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
