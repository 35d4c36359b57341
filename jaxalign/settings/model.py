"""The settings of what is trained and where it is: base, adapter, prompt, devices."""

from __future__ import annotations

from dataclasses import dataclass

from jaxalign.bounds import setting


@dataclass
class ModelConfig:
    """The frozen base."""

    path: str = setting(
        "",
        "folder in Hugging Face layout, hub name, or `gs://BUCKET/FOLDER`",
        path=True,
        see="tpu.md#buckets",
    )
    revision: str | None = setting(None, "hub branch, tag or commit")
    dtype: str = setting(
        "bfloat16",
        "dtype of the frozen weights and the activations",
        choices=("bfloat16", "float32"),
    )
    quantize: str = setting(
        "none",
        "how the frozen projections' weights are stored",
        choices=("none", "int8", "int4", "nf4"),
        see="quantize.md",
    )
    remat: str = setting(
        "full",
        "what the backward pass computes again, from nothing to everything",
        choices=("none", "dots", "names", "offload", "full"),
        see="tpu.md",
    )
    attention: str = setting(
        "auto",
        "`auto`: the platform's kernel where it can, else `reference`; `splash` (TPU), `cudnn` "
        "(GPU)",
        choices=("auto", "reference", "splash", "cudnn"),
    )

    @property
    def stored(self) -> str:
        """How the weights are kept in memory: `bfloat16`, or `bfloat16 nf4`."""
        return self.dtype if self.quantize == "none" else f"{self.dtype} {self.quantize}"


@dataclass
class AdapterConfig:
    """What is trained next to the frozen base; the `lora` group has the settings of a LoRA."""

    kind: str = setting(
        "lora",
        "`prefix`: keys and values in front of every block's; `prompt`: vectors in front of the "
        "embeddings; `pool`: such vectors, mixed according to the input",
        choices=("lora", "prefix", "prompt", "pool"),
        see="methods.md#trained-prompts",
    )
    num_virtual_tokens: int = setting(
        16, "for prefix, prompt and pool: how many stand in front", lowest=1
    )
    pool_size: int = setting(32, "for pool: prompts to mix", lowest=1)
    temperature: float = setting(0.1, "for pool: τ of the weights, softmax(cos / τ)", above=0)
    start: str | None = setting(None, "PEFT folder or hub name to go on from", path=True)


@dataclass
class LoraConfig:
    """A LoRA (`adapter.kind=lora`); names and defaults are PEFT's, values the paper's."""

    r: int = setting(8, "rank", lowest=1)
    alpha: float = setting(16.0, "numerator of the scale", above=0)
    dropout: float = setting(0.1, "on the adapter's input, in both phases", lowest=0, below=1)
    targets: list[str] = setting(
        ["q", "k", "v", "o", "gate", "up", "down"], "the projections that get an adapter"
    )
    layers: str = setting("all", "`all`, `1..16` (blocks 1 to 16, inclusive), `3,5,8`")
    scaling: str = setting(
        "standard",
        "`standard`: alpha/r; `rank_stabilised`: alpha/√r",
        choices=("standard", "rank_stabilised"),
    )
    variant: str = setting(
        "lora",
        "`dora`: the lengths of the weights' columns are trained, too",
        choices=("lora", "dora"),
        see="pytorch.md#variants",
    )
    ranks: dict[str, int] = setting({}, "a target's own rank: `{down: 16}`", whole=True, lowest=1)
    alphas: dict[str, float] = setting({}, "a target's own alpha", number=True, above=0)


@dataclass
class PromptConfig:
    """How a task row becomes tokens."""

    template: str = setting(
        "chat",
        "`chat`: the tokenizer's; `llama3_paper`: the paper's training layout",
        choices=("chat", "llama3_paper"),
    )
    system: str | None = setting(None, 'replaces the task\'s own instruction; `""` for none')


@dataclass
class MeshConfig:
    """Devices along each axis; one of them may be -1 (the rest)."""

    data: int = setting(1, "copies of everything", lowest=1, besides=(-1,), see="tpu.md")
    fsdp: int = setting(-1, "parts of every weight, gathered when used", lowest=1, besides=(-1,))
    tensor: int = setting(1, "parts of every projection", lowest=1, besides=(-1,))
    seq: int = setting(1, "parts of the tokens of a row", lowest=1, besides=(-1,))
