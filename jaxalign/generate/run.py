"""The host's part: prompts into batches, batches through the programs, answers back in order.

for rows, answers in answer_chunks(decoder, params, lora, prompts, Decoding(), stop_ids=stops):
    ...                                     # keep them: the next call may want the other rows alone
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import numpy as np

from jaxalign.errors import UserError
from jaxalign.generate import shapes
from jaxalign.generate.decoding import Decoding
from jaxalign.generate.loop import PATIENCE, Batch, Model, advance, regroup, share, start
from jaxalign.model.decoder import Decoder

Report = Callable[[int, int, int], None]


def generate(
    decoder: Decoder,
    params: dict,
    lora: dict | None,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
    report: Report | None = None,
    share_prefix: bool = True,
) -> list[list[int]]:
    """The answer to every prompt, in the order of the prompts.

    Every process of a run calls this with the same prompts and gets all answers.

    Args:
        decoder: the model; its adapter belongs to `lora`.
        params: weights; their dtype is the cache's.
        lora: adapter weights, or None for the base alone.
        prompts: token ids without padding.
        decoding: how tokens are chosen, and how many at most.
        stop_ids: an answer ends at the first of these.
        batch_size: prompts decoded together; beams multiply it.
        numbers: what distinguishes rows for `sample`; None: 0, 1, 2, ...
        report: called with the numbers of finished prompts, of all prompts and of new tokens in
            the answers so far.
        share_prefix: whether the first tokens that all prompts have in common are computed once.

    Returns:
        New token ids of each prompt without the stop token; a row of `max_new_tokens` ids never
        came to one.

    Raises:
        UserError: a prompt is empty, holds ids that the model has not, or leaves no room for the
            answer; batch_size below 1; as many numbers as prompts are not there.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for rows, found in answer_chunks(
        decoder,
        params,
        lora,
        prompts,
        decoding,
        stop_ids=stop_ids,
        batch_size=batch_size,
        numbers=numbers,
        report=report,
        share_prefix=share_prefix,
    ):
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
    return answers


def answer_chunks(
    decoder: Decoder,
    params: dict,
    lora: dict | None,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
    report: Report | None = None,
    share_prefix: bool = True,
    rows: Collection[int] | None = None,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Row numbers and answers of each of `shapes.chunks`, as `generate` (see there) orders them.

    A later call that wants only `rows` gives the chunks that hold them, bitwise the same.
    """
    worn = decoder.adapter if lora else None
    taken = worn.taken if worn else 0
    shapes.check(prompts, decoder.spec, decoding.max_new_tokens, taken)
    numbers = range(len(prompts)) if numbers is None else numbers
    if len(numbers) != len(prompts):
        raise UserError(f"{len(prompts)} prompts need as many numbers, not {len(numbers)}")
    # What depends on the whole of a prompt is not shared.
    share = share_prefix and not (worn and worn.by_input)
    layout = shapes.lay_out(prompts, batch_size, share)
    if rows is not None:
        layout = layout.only(rows)
    alone, after = Model(params, lora), None
    stops = np.array(sorted(set(stop_ids)), np.int32)
    progress = _Progress(layout.rows, report)
    for group in layout.groups:
        ahead, width = layout.width(group)
        if ahead and after is None:
            after = behind(alone, decoder, prompts[0][:ahead])
        model = after if after and ahead else alone
        run = _Chunk(decoder, model, stops, decoding, batch_size, progress)
        own = [prompts[i][ahead:] for i in group]
        yield group, run.answers(own, [numbers[i] for i in group], width)


def behind(model: Model, decoder: Decoder, first: Sequence[int]) -> Model:
    """The model behind the tokens with which all prompts begin."""
    tokens = np.zeros((1, shapes.padded(len(first))), np.int32)
    tokens[0, : len(first)] = first
    shared = share(model, tokens, np.int32(len(first)), decoder)
    return dataclasses.replace(model, shared=shared)


class _Progress:
    """Counts what is finished, for the caller's report."""

    def __init__(self, prompts: int, report: Report | None) -> None:
        self.prompts, self.report, self.finished, self.tokens = prompts, report, 0, 0

    def add(self, finished: int, tokens: int) -> None:
        self.finished, self.tokens = self.finished + finished, self.tokens + tokens
        if self.report and finished:
            self.report(self.finished, self.prompts, self.tokens)


class _Chunk:
    """One chunk on its way through the programs."""

    def __init__(
        self,
        decoder: Decoder,
        model: Model,
        stops: np.ndarray,
        decoding: Decoding,
        batch_size: int,
        progress: _Progress,
    ) -> None:
        self.decoder, self.model, self.stops = decoder, model, stops
        self.ahead = model.vectors(decoder)
        self.rule, self.new = decoding.rule, decoding.max_new_tokens
        self.seed = np.uint32(decoding.seed % 2**32)
        self.rungs, self.progress = shapes.rungs(batch_size), progress

    def answers(
        self, prompts: list[Sequence[int]], numbers: list[int], width: int
    ) -> list[list[int]]:
        """The answers of these prompts, which share a batch, in so many slots."""
        size = shapes.rung(len(prompts), self.rungs[0])
        batch = self._start(prompts, numbers, size, width)
        width += self.ahead
        found: list[list[int] | None] = [None] * len(prompts)
        places = [*range(len(prompts)), *[None] * (size - len(prompts))]  # batch row -> prompt
        while True:
            done, step = jax.device_get((batch.state.done, batch.state.step))
            over = step == self.new or done.all()
            self._collect(batch, places, np.ones_like(done) if over else done, found)
            if over:
                return [answer or [] for answer in found]
            batch, places = self._fit(batch, places, done, int(step), width)
            few = max((rung for rung in self.rungs if rung < len(places)), default=0)
            batch = advance(
                self.model, batch, self.stops, self.seed, np.int32(few), self.decoder, self.rule
            )

    def _start(
        self, prompts: list[Sequence[int]], numbers: list[int], size: int, width: int
    ) -> Batch:
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        names = np.zeros(size, np.uint32)
        names[: len(numbers)] = np.asarray(numbers, np.uint32)
        for row, prompt in enumerate(prompts):
            lengths[row] = len(prompt)
            tokens[row, : len(prompt)] = prompt
        slots = shapes.first_slots(self.ahead + width, self.new - 1)
        return start(
            self.model,
            tokens,
            lengths,
            names,
            self.stops,
            self.seed,
            self.decoder,
            self.rule,
            self.new,
            slots,
        )

    def _collect(
        self,
        batch: Batch,
        places: list[int | None],
        done: np.ndarray,
        found: list[list[int] | None],
    ) -> None:
        """Writes down the answers of rows that are done."""
        fresh = [
            (row, prompt)
            for row, prompt in enumerate(places)
            if done[row] and prompt is not None and found[prompt] is None
        ]
        if not fresh:
            return
        written, counts = jax.device_get(batch.state.answers())
        for row, prompt in fresh:
            found[prompt] = written[row, : counts[row]].tolist()
        self.progress.add(len(fresh), sum(int(counts[row]) for row, _ in fresh))

    def _fit(
        self, batch: Batch, places: list[int | None], done: np.ndarray, step: int, width: int
    ) -> tuple[Batch, list[int | None]]:
        """The batch as small as its open rows allow, and with room for the next token."""
        open_ = np.flatnonzero(~done)
        size, slots = len(places), batch.cache.slots
        if step + PATIENCE <= self.new:
            size = min(size, shapes.rung(len(open_), self.rungs[0]))
        if width + step > slots:
            slots = shapes.more_slots(slots, width, self.new - 1)
        if size == len(places) and slots == batch.cache.slots:
            return batch, places
        rows = np.arange(size, dtype=np.int32)
        if size < len(places):
            rows = np.concatenate([open_, np.flatnonzero(done)])[:size].astype(np.int32)
        places = [places[row] if not done[row] else None for row in rows]
        return regroup(batch, rows, done[rows], slots, self.rule), places
