"""From settings to streams: files are read, checked, transformed, tokenised and put in an order.

tasks = task_stream(config, tokenizer, "train")          # a loader.TaskStream
pairs = pair_stream(config, tokenizer, "valid")          # a loader.PairStream
prompts = prompt_stream(config, tokenizer, "train")      # a loader.PromptStream
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jaxalign.data import tasks
from jaxalign.data.batch import Encoded, EncodedPrompts, cover
from jaxalign.data.chat import encode_examples
from jaxalign.data.flat import Text, begin, lay, own_of, shared_by
from jaxalign.data.languages import split_direction
from jaxalign.data.loader import (
    CAPACITY_STEP,
    Order,
    PairStream,
    Row,
    TaskStream,
    longer,
)
from jaxalign.data.pairs import encode_pairs, shuffle_targets
from jaxalign.data.prompts import PromptStream, encode_both
from jaxalign.data.report import Report
from jaxalign.data.sampling import (
    Grouped,
    Packed,
    Sequential,
    Shuffled,
    choose_buckets,
    even,
    mixture,
)
from jaxalign.data.stem import Stem
from jaxalign.data.wanted import wanted_examples, wanted_pairs, wanted_prompts
from jaxalign.errors import UserError
from jaxalign.settings import AlignConfig, Config, TaskConfig
from jaxalign.settings.together import least_pairs

Answered = TypeVar("Answered", Encoded, EncodedPrompts)

# Own tokens of the longest text that `batch.pack=auto` lays end to end: scores of longer ones are
# many, and attention kernels, which form none, take padded rows.
LONGEST = 1024

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def task_stream(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    ways: int = 1,
    block: int = 0,
) -> TaskStream:
    """The task rows of a run.

    Args:
        config: uses seed, task, prompt, batch and mesh.seq.
        tokenizer: from `load_tokenizer`.
        split: 'train' (shuffled, endless, packed if asked) or 'valid' (file order, once).
        ways: shares of a batch's rows on different devices.
        block: consecutive rows of a batch that may change places; 0: all, 1: none.

    Raises:
        UserError: data missing or broken; names file:line or the key.
    """
    examples, left_out, made = wanted_examples(config, split)
    return stream_of(examples, config, tokenizer, split, ways, left_out, made, block)


def stream_of(
    examples: list[tasks.Example],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "valid",
    ways: int = 1,
    left_out: int = 0,
    made: tuple[int, int] = (0, 0),
    block: int = 0,
) -> TaskStream:
    """The stream of rows that are rendered already; see `task_stream`.

    Args:
        left_out: rows in other languages, for the report.
        made: rows before and behind transforms, for the report.

    Raises:
        UserError: rows of which no token of an answer is left.
    """
    directed = tasks.TASKS[config.task.kind].directed
    limit = min(config.batch.max_length, tokenizer.model_max_length)
    encoded = encode_examples(
        examples, tokenizer, config.prompt.template, config.prompt.system, limit
    )
    rows = [
        dataclasses.replace(
            row,
            everything=config.task.loss == "all",
            languages=split_direction(row.language) if directed else row.languages,
        )
        for row in _answered(encoded, f"task.{split}", limit)
    ]
    report = _report(
        rows,
        len(encoded),
        [r.whole > len(r.tokens) for r in rows],
        left_out,
        made,
    )
    size, pad_id = config.batch.size, tokenizer.pad_token_id
    lengths = [len(row.tokens) for row in rows]
    grouped = size if config.task.order == "grouped" else 0
    order: Order = _order(rows, config, config.task, split, grouped)
    halves = 2 if config.task.halved and split == "train" else 1
    packs = config.batch.pack == "segments" and isinstance(order, Shuffled)
    texts = [[Text(r.tokens, r.first - 1, r.first, r.roles)] for r in rows]
    if packs:  # a slot holds several rows; which ones must not depend on the devices
        uses = size / halves * _slot_length(lengths, limit, size) * len(rows) / sum(lengths)
    else:
        uses = size / (ways * halves)
    stem = _shared(config, texts, uses, packs)
    started = begin(texts, stem)
    own = [own_of(text) for (text,) in started]
    buckets = () if packs else _buckets(config, lengths, size, "batch.max_length")
    if packs and isinstance(order, Shuffled):
        slot = max(config.batch.buckets, default=_slot_length(own, limit, size))
        order = Packed(order, own, [r.targets for r in rows], slot, config.seed, CAPACITY_STEP)
        buckets = (slot,)
    layout = None
    if _lays(config, max(own), packs) and (stem.nodes or not packs):
        packed = buckets[0] if packs else 0
        layout = lay(started, order, size, ways * halves, pad_id, stem, packed, block, halves)
    elif packs:
        _check_longest(own, buckets[0], "batch.max_length")
    return TaskStream(rows, order, size, buckets, pad_id, report, layout)


def pair_stream(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    ways: int = 1,
    block: int = 0,
) -> PairStream:
    """The sentence pairs of a run; arguments and errors as `task_stream`.

    `align.control: shuffled` moves the targets of training and validation pairs alike.
    """
    pairs, others, made = wanted_pairs(config, split)
    if config.align.control == "shuffled":
        pairs = shuffle_targets(pairs, config.seed)
    size = config.batch.pairs
    if split == "train" and len(pairs) < (least := least_pairs(config)):
        many = f"batch.pairs={size}" if least == size else (
            f"the {least} of an update (align.rule=cached, batch.pairs={size})"
        )  # fmt: skip
        raise UserError(
            f"align.train holds {len(pairs)} pairs, fewer than {many}: a pair would be its own "
            "negative; lower batch.pairs or add pairs"
        )
    limit = min(config.batch.pair_max_length, tokenizer.model_max_length)
    rows = encode_pairs(pairs, tokenizer, limit)
    cut = [r.whole > longer(r) for r in rows]
    report = _report(rows, len(rows), cut, others, made)
    buckets = _buckets(config, [longer(r) for r in rows], size, "batch.pair_max_length")
    order = _order(rows, config, config.align, split)
    pad_id = tokenizer.pad_token_id
    texts = [
        [Text(side, len(side) - 1, len(side)) for side in (row.source, row.target)] for row in rows
    ]
    stem = _shared(config, texts, size / ways)
    started = begin(texts, stem)
    laid = _lays(config, max(own_of(text) for row in started for text in row))
    layout = lay(started, order, size, ways, pad_id, stem, block=block) if laid else None
    return PairStream(rows, order, size, buckets, pad_id, report, layout)


def prompt_stream(
    config: Config, tokenizer: PreTrainedTokenizerBase, split: str = "train", ways: int = 1
) -> PromptStream:
    """The rows of one answer behind two prompts; arguments and errors as `task_stream`.

    They have no layout, whatever `batch.pack` says: their two answers, of one row, would be apart
    in a sequence.
    """
    prompts, others, made = wanted_prompts(config, split)
    limit = min(config.batch.max_length, tokenizer.model_max_length)
    asked = config.prompt
    encoded = encode_both(prompts, tokenizer, asked.template, asked.system, limit)
    rows = _answered(encoded, f"align.{split}", limit)
    cut = [row.whole > longer(row) for row in rows]
    report = _report(rows, len(encoded), cut, others, made)
    size = config.batch.pairs
    buckets = _buckets(config, [longer(row) for row in rows], size, "batch.max_length")
    order = _order(rows, config, config.align, split)
    return PromptStream(rows, order, size, buckets, tokenizer.pad_token_id, report)


# Of the alignment phase, by `align.rows`.
ALIGNED: dict[str, Callable[..., PairStream | PromptStream]] = {
    "pairs": pair_stream,
    "prompts": prompt_stream,
}


def _answered(encoded: Sequence[Answered], name: str, limit: int) -> list[Answered]:
    """The rows of which a token of the answer is there to be predicted.

    Raises:
        UserError: there is none, or a row's answer is no token.
    """
    for row in encoded:
        if not row.targets and row.whole <= limit:
            raise UserError(
                f"{row.origin}: the answer adds no token to the prompt, so no token of this row "
                "would be trained; fill it or remove the row"
            )
    rows = [row for row in encoded if row.targets]
    if not rows:
        raise UserError(
            f"{name}: in all {len(encoded)} rows the prompt alone fills the {limit} tokens "
            f"allowed, nothing is left to train; raise batch.max_length"
        )
    return rows


def _shared(
    config: Config, texts: Sequence[Sequence[Text]], uses: float, packs: bool = False
) -> Stem:
    """What these texts have in common, if it is to be computed once."""
    if config.batch.share_prefix == "off" or not _lays(config, 0, packs):
        return Stem()
    return shared_by(texts, uses)


def _lays(config: Config, longest: int, packs: bool = False) -> bool:
    """Whether rows with so many own tokens are laid end to end, or packed rows behind a stem."""
    if config.batch.pack == "none" or config.mesh.seq != 1:  # a sequence split over devices
        return False
    if config.adapter.kind == "pool":  # what stands in front depends on the text
        return False
    if config.batch.buckets and not packs:  # lengths of padded rows
        return False
    return longest <= LONGEST or packs or config.batch.pack == "flatten"


def _report(
    rows: Sequence[Row], read: int, cut: Sequence[bool], others: int, made: tuple[int, int]
) -> Report:
    """Counts; `made`: rows before transforms and behind them."""
    languages = dict(sorted(Counter(row.language for row in rows).items()))
    return Report(read, len(rows), sum(cut), read - len(rows), languages, others, *made)


def _order(
    rows: Sequence[Row],
    config: Config,
    part: TaskConfig | AlignConfig,
    split: str,
    grouped: int = 0,
) -> Sequential | Shuffled | Grouped:
    """The order of rows; `grouped`: so many in a row are of one language.

    Validation takes the rows as they are in the files, or, where it reads a part of them, such that
    the part has its share of every language.
    """
    valid = split != "train"
    # Proportional sampling is plain shuffling: each row once an epoch.
    apart = config.train.eval_batches if valid else grouped or part.sampling != "proportional"
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.language if apart else "", []).append(i)
    members = [np.array(g) for g in groups.values()]
    if valid:
        return Sequential(even(members))
    counts = {name: len(group) for name, group in groups.items()}
    shares = list(mixture(counts, part.sampling, part.sampling_temperature).values())
    # Two phases have two orders, though both start from the run's seed.
    seed = config.seed + (part is config.align)
    return Grouped(members, shares, seed, grouped) if grouped else Shuffled(members, shares, seed)


def _slot_length(lengths: Sequence[int], limit: int, size: int) -> int:
    """The maximum length, or less where all rows together do not fill one batch of it."""
    return cover(min(limit, max(max(lengths), -(-sum(lengths) // size))), 8)


def _buckets(config: Config, lengths: Sequence[int], size: int, key: str) -> tuple[int, ...]:
    buckets = tuple(sorted(config.batch.buckets))
    if not buckets:
        return choose_buckets(lengths, size)
    _check_longest(lengths, buckets[-1], key)
    return buckets


def _check_longest(lengths: Sequence[int], last: int, key: str) -> None:
    if last < max(lengths):
        raise UserError(
            f"batch.buckets end at {last}, but the longest row has {max(lengths)} tokens; "
            f"add a bucket or set {key}={last}"
        )
