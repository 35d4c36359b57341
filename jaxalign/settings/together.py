"""What settings say together: combinations that cannot be meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxalign.errors import UserError
from jaxalign.settings.data import AUTO

if TYPE_CHECKING:
    from jaxalign.settings import Config
    from jaxalign.settings.data import AlignConfig


def check_together(config: Config) -> None:
    """Refuses settings that contradict each other; each by itself is within its bounds.

    Raises:
      UserError: naming the key and the way out.
    """
    batch, every = config.batch, config.align.every
    for pairs in compared(config):
        # Fewer pairs than a group are one group.
        whole = pairs < config.align.group or not pairs % config.align.group
        if config.align.weight > 0 and _grouped(config) and not whole:
            raise UserError(
                f"batch.pairs: {pairs} is not a multiple of align.group="
                f"{config.align.group}; change one of them or set align.negatives=global"
            )
    if config.align.rows == "prompts" and config.align.weight > 0:
        _check_prompts(config.align)
    if every == "microbatch" and batch.accumulate == 1:
        rare = next((n for n, one in enumerate(config.objectives) if one.every > 1), None)
        if rare is not None and config.task.weight > 0 and config.align.weight > 0:
            raise UserError(
                f"objectives[{rare}].every: with batch.accumulate=1 the phases take turns by "
                "update; set align.every=step, which does the same, or align.every=joint"
            )
    if config.task.order == "grouped" and batch.pack == "segments":
        raise UserError(
            "task.order: packed sequences hold rows of several languages; set batch.pack=auto or "
            "task.order=mixed"
        )
    if batch.pack == "flatten" and batch.buckets:
        raise UserError(
            "batch.pack: rows end to end have no padded lengths; set batch.buckets=[] or "
            "batch.pack=auto"
        )
    if batch.pack == "flatten" and config.mesh.seq != 1:
        raise UserError(
            f"batch.pack: mesh.seq={config.mesh.seq} cuts sequences, and rows end to end stay on "
            "their device; set mesh.seq=1 or batch.pack=auto"
        )
    kind = config.adapter.kind
    if kind == "pool" and batch.pack in ("segments", "flatten"):
        raise UserError(
            f"batch.pack: {batch.pack} puts several texts into a sequence, and the prompts of a "
            "pool depend on the text; set batch.pack=auto or another adapter.kind"
        )
    if kind != "lora" and config.trainable == "full":
        raise UserError(
            f"adapter.kind: a {kind} is not trained where trainable=full trains the base itself; "
            "set trainable=lora or adapter.kind=lora"
        )
    if kind != "lora" and config.generate.adapter == "merged":
        raise UserError(
            f"generate.adapter: a {kind} is not a change of weights and cannot be merged; set "
            "generate.adapter=unmerged"
        )
    if config.adapter.start and config.trainable == "full":
        raise UserError(
            f"adapter.start: trainable=full begins from the base and would not read "
            f"{config.adapter.start}; merge it into the base first (jaxalign merge --into-base) "
            "and name that as model.path"
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
    if config.log.profile and len(config.log.profile) != 2:
        raise UserError(
            f"log.profile: {config.log.profile} should be the first update and how many, both 1 or "
            "more, as in [10,3]"
        )


def least_pairs(config: Config) -> int:
    """How many pairs there must be so that one loss meets none of them twice."""
    most = max(compared(config))
    most = min(most, config.align.group) if _grouped(config) else most
    return max(most, config.batch.pairs)


def compared(config: Config) -> list[int]:
    """The numbers of pairs of which one loss can be."""
    batch, numbers = config.batch, {1}
    if config.align.rule == "cached":  # the pairs of an update are one batch
        alternating = config.align.every == "microbatch" and config.task.weight > 0
        half = batch.accumulate // 2, -(-batch.accumulate // 2)
        numbers = {*half} - {0} if alternating else {batch.accumulate}
    return sorted(batch.pairs * number for number in numbers)


def _grouped(config: Config) -> bool:
    """Whether a pair meets those of its group alone."""
    return config.align.negatives == "group" and config.align.objective == "contrastive"


def unread(config: Config) -> Iterator[str]:
    """Sentences about settings that nothing reads.

    A baseline inherits them, so they are no mistakes; nobody may take them for what was trained.
    """
    for number, extra in enumerate(config.objectives):
        phase = extra.phase
        if not getattr(config, phase).weight:
            yield (
                f"objectives[{number}] ({extra.objective}) is not trained: {phase}.weight is 0; to "
                f"train it alone, name it as {phase}.objective"
            )
    for keys, why in UNREAD.items():
        changed = [f"{key}={value}" for key, value in _changed(config, keys)]
        if changed and (reason := why(config)):
            verb = "is" if len(changed) == 1 else "are"
            yield f"{', '.join(changed)} {verb} not read: {reason}"
    if config.optim.combine != "weighted" and (alone := _one_phase(config)):
        yield f"optim.combine={config.optim.combine} is not read: {alone}"


def _other_adapter(kinds: str, config: Config) -> str:
    kind = config.adapter.kind
    if config.trainable == "full":
        return "trainable=full trains the base itself"
    return "" if kind in kinds.split() else f"adapter.kind={kind}"


def _no_temperature(part: str, config: Config) -> str:
    sampling = getattr(config, part).sampling
    return "" if sampling == "temperature" else f"{part}.sampling={sampling}"


# Settings, separated by blanks -> why nothing reads them; '' where something does.
UNREAD: dict[str, Callable[[Config], str]] = {
    "lora.r lora.alpha lora.dropout lora.targets lora.layers lora.scaling lora.variant lora.ranks "
    "lora.alphas": partial(_other_adapter, "lora"),
    "adapter.num_virtual_tokens": partial(_other_adapter, "prefix prompt pool"),
    "adapter.pool_size adapter.temperature": partial(_other_adapter, "pool"),
    "task.sampling_temperature": partial(_no_temperature, "task"),
    "align.sampling_temperature": partial(_no_temperature, "align"),
    "task.inner_rate task.inner_steps": lambda config: (
        "" if config.task.halved else f"task.rule={config.task.rule}"
    ),
    "align.group": lambda config: (
        "align.negatives=global"
        if config.align.objective == "contrastive" and not _grouped(config)
        else ""
    ),
    "batch.pair_max_length": lambda config: (
        "rows of two prompts are as long as those of the task (batch.max_length)"
        if config.align.rows == "prompts"
        else ""
    ),
    "align.pivot": lambda config: "align.rows=pairs" if config.align.rows == "pairs" else "",
}


def _changed(config: Config, keys: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of those that are not at their defaults."""
    for key in keys.split():
        part, _, name = key.partition(".")
        group = getattr(config, part)
        if (value := getattr(group, name)) != getattr(type(group)(), name):
            yield key, value


def _one_phase(config: Config) -> str:
    """Why an update never has gradients of two phases; '' where it has."""
    every = config.align.every
    if off := [name for name in ("task", "align") if not getattr(config, name).weight]:
        return f"{off[0]}.weight is 0"
    if every == "step" or (every == "microbatch" and config.batch.accumulate == 1):
        return f"an update holds one phase alone (align.every={every}); set align.every=joint"
    return ""


def _check_prompts(align: AlignConfig) -> None:
    """What is of sentence pairs alone."""
    for key, value, default in (
        ("layer", AUTO, "a number"),
        ("control", "shuffled", "none"),
    ):
        if getattr(align, key) == value:
            raise UserError(
                f"align.{key}: {value} needs sentence pairs, and align.rows=prompts has prompts "
                f"and answers; set align.{key} to {default}, or align.rows=pairs"
            )
