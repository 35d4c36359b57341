"""The rows of a run before they are tokenised: read, transformed, in the languages asked for.

examples, others, made = wanted_examples(config)     # [Example, ...] of task.train, and counts
pairs, *_ = wanted_pairs(config, "valid")            # [Pair, ...] of align.valid
prompts, *_ = wanted_prompts(config)                 # [Prompts, ...] where align.rows=prompts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxalign.data import sources, tasks
from jaxalign.data.languages import split_direction
from jaxalign.data.pairs import Pair, to_pair
from jaxalign.data.prompts import Prompts, two_prompts
from jaxalign.data.transforms import transformed
from jaxalign.errors import UserError
from jaxalign.settings import AlignConfig, Config, TaskConfig

Row = TypeVar("Row")
# The rows; how many are in other languages; the numbers of rows before transforms and behind them.
Wanted = tuple[list[Row], int, tuple[int, int]]


def wanted_examples(config: Config, split: str = "train") -> Wanted[tasks.Example]:
    """The rows of a run's task, rendered, behind `task.transforms` and in `task.languages`.

    Returns:
        The rows; how many are in other languages; the numbers of rows before transforms and behind.

    Raises:
        UserError: data missing or broken, or no row of a language.
    """
    records, found = _records(config.task, "task", split, config.seed)
    rendered = [tasks.render(config.task.kind, record) for record in records]
    directed = tasks.TASKS[config.task.kind].directed
    examples = in_task_languages(rendered, config.task, directed, split)
    return examples, len(rendered) - len(examples), (found, len(records))


def wanted_pairs(config: Config, split: str = "train") -> Wanted[Pair]:
    """The pairs of a run as sentences; returns and errors as `wanted_examples`."""
    records, found = _records(config.align, "align", split, config.seed)
    pairs = [to_pair(record) for record in records]
    kept = _keep(pairs, config.align, "align", split, lambda p: [set(p.languages)])
    return kept, len(pairs) - len(kept), (found, len(records))


def wanted_prompts(config: Config, split: str = "train") -> Wanted[Prompts]:
    """The rows of two prompts of a run; returns and errors as `wanted_examples`."""
    records, found = _records(config.align, "align", split, config.seed)
    both = two_prompts(records, config.task.kind, config.align.pivot)
    prompts = _keep(both, config.align, "align", split, lambda p: [set(p.languages)])
    return prompts, len(both) - len(prompts), (found, len(records))


def read_again(
    config: Config, part: TaskConfig | AlignConfig
) -> Sequence[tasks.Example | Pair | Prompts]:
    """The training rows of one of a finished run's two streams, as far as its files have them now.

    There are none where one of its sources is no file (which might be a long download), is gone, or
    holds other rows.
    """
    if not sources.in_files(part.train):
        return []
    try:
        if isinstance(part, TaskConfig):
            return wanted_examples(config)[0]
        return (wanted_prompts if part.rows == "prompts" else wanted_pairs)(config)[0]
    except (UserError, OSError):
        return []


def in_task_languages(
    examples: list[tasks.Example], part: TaskConfig, directed: bool, split: str = "train"
) -> list[tasks.Example]:
    """The examples in `task.languages`; all of them where it is empty.

    Args:
        directed: whether they are translations, whose language is a direction.

    Raises:
        UserError: none is or, of the rows of a training, none of one of the languages.
    """
    return _keep(
        examples,
        part,
        "task",
        split,
        lambda e: _direction(e.language) if directed else [{e.language}],
    )


def _direction(language: str) -> list[set[str]]:
    """The direction 'de-en' is wanted by its own name or by both its sides."""
    return [{language}, set(split_direction(language))]


def _records(
    part: TaskConfig | AlignConfig, name: str, split: str, seed: int
) -> tuple[list[sources.Record], int]:
    """The records that a stream is made of, and how many rows the files hold."""
    named = getattr(part, split)
    if not named:
        raise UserError(f"{name}.{split} names no data; give files, globs, hf:NAME or tfds:NAME")
    if split == "valid":
        sources.check_once(named, f"{name}.valid")
    records = sources.read_all(named, part.columns, f"{name}.columns")
    return transformed(records, part.transforms, f"{name}.transforms", split, seed), len(records)


def _keep(
    items: list[Any],
    part: TaskConfig | AlignConfig,
    name: str,
    split: str,
    sides: Callable[[Any], list[set[str]]],
) -> list[Any]:
    """Items in the languages wanted: one of the alternatives of `sides` is within them."""
    wanted = set(part.languages)
    if not wanted:
        return items
    kept = [item for item in items if any(s <= wanted for s in sides(item))]
    # In training a name without rows is a slip of the pen; validation sets may hold fewer.
    matched = set().union(*(s for item in kept for s in sides(item))) if kept else set()
    missing = sorted(wanted - matched) if split == "train" else []
    if missing or not kept:
        present = sorted(set().union(*(s for item in items for s in sides(item))) - {""})
        raise UserError(
            f"{name}.languages: no row of {name}.{split} is in "
            f"{', '.join(missing or sorted(wanted))}; present: "
            f"{', '.join(present) or 'none, the rows name no language'}"
        )
    return kept
