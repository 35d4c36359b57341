"""Every setting with its type, default, bounds and explanation: they stand here and nowhere else.

config = Config()
config.align.layer           # 16
check(config)                # bounds, and what settings say together
dict(abouts())["align.layer"].bounds.phrase()      # 'a whole number, 0 or more, or auto'
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxalign.bounds import About, from_home, setting
from jaxalign.settings.answers import EvaluateConfig, GenerateConfig
from jaxalign.settings.course import CheckpointConfig, LogConfig, OptimConfig, TrainConfig
from jaxalign.settings.data import (
    AUTO,
    UNASKED,
    AlignConfig,
    BatchConfig,
    ExtraObjective,
    TaskConfig,
)
from jaxalign.settings.model import (
    AdapterConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    PromptConfig,
)
from jaxalign.settings.together import check_together

__all__ = [
    "AUTO", "MOVED", "AdapterConfig", "AlignConfig", "BatchConfig", "CheckpointConfig", "Config",
    "EvaluateConfig", "ExtraObjective", "GenerateConfig", "LogConfig", "LoraConfig", "MeshConfig",
    "ModelConfig", "OptimConfig", "PromptConfig", "TaskConfig", "TrainConfig", "abouts", "check",
    "flatten", "renamed", "settle_paths",
]  # fmt: skip

# What settings of older versions are called now.
MOVED = {"lora.start": "adapter.start"}


@dataclass
class Config:
    """One run."""

    output: str = setting(
        "runs/default",
        "folder of the run, or `gs://BUCKET/FOLDER`",
        path=True,
        see="tpu.md#buckets",
    )
    seed: int = setting(1, "order of rows, adapter's start, dropout", lowest=0, highest=2**32 - 1)
    trainable: str = setting(
        "lora", "`full`: every weight, float32 masters", choices=("lora", "full")
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    objectives: list[ExtraObjective] = setting(
        [], "more terms of a phase, each with these keys", free=True
    )
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def judged(self) -> str:
        """The kind of task that is asked and judged."""
        return self.task.kind if self.evaluate.kind == "task" else self.evaluate.kind

    @property
    def prompted(self) -> bool:
        """Whether rows of `task.kind` are trained: by the task, or as one answer to two prompts."""
        behind_two = self.align.rows == "prompts" and self.align.weight > 0
        return self.task.weight > 0 or behind_two

    @property
    def templated(self) -> bool:
        """Whether prompts of the training were built by a template."""
        return self.prompted and self.task.kind not in UNASKED


def check(config: Config) -> None:
    """Refuses what types alone cannot: values outside their bounds, settings that contradict.

    Raises:
      UserError: naming the key and the way out.
    """
    for key, about, value in _walk(config):
        about.bounds.check(key, value)
    check_together(config)


def settle_paths(config: Config) -> None:
    """Puts the home folder for `~` at the start of every path, once for all who read it."""
    for key, about, value in _walk(config):
        if about.bounds.path:
            *groups, name = key.split(".")
            setattr(functools.reduce(getattr, groups, config), name, from_home(value))


def abouts() -> list[tuple[str, About]]:
    """Bounds and explanation of every key, in the order of the fields.

    Those of a group are its class's docstring; `objectives.weight` is of every further objective.
    """
    return [(key, about) for key, about, _ in _walk(Config(), groups=True)]


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """[('align.layer', 16), ...] of nested dicts; lists are values."""
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))
    return rows


def renamed(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested settings that were saved, also by an older version, under the names of today."""
    for old, new in MOVED.items():
        (before, was), (behind, name) = (key.split(".") for key in (old, new))
        if was in tree.get(before, {}):
            kept = {key: value for key, value in tree[before].items() if key != was}
            more = {name: tree[before][was]} | tree.get(behind, {})
            tree = tree | {before: kept, behind: more}
    return tree


def _walk(part: Any, prefix: str = "", groups: bool = False) -> Iterator[tuple[str, About, Any]]:
    """Key, facts and value of every field; with `groups` of the groups, too."""
    for one in dataclasses.fields(part):
        key, value = prefix + one.name, getattr(part, one.name)
        about = one.metadata.get("about")
        if about is None:
            if groups:
                yield key, About(type(value).__doc__ or ""), value
            yield from _walk(value, f"{key}.", groups)
        elif key != "objectives":
            yield key, about, value
        elif groups:
            yield key, about, value
            yield from _walk(ExtraObjective(), "objectives.")
        else:
            for number, extra in enumerate(value):
                yield from _walk(extra, f"objectives[{number}].")
