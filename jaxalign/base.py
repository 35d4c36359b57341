"""A base, opened once: facts, tokenizer, mesh and weights, each read when it is first needed.

base = open_base(config)
base.spec, base.tokenizer                     # no weight is read
system = base.wear('runs/demo/adapter')       # or base.bare(); reads the weights, once
system.write(prompts, decoding, batch_size=32)
train(config, base=base)                      # the same weights

`open_files(path)` opens one without a configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.adapters import Adapter
from jaxalign.bucket import origin
from jaxalign.data.chat import encode_prompts
from jaxalign.data.tasks import Example
from jaxalign.data.template import Prompts, instructed, prompts_of
from jaxalign.data.tokenizer import check_tokens, load_tokenizer
from jaxalign.errors import UserError
from jaxalign.frozen.projection import Attached
from jaxalign.generate import Decoding, System, stop_ids
from jaxalign.hf.find import holds_weights, locate, small_files
from jaxalign.hf.kinship import another_base, other_name, other_rounding
from jaxalign.hf.load import abstract_params, fingerprint, load_params, load_spec
from jaxalign.hf.peft import load_peft, named_base, rounded_to, trained_on
from jaxalign.model.decoder import Decoder
from jaxalign.model.spec import ModelSpec
from jaxalign.paths import unfinished
from jaxalign.settings import Config, MeshConfig, ModelConfig
from jaxalign.sharding import make_mesh, shard_tree
from jaxalign.terminal import say


@dataclass
class Opened:
    """The parts of a base; each is read when it is first asked for, and once."""

    model: ModelConfig
    axes: MeshConfig = field(default_factory=MeshConfig)
    held: str = ""  # dtype in which the weights stay in memory; empty: `model.dtype`
    _weights: Any = None

    @property
    def path(self) -> str:
        """Folder or hub name, as it was given."""
        return self.model.path

    @property
    def revision(self) -> str | None:
        """Hub branch, tag or commit."""
        return self.model.revision

    @cached_property
    def files(self) -> Path:
        """The folder of its small files; the weights need not be there."""
        return small_files(self.path, self.revision)

    @property
    def whole(self) -> Path:
        """Its folder with the weights, which are fetched where they are missing."""
        return locate(self.path, self.revision)

    @cached_property
    def spec(self) -> ModelSpec:
        """Its facts; of a run's model it is said where the run is not finished."""
        _tell_unfinished(self.files)
        return load_spec(self.path, self.revision)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, with a pad token."""
        return load_tokenizer(self.path, self.revision)

    @property
    def its_tokenizer(self) -> Any:
        """Its tokenizer; None where it comes without one."""
        return self.tokenizer if any(self.files.glob("tokenizer*")) else None

    @cached_property
    def mesh(self) -> Mesh:
        """The devices, as `mesh.*` orders them."""
        return make_mesh(*dataclasses.astuple(self.axes))

    @cached_property
    def fingerprint(self) -> str:
        """By which the same base is known again; its files are complete then."""
        return fingerprint(self.path, self.revision)

    @property
    def params(self) -> Any:
        """The weights on the mesh in `model.dtype`."""
        return self.weights(self.model.dtype)

    def weights(self, dtype: Any) -> Any:
        """The weights on the mesh: those that are held, rounded to `dtype`, or read again where
        they were held in fewer bits.

        Raises:
          UserError: weights that are missing or cannot be run.
        """
        wanted, held = jnp.dtype(dtype), jnp.dtype(self.held or self.model.dtype)
        if wanted.itemsize > held.itemsize:
            self.held, self._weights, held = wanted.name, None, wanted
        if self._weights is None:
            shardings = shard_tree(self.mesh, abstract_params(self.spec, held))
            self._weights = load_params(
                self.path, self.spec, held, shardings, self.revision, self.model.quantize
            )
        if wanted == held:
            return self._weights
        return jax.tree.map(lambda leaf: leaf.astype(wanted), self._weights)

    def take(self, dtype: Any) -> Any:
        """As `weights`, for whoever changes them in place: they are forgotten here."""
        weights, self._weights = self.weights(dtype), None
        return weights

    def adapter(self, path: str | Path, fetch: bool = False) -> tuple[dict[str, Any], Adapter]:
        """A PEFT folder's tree and what it is, of an adapter that belongs to this base.

        Args:
          path: folder or hub name.
          fetch: as of `check_weights`.

        Raises:
          UserError: as `load_peft`, `check_weights` and `check_tokens`.
        """
        folder = locate(path)
        found = load_peft(folder, self.spec)
        self.check_weights(folder, fetch)
        self.check_tokens(folder)
        return found

    def check_weights(self, adapter: Path, fetch: bool = False) -> None:
        """Compares the weights with those that an adapter's run has had, where its record says so.

        Without `fetch`, as every reader looks first, it says where that run is not finished.

        Args:
          adapter: its folder.
          fetch: whether weights that are not here are fetched for it; else they are not compared.

        Raises:
          UserError: they are others.
        """
        if not fetch:
            _tell_unfinished(adapter)
        had = trained_on(adapter)
        if had and (fetch or holds_weights(self.files)) and self.fingerprint != had:
            raise another_base(str(adapter), self.path, named_base(adapter))

    def doubt(self, adapter: Path, shown: str) -> str:
        """A sentence where an adapter names another base and no record knows its weights; else ''.

        Args:
          adapter: its folder.
          shown: what it is called.
        """
        return "" if trained_on(adapter) else other_name(named_base(adapter), self.path, shown)

    def rounding(self, adapter: Path, shown: str) -> str:
        """A sentence where an adapter learnt on weights that were rounded otherwise; else ''.

        Args:
          adapter: its folder; one without a record says nothing.
          shown: what it is called.
        """
        return other_rounding(rounded_to(adapter), self.model.quantize, shown)

    def check_tokens(self, adapter: Path) -> None:
        """Whether the tokenizer knows the tokens of the one that an adapter may come with.

        Args:
          adapter: its folder.

        Raises:
          UserError: one that is not known.
        """
        check_tokens(adapter, self.files, self.path, lambda: self.tokenizer)

    def check_vocabulary(self) -> None:
        """Whether the model has an embedding for each token of its tokenizer.

        Raises:
          UserError: it has not.
        """
        if len(self.tokenizer) > self.spec.vocab:
            raise UserError(
                f"{self.path}: the tokenizer knows {len(self.tokenizer)} tokens, the model only "
                f"{self.spec.vocab}; they do not belong together"
            )


@dataclass(frozen=True)
class Base:
    """An opened base under a configuration: how it is asked, decoded and given adapters."""

    config: Config
    opened: Opened

    @property
    def spec(self) -> ModelSpec:
        """The model's facts."""
        return self.opened.spec

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.opened.tokenizer

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.opened.mesh

    @property
    def params(self) -> Any:
        """The weights in `model.dtype`."""
        return self.opened.params

    @property
    def fingerprint(self) -> str:
        """By which the same base is known again."""
        return self.opened.fingerprint

    def under(self, config: Config) -> Base:
        """The same opened base under another configuration.

        Raises:
          UserError: it names another model, or other devices.
        """
        for key, mine, asked in (
            *((f"model.{name}", getattr(self.opened.model, name), getattr(config.model, name))
              for name in ("path", "revision", "dtype", "quantize")),
            ("mesh", self.opened.axes, config.mesh),
        ):  # fmt: skip
            if mine != asked:
                raise UserError(
                    f"{key}: the base was opened with {mine}, this configuration has {asked}; "
                    "open the base with the configuration that uses it"
                )
        return dataclasses.replace(self, config=config)

    def bare(self) -> System:
        """The base alone."""
        return self.system(self.decoder(), self.params, None)

    def wear(self, adapter: str) -> System:
        """The base with a PEFT folder's adapter, separate or merged into it as configured.

        It is asked by the chat template that belongs to the adapter.

        Raises:
          UserError: the folder holds no adapter for this base, or a template that cannot be used.
        """
        prompts = self.prompts_of(adapter)
        return self.attach(*self.opened.adapter(adapter, fetch=True), prompts)

    def attach(self, lora: Any, adapter: Adapter, prompts: Prompts | None = None) -> System:
        """The base with an adapter that is in memory, separate or merged into it as configured."""
        lora = jax.device_put(lora, shard_tree(self.mesh, lora))
        if self.config.generate.adapter == "merged":
            with jax.set_mesh(self.mesh):
                whole = adapter.merge(self.params, lora)
                return self.system(self.decoder(), whole, None, prompts)
        return self.system(self.decoder(adapter), self.params, lora, prompts)

    def decoder(self, adapter: Adapter | None = None) -> Decoder:
        """The decoder that runs these weights, by the kernels that `model.attention` names."""
        return Decoder(self.spec, adapter, attention=self.config.model.attention)

    def prompts_of(self, adapter: str) -> Prompts:
        """How a system with this adapter is asked; its weights are not read.

        Raises:
          UserError: its template cannot be used.
        """
        config, folder = self.config, locate(adapter)
        prompts = prompts_of(self.tokenizer, config.prompt.template, folder, adapter)
        return instructed(prompts, config, folder, adapter)

    def stops(self, prompts: Prompts) -> tuple[int, ...]:
        """The tokens that end an answer to such prompts."""
        return stop_ids(self.spec, prompts.tokenizer, prompts.template)

    @property
    def prompts(self) -> Prompts:
        """How the bare base is asked."""
        how = self.config.prompt
        return Prompts(self.tokenizer, how.template, system=how.system)

    def encode(
        self,
        examples: Sequence[Example],
        prompts: Prompts | None = None,
        adapter: Attached | None = None,
        new: int = 0,
    ) -> tuple[list[list[int]], int]:
        """The prompts as token ids, and how many were cut from the left to leave room.

        Args:
          examples: what is asked.
          prompts: how the system that answers is asked; None: as the bare base.
          adapter: that system's, which may take positions itself.
          new: tokens of the longest answer; 0: `generate.max_new_tokens`.

        Raises:
          UserError: a prompt leaves no room for an answer and `generate.long` refuses to cut.
        """
        settings, asked = self.config.generate, prompts or self.prompts
        ids = encode_prompts(examples, asked.tokenizer, asked.template, asked.system)
        most = new or settings.max_new_tokens
        room = self.spec.max_position - most
        room -= adapter.taken if adapter else 0
        if room < 1:
            raise UserError(
                f"{'the longest choice' if new else 'generate.max_new_tokens'}: {most} leaves no "
                f"place for a prompt among the model's {self.spec.max_position} positions"
            )
        long = [i for i, row in enumerate(ids) if len(row) > room]
        if long and settings.long == "refuse":
            raise UserError(
                f"{examples[long[0]].origin or f'prompt {long[0] + 1}'}: the prompt has "
                f"{len(ids[long[0]])} tokens and leaves no room for "
                f"{most} more among the model's {self.spec.max_position} "
                f"positions ({len(long)} such prompts); set generate.long=cut to cut them from "
                f"the left{'' if new else ', or lower generate.max_new_tokens'}"
            )
        return [np.asarray(row[-room:]).tolist() for row in ids], len(long)

    def decode(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The answers as text, without special tokens; blanks stay where the model wrote them."""
        as_written = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [self.tokenizer.decode(ids, **as_written) for ids in answers]

    def system(
        self, decoder: Decoder, params: Any, lora: Any, prompts: Prompts | None = None
    ) -> System:
        """These weights on this base's mesh, stopping where its answers end."""
        prompts = prompts or self.prompts
        with jax.set_mesh(self.mesh):
            if decoder.adapter and lora:
                lora = decoder.adapter.settle(params, lora)
        by_input = decoder.adapter is not None and bool(lora) and decoder.adapter.by_input
        share = self.config.generate.share_prefix == "auto" and not by_input
        return System(decoder, params, lora, self.mesh, self.stops(prompts), prompts, share)


def _tell_unfinished(folder: Path) -> None:
    if sentence := unfinished(folder, origin(folder)):
        say(sentence)


def open_base(config: Config, held: str = "") -> Base:
    """The base of `model.path`; nothing of it is read yet.

    Args:
      config: `model.*` and `mesh.*` say what is opened, the rest how it is used.
      held: dtype in which the weights stay in memory; empty: `model.dtype`.

    Raises:
      UserError: no model is named.
    """
    if not config.model.path:
        raise UserError("model.path is empty; name a folder in Hugging Face layout or a hub model")
    return Base(config, Opened(config.model, config.mesh, held))


def open_files(path: str, revision: str | None = None) -> Opened:
    """The base in this folder or of this hub name, for commands that turn files into files."""
    return Opened(ModelConfig(path=path, revision=revision))


def decoding_of(config: Config) -> Decoding:
    """The settings of `generate.*` as the decoder takes them."""
    return Decoding.of(dataclasses.asdict(config.generate))
