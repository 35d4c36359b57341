"""What writes the answers: a base that is loaded once, and adapters that take turns on it.

base = load_base(config)
system = base.wear('runs/demo/adapter')       # or base.bare()
system.write(prompts, decoding, batch_size=32)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.adapters.lora import Lora, merge, settle
from jaxalign.data.chat import encode_prompts, load_tokenizer
from jaxalign.data.tasks import Example
from jaxalign.data.template import Prompts, prompts_of
from jaxalign.errors import UserError
from jaxalign.generate import Decoding, answer_chunks, stop_ids
from jaxalign.hf.find import locate
from jaxalign.hf.load import abstract_params, load_params, load_spec
from jaxalign.hf.peft import load_peft
from jaxalign.hf.tensors import weights_in
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec
from jaxalign.settings import Config
from jaxalign.sharding import make_mesh, shard_tree


@dataclass(frozen=True)
class System:
    """A base with or without an adapter, ready to write."""

    decoder: Decoder
    params: Any
    lora: Any
    mesh: Mesh
    stops: tuple[int, ...]
    prompts: Prompts  # how it is asked

    def write(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, batch_size: int
    ) -> list[list[int]]:
        """New token ids of each prompt; see `jaxalign.generate.generate`."""
        answers: list[list[int]] = [[] for _ in prompts]
        for rows, found in self.chunks(prompts, decoding, batch_size):
            for row, ids in zip(rows, found, strict=True):
                answers[row] = ids
        return answers

    def chunks(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        batch_size: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Row numbers and answers, batch by batch; see `jaxalign.generate.answer_chunks`."""
        with jax.set_mesh(self.mesh):
            yield from answer_chunks(
                self.decoder,
                self.params,
                self.lora,
                prompts,
                decoding,
                stop_ids=self.stops,
                batch_size=batch_size,
                numbers=numbers,
            )


@dataclass(frozen=True)
class Base:
    """The base model of a configuration, on its mesh."""

    config: Config
    spec: ModelSpec
    params: Any  # None: not loaded yet
    tokenizer: Any
    mesh: Mesh

    def bare(self) -> System:
        """The base alone."""
        return self.system(self.decoder(), self.params, None)

    def wear(self, adapter: str) -> System:
        """The base with a PEFT folder's adapter, beside it or merged into it as configured.

        It is asked by the chat template that belongs to the adapter.

        Raises:
          UserError: the folder holds no adapter for this base, or a template that cannot be used.
        """
        prompts = self.prompts_of(adapter)
        return self.attach(*load_peft(adapter, self.spec), prompts)

    def attach(self, lora: Any, adapter: Lora, prompts: Prompts | None = None) -> System:
        """The base with an adapter that is in memory, beside it or merged into it as configured."""
        lora = jax.device_put(lora, shard_tree(self.mesh, lora))
        if self.config.generate.adapter == "merged":
            with jax.set_mesh(self.mesh):
                whole = merge(self.params, lora, adapter)
                return self.system(self.decoder(), whole, None, prompts)
        return self.system(self.decoder(adapter), self.params, lora, prompts)

    def decoder(self, adapter: Lora | None = None) -> Decoder:
        """The decoder that runs these weights, by the kernels that `model.attention` names."""
        return Decoder(self.spec, adapter, attention=self.config.model.attention)

    def with_weights(self) -> Base:
        """The same with its weights, which `prepare_base` leaves out.

        Raises:
          UserError: weights that are missing or cannot be run.
        """
        if self.params is not None:
            return self
        model = self.config.model
        dtype = jnp.dtype(model.dtype)
        params = load_params(
            model.path,
            self.spec,
            dtype,
            shard_tree(self.mesh, abstract_params(self.spec, dtype)),
            model.revision,
            model.quantize,
        )
        return dataclasses.replace(self, params=params)

    def prompts_of(self, adapter: str) -> Prompts:
        """How a system with this adapter is asked; its weights are not read.

        Raises:
          UserError: its template cannot be used.
        """
        said = self.config.prompt.template
        return prompts_of(self.tokenizer, said, locate(adapter), adapter)

    def stops(self, prompts: Prompts) -> tuple[int, ...]:
        """The tokens that end an answer to such prompts."""
        return stop_ids(self.spec, prompts.tokenizer, prompts.template)

    @property
    def prompts(self) -> Prompts:
        """How the bare base is asked."""
        return Prompts(self.tokenizer, self.config.prompt.template)

    def encode(
        self, examples: Sequence[Example], prompts: Prompts | None = None
    ) -> tuple[list[list[int]], int]:
        """The prompts as token ids, and how many were cut from the left to leave room.

        Args:
          examples: what is asked.
          prompts: how the system that answers is asked; None: as the bare base.

        Raises:
          UserError: a prompt leaves no room for an answer and `generate.long` refuses to cut.
        """
        settings, asked = self.config.generate, prompts or self.prompts
        ids = encode_prompts(examples, asked.tokenizer, asked.template, self.config.prompt.system)
        room = self.spec.max_position - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"generate.max_new_tokens: {settings.max_new_tokens} leaves no place for a prompt "
                f"among the model's {self.spec.max_position} positions"
            )
        long = [i for i, row in enumerate(ids) if len(row) > room]
        if long and settings.long == "refuse":
            raise UserError(
                f"{examples[long[0]].origin or f'prompt {long[0] + 1}'}: the prompt has "
                f"{len(ids[long[0]])} tokens and leaves no room for "
                f"{settings.max_new_tokens} more among the model's {self.spec.max_position} "
                f"positions ({len(long)} such prompts); set generate.long=cut to cut them from "
                "the left, or lower generate.max_new_tokens"
            )
        return [np.asarray(row[-room:]).tolist() for row in ids], len(long)

    def decode(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The answers as text, without special tokens."""
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

    def system(
        self, decoder: Decoder, params: Any, lora: Any, prompts: Prompts | None = None
    ) -> System:
        """These weights on this base's mesh, stopping where its answers end."""
        prompts = prompts or self.prompts
        with jax.set_mesh(self.mesh):
            lora = settle(decoder.adapter, params, lora)
        return System(decoder, params, lora, self.mesh, self.stops(prompts), prompts)


def load_base(config: Config) -> Base:
    """The base of `model.path`, sharded over the mesh, in `model.dtype`.

    Raises:
      UserError: no such model or tokenizer, or one that cannot be run.
    """
    return prepare_base(config).with_weights()


def prepare_base(config: Config) -> Base:
    """The base without its weights: enough to build prompts and to check adapters by.

    Raises:
      UserError: no such model or tokenizer, or a mesh that these devices do not make.
    """
    if not config.model.path:
        raise UserError("model.path is empty; name a folder in Hugging Face layout or a hub model")
    spec = load_spec(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    return Base(config, spec, None, tokenizer, make_mesh(*dataclasses.astuple(config.mesh)))


def weights_digest(adapter: str) -> str:
    """A short name for what an adapter folder holds: another content, another name."""
    folder, digest = locate(adapter), hashlib.sha256()
    config, weights = folder / "adapter_config.json", weights_in(folder)
    if config.is_file():
        digest.update(config.read_bytes())
    if stored := weights.get("adapter_model.safetensors"):
        digest.update(stored.read(0, stored.size))
    return digest.hexdigest()[:16]


def name_of(path: str) -> str:
    """What to call a system that was given by its path alone: runs/sft/adapter is `sft`."""
    parts = [part for part in Path(path).parts if part not in ("adapter", "/", ".", "..")]
    return Path(parts[-1]).stem if parts else path


def decoding_of(config: Config) -> Decoding:
    """The settings of `generate.*` as the decoder takes them."""
    settings = config.generate
    return Decoding(
        max_new_tokens=settings.max_new_tokens,
        method=settings.method,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
        beams=settings.beams,
        length_penalty=settings.length_penalty,
    )
