"""Typed settings: defaults live here and nowhere else.

A run's configuration is these defaults, then one sparse YAML file, then `key=value` words of the
command line; OmegaConf merges and type-checks them.

    loaded = load('configs/demo.yaml', ['align.layer=2', 'optim.learning_rate=1e-3'])
    loaded.config.align.layer     # 2
    loaded.rows()                 # every value with its origin: default, file or command line
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jaxalign.errors import UserError

# `${demo:data/train.en.jsonl}`: a file of the demo, wherever the package is installed.
OmegaConf.register_resolver(
    "demo", lambda name: str(Path(__file__).parent / "demo" / "assets" / name), replace=True
)


@dataclass
class ModelConfig:
    """The frozen base."""

    path: str = ""  # folder in Hugging Face layout, or a hub name
    revision: str | None = None  # hub branch, tag or commit
    dtype: str = "bfloat16"  # of the frozen weights and the activations: bfloat16 | float32
    remat: str = "full"  # what the backward pass recomputes: none | dots | full
    attention: str = "auto"  # auto | reference | xla


@dataclass
class LoraConfig:
    """The adapter; names and defaults are PEFT's, values the paper's."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "gate", "up", "down"])
    layers: str = "all"  # all | 1..16 (blocks 1 to 16, inclusive) | 3,5,8
    scaling: str = "standard"  # alpha/r | rank_stabilised: alpha/sqrt(r)
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
    layer: int = 16  # output of this block, counted from 1; 0: the embeddings
    temperature: float = 0.1
    direction: str = "one_way"  # one_way (source finds its target) | symmetric
    negatives: str = "group"  # group: among consecutive pairs | global: the whole micro-batch
    group: int = 32  # pairs per group
    detach: str = "none"  # stop the gradient on: none | source | target
    pooling: str = "mean"  # mean | first | last, over real tokens
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


@dataclass
class CheckpointConfig:
    """What survives."""

    every: int = 200  # updates
    keep: int = 2  # newest; the best is always kept besides
    resume: str = "auto"  # auto | never


@dataclass
class MeshConfig:
    """Devices along each axis; one of them may be -1 (the rest)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass
class LogConfig:
    """JSONL is always written."""

    progress: str = "auto"  # auto (a bar on a terminal) | none
    tensorboard: bool = False
    wandb: str | None = None  # project name


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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
    "trainable": ("lora", "full"),
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "reference", "xla"),
    "lora.scaling": ("standard", "rank_stabilised"),
    "prompt.template": ("chat", "llama3_paper"),
    "task.kind": ("rows", "slots", "intent", "intent_slots", "translation", "ner"),
    "task.sampling": ("proportional", "uniform", "temperature"),
    "align.every": ("microbatch", "step", "joint"),
    "align.direction": ("one_way", "symmetric"),
    "align.negatives": ("group", "global"),
    "align.detach": ("none", "source", "target"),
    "align.pooling": ("mean", "first", "last"),
    "align.control": ("none", "shuffled"),
    "align.sampling": ("proportional", "uniform", "temperature"),
    "batch.pack": ("none", "segments"),
    "optim.schedule": ("inverse_sqrt", "cosine", "linear", "constant"),
    "optim.average": ("tokens", "microbatch"),
    "optim.missing": ("zero", "skip"),
    "train.goal": ("min", "max"),
    "checkpoint.resume": ("auto", "never"),
    "log.progress": ("auto", "none"),
}


def load(path: str | Path | None, words: list[str] | tuple[str, ...] = ()) -> Loaded:
    """Defaults, then the YAML file, then `key=value` words, merged and checked.

    Raises:
      UserError: a file that is not there or not YAML, an unknown key (the nearest is named), a
        value of the wrong type or outside its choices, settings that contradict each other.
    """
    layers = []
    if path is not None:
        layers.append((str(path), _read_yaml(Path(path))))
    wrong = [word for word in words if "=" not in word or word.startswith(("=", "-"))]
    if wrong:
        raise UserError(f"{wrong[0]!r} is no setting; write key=value, as in align.layer=16")
    layers.append(("command line", _read_words(words)))
    merged = OmegaConf.structured(Config)
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for key in _leaves(layer):
            _check_known(key, origin)
            origins[key] = origin
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise _wrong_value(error, origin) from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        origin = origins.get(str(getattr(error, "full_key", "")), str(path))
        raise _wrong_value(error, origin) from error
    check(config)
    return Loaded(config, origins)


@dataclass
class Loaded:
    """A configuration and where its values come from (keys absent here are defaults)."""

    config: Config
    origins: dict[str, str]

    def rows(self) -> list[tuple[str, Any, str]]:
        """(key, value, origin) of every setting."""
        return [
            (key, value, self._origin(key))
            for key, value in flatten(dataclasses.asdict(self.config))
        ]

    def _origin(self, key: str) -> str:
        named = [k for k in self.origins if key == k or key.startswith(k + ".")]
        return self.origins[named[0]] if named else "default"


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """[('align.layer', 16), ...] of nested dicts; lists are values."""
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


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
    for key in ("align.temperature", "optim.learning_rate"):
        if not values[key] > 0:
            raise UserError(f"{key}: {values[key]} should be above 0")
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
    for extra in config.objectives:
        if extra.phase not in ("task", "align"):
            raise UserError(f"objectives: phase {extra.phase!r} should be task or align")


LOWEST = {
    "batch.size": 1,
    "batch.pairs": 1,
    "batch.accumulate": 1,
    "batch.max_length": 2,
    "batch.pair_max_length": 1,
    "align.layer": 0,
    "align.group": 1,
    "align.weight": 0.0,
    "task.weight": 0.0,
    "train.steps": 0,
    "train.eval_every": 0,
    "train.patience": 0,
    "train.log_every": 1,
    "train.cosine_every": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "optim.clip_norm": 0.0,
    "optim.warmup_steps": 0,
}


def _read_yaml(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        found = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable"
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8; save it as UTF-8") from error
    if not OmegaConf.is_dict(found):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    return found


def _read_words(words: Sequence[str]) -> Any:
    import yaml

    layer = OmegaConf.create()
    for word in words:
        try:
            layer = OmegaConf.merge(layer, OmegaConf.from_dotlist([word]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"command line: cannot read {word!r}; quote the value") from error
    return layer


def _wrong_value(error: OmegaConfBaseException, origin: str) -> UserError:
    key = getattr(error, "full_key", None) or "a value"
    reason = str(error).splitlines()[0]
    if isinstance(_known().get(key), list):
        reason = f"not a list; write {key}=[one,two]"
    return UserError(f"{origin}: {key}: {reason}")


def _leaves(layer: Any) -> list[str]:
    plain = OmegaConf.to_container(layer)
    return [key for key, _ in flatten({str(k): v for k, v in plain.items()})]


def _known() -> dict[str, Any]:
    return dict(flatten(dataclasses.asdict(Config())))


def _check_known(key: str, origin: str) -> None:
    known = _known()
    # Free-form dictionaries (columns, options) are known by their own key alone.
    if key in known or any(key.startswith(k + ".") and v == {} for k, v in known.items()):
        return
    if any(k.startswith(key + ".") for k in known):
        raise UserError(f"{origin}: {key} is a group of settings; set one of its keys")
    near = difflib.get_close_matches(key, known, 1, 0.0)[0]
    raise UserError(f"{origin}: unknown setting {key!r}; did you mean {near!r}?")
