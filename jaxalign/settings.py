"""Every setting with its type, default and bounds: they live here and nowhere else.

config = Config()
config.align.layer           # 16
check(config)                # what types alone cannot say
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from jaxalign.errors import UserError

AUTO = -1  # align.layer=auto: the layer where a probe of the base finds retrieval best


@dataclass
class ModelConfig:
    """The frozen base."""

    path: str = ""  # folder in Hugging Face layout, or a hub name
    revision: str | None = None  # hub branch, tag or commit
    dtype: str = "bfloat16"  # of the frozen weights and the activations: bfloat16 | float32
    quantize: str = "none"  # of the frozen projections' weights: none | int8 | int4 | nf4
    remat: str = "full"  # what the backward pass recomputes: none | dots | names | offload | full
    attention: str = "auto"  # auto: the platform's kernel, else reference | splash | cudnn

    @property
    def stored(self) -> str:
        """How the weights lie in memory: `bfloat16`, or `bfloat16 nf4`."""
        return self.dtype if self.quantize == "none" else f"{self.dtype} {self.quantize}"


@dataclass
class LoraConfig:
    """The adapter; names and defaults are PEFT's, values the paper's."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "gate", "up", "down"])
    layers: str = "all"  # all | 1..16 (blocks 1 to 16, inclusive) | 3,5,8
    scaling: str = "standard"  # alpha/r | rank_stabilised: alpha/sqrt(r)
    variant: str = "lora"  # lora | dora: the lengths of the weights' columns are trained, too
    ranks: dict[str, int] = field(default_factory=dict)  # target: a rank of its own, {down: 16}
    alphas: dict[str, float] = field(default_factory=dict)  # target: an alpha of its own
    start: str | None = None  # a PEFT folder to continue from


@dataclass
class PromptConfig:
    """How a task row becomes tokens."""

    template: str = "chat"  # chat: the tokenizer's | llama3_paper: the paper's training format
    system: str | None = None  # replaces the task's own instruction; "" for none


@dataclass
class TaskConfig:
    """The task stream; weight 0 turns it off."""

    kind: str = "rows"  # rows (prefix, text) | slots | intent | intent_slots | translation | ner
    train: list[str] = field(default_factory=list)  # files, globs, hf:NAME, tfds:NAME
    valid: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)  # our name: the data's name
    languages: list[str] = field(default_factory=list)  # keep only these; empty: all
    sampling: str = "proportional"  # over languages: proportional | uniform | temperature
    sampling_temperature: float = 2.0  # p ~ n^(1/T), for sampling: temperature
    objective: str = "language_model"  # registry name or package.module:function
    options: dict[str, Any] = field(default_factory=dict)  # for an objective of one's own
    weight: float = 1.0


@dataclass
class AlignConfig:
    """The sentence pairs and the alignment objective; weight 0 turns them off."""

    every: str = "microbatch"  # turns: microbatch (paper's code) | step (paper's text) | joint
    layer: int = 16  # output of this block, counted from 1; 0: the embeddings; auto: see AUTO
    temperature: float = 0.1
    direction: str = "one_way"  # one_way (source finds its target) | symmetric
    negatives: str = "group"  # group: among consecutive pairs | global: the whole micro-batch
    group: int = 32  # pairs per group
    detach: str = "none"  # stop the gradient on: none | source | target
    pooling: str = "mean"  # mean | mean_rest (all but the first token) | first | last | position
    control: str = "none"  # none | shuffled: targets are moved to other sources (a control run)
    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)  # keep pairs whose both sides are listed
    sampling: str = "uniform"  # over language pairs
    sampling_temperature: float = 2.0
    objective: str = "contrastive"
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass
class ExtraObjective:
    """One more term in a phase."""

    objective: str = ""  # registry name or package.module:function
    phase: str = "task"  # task | align
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class BatchConfig:
    """Sizes are global: rows of one micro-batch over all devices and hosts."""

    size: int = 32  # task rows (or packed sequences) per micro-batch
    pairs: int = 32  # sentence pairs per micro-batch
    accumulate: int = 4  # micro-batches per update
    max_length: int = 2048  # task tokens; longer rows are cut on the right and counted
    pair_max_length: int = 2048
    buckets: list[int] = field(default_factory=list)  # padded lengths; empty: chosen from the data
    pack: str = "none"  # none | segments: several rows in one sequence, none sees another


@dataclass
class OptimConfig:
    """AdamW on the trained parameters; values are the paper's."""

    learning_rate: float = 5e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    schedule: str = "inverse_sqrt"  # inverse_sqrt (paper) | cosine | linear | constant
    warmup_steps: int = 0
    warmup_ratio: float = 0.03  # used where warmup_steps is 0
    average: str = "tokens"  # sum/count over the update | microbatch: mean of means (paper's code)
    missing: str = "zero"  # parameters without gradient: zero gradient | skip (torch without ZeRO)


@dataclass
class TrainConfig:
    """How long, how often, when to stop."""

    steps: int = 0  # optimiser updates; 0: from epochs
    epochs: float = 5.0  # passes over the task rows (over the pairs where the task is off)
    eval_every: int = 200  # updates; 0: only at the end
    eval_batches: int = 0  # 0: the whole validation set
    metric: str = "eval/loss"  # any logged eval metric; best checkpoint and early stopping
    goal: str = "min"  # min | max
    patience: int = 5  # evaluations without improvement; 0: never stop early
    log_every: int = 10
    cosine_every: int = 0  # updates between measurements of cos(task, align gradients); 0: never
    warm_up: str = "lazy"  # compile a program at its first use | ahead: all before the first update


@dataclass
class CheckpointConfig:
    """What survives."""

    every: int = 200  # updates
    keep: int = 2  # newest; the best is always kept besides
    resume: str = "auto"  # auto | never


@dataclass
class GenerateConfig:
    """How answers are written; names are those of transformers."""

    max_new_tokens: int = 128  # the paper's for slots; 512 for translation
    batch: int = 32  # prompts decoded together
    method: str = "greedy"  # greedy (the paper's) | sample | beam
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    seed: int = 1  # of sample; a row's draws depend on this and its number alone
    beams: int = 4
    length_penalty: float = 1.0
    adapter: str = "unmerged"  # unmerged | merged: first added to the base's weights
    long: str = "refuse"  # prompts that leave no room for an answer: refuse | cut (from the left)


@dataclass
class EvaluateConfig:
    """What a model is judged by (`jaxalign evaluate`, and a sample of it during training)."""

    data: list[str] = field(default_factory=list)  # files, globs, hf:NAME, tfds:NAME
    kind: str = "task"  # as task.kind; task: the same
    columns: dict[str, str] = field(default_factory=dict)  # our name: the data's name
    languages: list[str] = field(default_factory=list)  # keep only these (of a translation: en-de)
    groups: dict[str, list[str]] = field(default_factory=dict)  # aligned: [de]; replaced as a whole
    rows: int = 0  # of each language, the first ones; 0: all
    shots: int = 0  # solved rows of task.train shown to the bare base in a run of its own; 0: none
    draws: int = 1000  # of the paired bootstrap
    options: dict[str, Any] = field(default_factory=dict)  # of the scorer: comet, tokenize
    sample: int = 0  # rows of each language answered at every validation of a training; 0: none


@dataclass
class MeshConfig:
    """Devices along each axis; one of them may be -1 (the rest)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    seq: int = 1  # devices among which the tokens of a row are split


@dataclass
class LogConfig:
    """JSONL is always written."""

    progress: str = "auto"  # auto (a bar on a terminal) | none
    tensorboard: bool = False
    wandb: str | None = None  # project name
    profile: list[int] = field(default_factory=list)  # [10, 3]: trace of updates 10 to 12
    time_every: int = 0  # updates between those that time their two phases apart; 0: never


@dataclass
class Config:
    """One run."""

    output: str = "runs/default"
    seed: int = 1
    trainable: str = "lora"  # lora | full
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    objectives: list[ExtraObjective] = field(default_factory=list)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
    "trainable": ("lora", "full"),
    "model.dtype": ("bfloat16", "float32"),
    "model.quantize": ("none", "int8", "int4", "nf4"),
    "model.remat": ("none", "dots", "names", "offload", "full"),
    "model.attention": ("auto", "reference", "splash", "cudnn"),
    "lora.scaling": ("standard", "rank_stabilised"),
    "lora.variant": ("lora", "dora"),
    "prompt.template": ("chat", "llama3_paper"),
    "task.kind": ("rows", "slots", "intent", "intent_slots", "translation", "ner"),
    "task.sampling": ("proportional", "uniform", "temperature"),
    "align.every": ("microbatch", "step", "joint"),
    "align.direction": ("one_way", "symmetric"),
    "align.negatives": ("group", "global"),
    "align.detach": ("none", "source", "target"),
    "align.pooling": ("mean", "mean_rest", "first", "last", "position"),
    "align.control": ("none", "shuffled"),
    "align.sampling": ("proportional", "uniform", "temperature"),
    "batch.pack": ("none", "segments"),
    "optim.schedule": ("inverse_sqrt", "cosine", "linear", "constant"),
    "optim.average": ("tokens", "microbatch"),
    "optim.missing": ("zero", "skip"),
    "train.goal": ("min", "max"),
    "train.warm_up": ("lazy", "ahead"),
    "generate.method": ("greedy", "sample", "beam"),
    "generate.adapter": ("unmerged", "merged"),
    "generate.long": ("refuse", "cut"),
    "evaluate.kind": ("task", "rows", "slots", "intent", "intent_slots", "translation", "ner"),
    "checkpoint.resume": ("auto", "never"),
    "log.progress": ("auto", "none"),
}

LOWEST = {
    "batch.size": 1,
    "batch.pairs": 1,
    "batch.accumulate": 1,
    "batch.max_length": 2,
    "batch.pair_max_length": 1,
    "align.layer": -1,
    "align.group": 1,
    "align.weight": 0.0,
    "task.weight": 0.0,
    "generate.max_new_tokens": 1,
    "generate.batch": 1,
    "generate.top_k": 0,
    "generate.beams": 1,
    "evaluate.rows": 0,
    "evaluate.shots": 0,
    "evaluate.draws": 1,
    "evaluate.sample": 0,
    "train.steps": 0,
    "train.eval_every": 0,
    "train.patience": 0,
    "train.log_every": 1,
    "train.cosine_every": 0,
    "log.time_every": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "optim.clip_norm": 0.0,
    "optim.warmup_steps": 0,
}


def check(config: Config) -> None:
    """What types alone cannot say.

    Raises:
      UserError: naming the key and the way out.
    """
    values = dict(flatten(dataclasses.asdict(config)))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            near = difflib.get_close_matches(str(values[key]), choices, 1, 0.0)[0]
            raise UserError(
                f"{key}: {values[key]!r} is not among {', '.join(choices)}; did you mean {near}?"
            )
    for key, lowest in LOWEST.items():
        if not values[key] >= lowest:  # so that nan fails
            raise UserError(f"{key}: {values[key]} is too small; use {lowest} or more")
    for key in ("align.temperature", "optim.learning_rate", "generate.temperature"):
        if not values[key] > 0:
            raise UserError(f"{key}: {values[key]} should be above 0")
    if not 0 < config.generate.top_p <= 1:
        raise UserError(f"generate.top_p: {config.generate.top_p} should lie in (0, 1]")
    if not 0 <= config.lora.dropout < 1:
        raise UserError(f"lora.dropout: {config.lora.dropout} should lie in [0, 1)")
    grouped = config.align.negatives == "group" and config.align.objective == "contrastive"
    # Fewer pairs than a group are one group.
    whole = config.batch.pairs < config.align.group or not config.batch.pairs % config.align.group
    if config.align.weight > 0 and grouped and not whole:
        raise UserError(
            f"batch.pairs: {config.batch.pairs} is no multiple of align.group="
            f"{config.align.group}; change one of them or set align.negatives=global"
        )
    if config.optim.missing == "skip" and config.trainable == "full":
        raise UserError("optim.missing: skip works on adapters only; set trainable=lora")
    if config.model.quantize != "none" and config.trainable == "full":
        raise UserError(
            f"model.quantize: {config.model.quantize} weights cannot be trained; set "
            "trainable=lora or model.quantize=none"
        )
    if config.model.quantize != "none" and config.generate.adapter == "merged":
        raise UserError(
            "generate.adapter: an adapter cannot be merged into a quantised base; set "
            "generate.adapter=unmerged or model.quantize=none"
        )
    if config.log.profile and (len(config.log.profile) != 2 or min(config.log.profile) < 1):
        raise UserError(
            f"log.profile: {config.log.profile} should be the first update and how many, both 1 or "
            "more, as in [10,3]"
        )
    for extra in config.objectives:
        if extra.phase not in ("task", "align"):
            raise UserError(f"objectives: phase {extra.phase!r} should be task or align")


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """[('align.layer', 16), ...] of nested dicts; lists are values."""
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows
