"""The LoRA steps of MaxText and Tunix, compiled for a TPU that is not there.

Each is the project's own training step, untouched, on shapes instead of arrays: Llama 3 8B with a
frozen bf16 base, LoRA of rank 8 on seven projections, AdamW, fsdp over all chips. It runs in that
project's environment, with the TPU compiler that `jaxalign[tpu]` pins, so that all are told by one:

    uv venv --python 3.12 others && . others/bin/activate
    uv pip install 'maxtext[tpu]==0.2.4' 'jax==0.10.2' 'jaxlib==0.10.2' --resolution=lowest
    uv pip install 'google-tunix==0.1.7' pathwaysutils 'jax[tpu]==0.10.2'    # all that Tunix needs
    uv pip install --no-deps -e .                                            # reads the program

    python benchmarks/aot_others.py maxtext --rows 32 --length 512
    python benchmarks/aot_others.py maxtext --remat minimal --options ours
    python benchmarks/aot_others.py tunix --remat DECODER --options whole --hlo tunix.txt

What stands in for a machine: weights are shapes (`nnx.eval_shape`), data is never read, nothing is
saved, and `jax.devices()` names the chips that the program is for, as both projects ask it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from jaxalign import compiler
from jaxalign.adapters.lora import Lora
from jaxalign.chips import CHIPS
from jaxalign.model.spec import ModelSpec
from jaxalign.plan.cost import measure
from jaxalign.plan.hlo import dims
from jaxalign.plan.topology import QUIET
from jaxalign.train.flops import training_flops

TOPOLOGY, CHIP, WAYS = "v5e:4x4", CHIPS["v5e"], 16
RANK, ALPHA = 8, 16.0
MODELS = yaml.safe_load((files("jaxalign.plan") / "models.yaml").read_text("utf-8"))
SPEC = ModelSpec.from_hf(MODELS["meta-llama/Meta-Llama-3-8B"])
WHOLE = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
# Of the compiler: its defaults; weights gathered whole, not piece by piece within a product; all
# that our own programs ask for.
OPTIONS: dict[str, Callable[[], dict[str, str] | None]] = {
    "default": lambda: None,
    "whole": lambda: {WHOLE: compiler.OPTIONS["tpu"][WHOLE]},
    "ours": lambda: compiler.options(_chips()[0]),
}


def main() -> None:
    """Compiles one step and prints what it takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("project", choices=sorted(PROJECTS))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--layers", type=int, default=SPEC.layers, help="fewer: a quick look")
    parser.add_argument("--remat", default="", help="the project's word; default: its own default")
    parser.add_argument("--options", default="default", choices=OPTIONS, help="of the compiler")
    parser.add_argument("--hlo", type=Path, help="where the optimised program is written")
    args = parser.parse_args()
    os.environ.update(QUIET, JAX_PLATFORMS="cpu")
    began = time.monotonic()
    lowered = PROJECTS[args.project](args)
    traced = time.monotonic() - began
    compiled = lowered.compile(compiler_options=OPTIONS[args.options]())
    text = compiled.as_text()
    if args.hlo:
        args.hlo.write_text(text)
    for name in ("maxtext", "google-tunix", "jax", "libtpu"):
        print(name, _version(name), end="; ")
    print(f"traced in {traced:.0f} s, compiled in {time.monotonic() - began - traced:.0f} s")
    memory = compiled.memory_analysis()
    for name in ("argument", "temp", "output", "alias"):
        print(f"{name} {getattr(memory, f'{name}_size_in_bytes') / 1e9:.2f} GB", end="; ")
    print(f"peak {memory.peak_memory_in_bytes / 1e9:.2f} GB")
    report(text, args)
    print(memory)


def report(text: str, args: argparse.Namespace) -> None:
    """Prints the FLOPs of a program over the least there can be, and the compiler's time."""
    spec = dataclasses.replace(SPEC, layers=args.layers)
    cost = measure(text, kernels)
    tokens, trained = args.rows * args.length, Lora(RANK, ALPHA, 0.0).count(spec)
    least = training_flops(spec, tokens, args.length, adapter=trained) / WAYS
    seconds = cost.cycles / CHIP.clock + cost.kernel_flops / CHIP.flops
    print(
        f"FLOPs / least {cost.flops / least:.3f}; kernels {cost.kernel_flops / cost.flops:.1%}; "
        f"estimate {1e3 * seconds:.0f} ms; roofline {1e3 * least / CHIP.flops:.0f} ms"
    )
    for kind, moved in sorted(cost.collectives.items()):
        sent, hidden = moved.bytes / 1e9, moved.hidden / 1e9
        print(f"{kind}: {moved.count:.0f}, {sent:.1f} GB, {hidden:.1f} of them hidden")
    print("not counted:", ", ".join(cost.unknown) or "nothing")


def kernels(op: Any, operands: list[str]) -> float | None:
    """FLOPs of an attention kernel: MaxText's is JAX's splash, in blocks of 512, as ours."""
    from jaxalign.model import splash

    return splash.flops(op.name, [dims(shape) for shape in operands])


def tunix(args: argparse.Namespace) -> Any:
    """`PeftTrainer`'s step on its Llama 3, as its example `qlora_llama3_gpu` sets it up."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from tunix.models.llama3.model import Llama3, ModelConfig, RematConfig
    from tunix.sft import peft_trainer, utils

    chips = _chips()
    mesh = Mesh(np.array(chips).reshape(WAYS, 1), ("fsdp", "tp"))
    remat = RematConfig[args.remat or "NONE"]
    config = dataclasses.replace(
        ModelConfig.llama3p1_8b(), num_layers=args.layers, remat_config=remat
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    provider = qwix.LoraProvider(
        module_path="|".join(f".*{name}" for name in names), rank=RANK, alpha=ALPHA
    )
    trainers = []

    def make() -> tuple[Any, Any]:
        model = Llama3(config, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
        model = qwix.apply_lora_to_model(
            model, provider, rngs=nnx.Rngs(params=0), **model.get_model_input()
        )
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=100)
        trainers.append(peft_trainer.PeftTrainer(model, optax.adamw(1e-4), settings))
        return trainers[0].model, trainers[0].optimizer

    def given(batch: Mapping[str, Any]) -> dict[str, Any]:
        real = batch["input_mask"]
        return {
            **batch,
            "positions": utils.build_positions_from_mask(real),
            "attention_mask": utils.make_causal_attn_mask(real),
        }

    place = partial(NamedSharding, mesh)
    graph, state = nnx.split(nnx.eval_shape(make))
    specs = nnx.get_partition_spec(state)
    state = jax.tree.map(lambda x, spec: _on(x, place(spec)), state, specs)
    rows = partial(jax.ShapeDtypeStruct, (args.rows, args.length))
    batch = {
        "input_tokens": rows(jnp.int32, sharding=place(PartitionSpec("fsdp", None))),
        "input_mask": rows(jnp.bool_, sharding=place(PartitionSpec("fsdp", None))),
    }
    trainer = trainers[0].with_gen_model_input_fn(given)
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
    with mesh, _machine(chips):
        return step.lower(*nnx.merge(graph, state), batch)


def maxtext(args: argparse.Namespace) -> Any:
    """The step of `train_sft` with `lora.enable_lora`, its Tunix trainer on MaxText's Llama 3."""
    import jax
    import maxtext as project
    from flax import nnx
    from flax.linen import partitioning
    from jax.sharding import NamedSharding, PartitionSpec
    from maxtext.configs import pyconfig
    from maxtext.trainers.post_train.sft import train_sft
    from maxtext.trainers.pre_train import train_compile
    from maxtext.utils import maxtext_utils, model_creation_utils, sharding

    settings = {
        "run_name": "aot",
        "base_output_directory": tempfile.mkdtemp(),
        "enable_checkpointing": False,
        "skip_jax_distributed_system": True,
        "compile_topology": f"v5e-{WAYS}",
        "compile_topology_num_slices": 1,
        "model_name": "llama3-8b",
        "override_model_config": True,
        "base_num_decoder_layers": args.layers,
        "weight_dtype": "bfloat16",
        "per_device_batch_size": args.rows / WAYS,
        "max_target_length": args.length,
        "lora.enable_lora": True,
        "lora.lora_rank": RANK,
        "lora.lora_alpha": ALPHA,
        **({"remat_policy": args.remat} if args.remat else {}),
    }
    recipe = Path(project.__file__).parent / "configs/post_train/sft.yml"
    words = [f"{key}={value}" for key, value in settings.items()]
    config = pyconfig.initialize_pydantic(["", str(recipe), *words])
    mesh = train_compile.get_topology_mesh(config)
    create, known = model_creation_utils.create_nnx_abstract_model(config, mesh)
    rules = partial(partitioning.axis_rules, config.logical_axis_rules)
    trainers = []

    def pretrained(_: Any) -> tuple[Any, Any]:
        with rules():
            return create(), mesh

    def make() -> tuple[Any, Any]:
        with (
            mock.patch.object(model_creation_utils, "from_pretrained", pretrained),
            mock.patch.object(train_sft, "hooks"),  # they would read the data
            mock.patch("jax.make_array_from_callback", _whole),
            mock.patch("jax.set_mesh", nullcontext),  # not within a trace, such as this one
        ):
            trainers.append(train_sft.setup_trainer_state(config)[0])
        return trainers[0].model, trainers[0].optimizer

    with _machine(mesh.devices.flat):
        graph, state = nnx.split(nnx.eval_shape(make))
    places = {
        (0, *path): leaf.get_value().sharding
        for path, leaf in nnx.to_flat_state(nnx.split(known)[1])
    }
    whole = NamedSharding(mesh, PartitionSpec())  # adapters, as `apply_lora_to_model` leaves them
    state = nnx.from_flat_state(
        (path, leaf.replace(_on(leaf.get_value(), places.get(path, whole))))
        for path, leaf in nnx.to_flat_state(state)
    )
    trainer = trainers[0]
    trainer.model, trainer.optimizer = nnx.merge(graph, state)
    where = sharding.get_input_data_sharding(config, mesh)
    batch = maxtext_utils.get_shaped_batch(config, batch_sharding=where)
    with jax.set_mesh(mesh), rules(), _machine(mesh.devices.flat):
        step = nnx.jit(trainer.create_train_step_fn(), donate_argnames=("optimizer",))
        return step.lower(trainer.model, trainer.optimizer, batch)


def _on(leaf: Any, where: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _whole(shape: tuple[int, ...], where: Any, piece: Callable[[Any], Any]) -> Any:
    """`jax.make_array_from_callback` on what is no array yet: where it lies is told later."""
    return piece((slice(None),) * len(shape))


def _chips() -> Any:
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices


@contextmanager
def _machine(chips: Any) -> Iterator[None]:
    """As if these chips were here, for code that asks which machine it runs on."""
    with mock.patch("jax.devices", lambda *_: list(chips)):
        yield


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


PROJECTS = {"maxtext": maxtext, "tunix": tunix}

if __name__ == "__main__":
    main()
