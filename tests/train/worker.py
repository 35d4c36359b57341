"""One of several processes: gradients and validation on meshes, written by the first of them.

python -m tests.train.worker CONFIG OUT MESHES      # JAX_COORDINATOR_ADDRESS and so on are set

`MESHES` is JSON, `{name: [[data, fsdp, tensor, seq], order]}`: `order` names the process at each
place of the mesh, as on a slice whose device order is not that of its hosts; null leaves JAX's.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxalign import base as bases
from jaxalign import multihost
from jaxalign.adapters import Lora
from jaxalign.config import load
from jaxalign.sharding import AXES, make_mesh, put_batch, rows_here
from jaxalign.train import setup
from jaxalign.train.validate import validate


def mesh_of(sizes, order, devices):
    """The mesh in which the next device of process `order[k]` stands at place k."""
    if order is None:
        return make_mesh(*sizes, devices=devices)
    left = {}
    for device in devices:
        left.setdefault(device.process_index, []).append(device)
    placed = np.array([left[process].pop(0) for process in order])
    return Mesh(placed.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def warm(init):
    """Initial factors none of which is zero, or every gradient of A would be."""
    return lambda *args: jax.tree.map(
        lambda w: w + 0.03 * jnp.cos(jnp.arange(w.size) ** 1.5).reshape(w.shape), init(*args)
    )


def measure(config, mesh, monkey=setattr):
    """Name -> number or array: each phase's metrics and mean gradient, and the validation."""
    monkey(bases, "make_mesh", lambda *_: mesh)
    run = setup.prepare(config)
    found = {}
    with jax.set_mesh(run.mesh):
        for name, stream in run.train.items():
            rows = stream.stack([0, 1], rows_here(mesh, stream.size))
            batch = put_batch(mesh, rows, stacked=True)
            out = run.step.gradient(name, run.state, run.frozen, batch, None)
            gradient, metrics = jax.device_get(out)
            found |= {f"{name}/{what}": value for what, value in metrics.items()}
            leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]
            found[f"{name}/gradient"] = np.concatenate(leaves)
        found |= validate(run, run.state)
    return {name: np.asarray(value) for name, value in found.items()}


def main():
    config_file, out, meshes = sys.argv[1:]
    multihost.start()
    Lora.init = warm(Lora.init)
    found = {}
    for name, (sizes, order) in json.loads(meshes).items():
        numbers = measure(load(config_file).config, mesh_of(sizes, order, jax.devices()))
        found |= {f"{name}|{what}": value for what, value in numbers.items()}
    if multihost.is_main():
        np.savez(out, **found)


if __name__ == "__main__":
    main()
