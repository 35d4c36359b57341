"""Which rows come when: order, language mixture and packing as pure functions of (seed, position).

A stream is an endless line of slots; a slot is one sequence of a batch and names the rows in it.
Any stretch of the line can be asked for at any time, so a run resumes from its batch index alone.

    order = Shuffled(groups=[np.arange(100)], weights=[1.0], seed=1)
    order.slots(0, 4)        # [(17,), (3,), (56,), (90,)]
    order.slots(100, 104)    # the second epoch: another order
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

Slot = tuple[int, ...]  # row numbers; () leaves the place empty


def mixture(counts: Mapping[str, int], sampling: str, temperature: float = 1.0) -> dict[str, float]:
    """Share of each language in the stream.

    Args:
        counts: rows of each language.
        sampling: 'proportional' (n), 'uniform' (1) or 'temperature' (n^(1/temperature)).
        temperature: 1 is proportional; the larger, the nearer to uniform.

    Returns:
        Shares that sum to 1, in the order of `counts`.
    """
    power = {"proportional": 1.0, "uniform": 0.0, "temperature": 1.0 / temperature}[sampling]
    unit = max(counts.values(), default=1) if power > 1 else 1  # n^100 is beyond any float
    raw = {name: (count / unit) ** power for name, count in counts.items()}
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to `weights`, summing to `total`: the largest remainders win."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    short = total - int(counts.sum())
    # Stable sort: equal remainders go to the earlier group on every machine.
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return counts


class Sequential:
    """Rows once, in the order given; for validation."""

    most = 1  # rows of a slot

    def __init__(self, rows: Sequence[int] | np.ndarray) -> None:
        self._rows = rows
        self.epoch_slots = len(rows)
        self.endless = False

    def slots(self, start: int, stop: int) -> list[Slot]:
        """Slots start..stop-1; empty ones behind the last row."""
        return [(int(self._rows[i]),) if i < self.epoch_slots else () for i in range(start, stop)]


def even(groups: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all groups in an order that mixes them evenly, each group in its own order."""
    places = np.concatenate([(np.arange(len(g)) + 0.5) / len(g) for g in groups])
    return np.concatenate(groups)[np.argsort(places, kind="stable")]


class Shuffled:
    """Endless epochs over groups of rows, each group in its share, each epoch in a new order.

    An epoch has as many slots as there are rows. A group walks through its own rows in shuffled
    passes, whatever its share: with one group, or proportional shares, every epoch holds every
    row exactly once; an over-sampled group repeats no row before all of its rows were seen, and
    none is so under-sampled that an epoch has no row of it.
    """

    most = 1  # rows of a slot

    def __init__(self, groups: Sequence[np.ndarray], weights: Sequence[float], seed: int) -> None:
        """Takes the row numbers of each group, their shares and the run's seed."""
        self._groups = [np.asarray(g, np.int64) for g in groups]
        self._seed = seed
        self.epoch_slots = int(sum(len(g) for g in self._groups))
        self._counts = apportion(weights, self.epoch_slots)
        if not self._counts.all():
            self._counts = 1 + apportion(weights, self.epoch_slots - len(groups))
        self.endless = True
        self.epoch_rows = functools.lru_cache(maxsize=3)(self._epoch_rows)
        self._pass = functools.lru_cache(maxsize=3 * len(self._groups))(self._shuffled_pass)

    def slots(self, start: int, stop: int) -> list[Slot]:
        """Slots start..stop-1, one row each."""
        return [
            (int(self.epoch_rows(i // self.epoch_slots)[i % self.epoch_slots]),)
            for i in range(start, stop)
        ]

    def _shuffled_pass(self, group: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, 1, group, number])
        return rng.permutation(self._groups[group])

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, 0, epoch])
        owner = rng.permutation(np.repeat(np.arange(len(self._groups)), self._counts))
        rows = np.empty(self.epoch_slots, np.int64)
        for g, (members, count) in enumerate(zip(self._groups, self._counts, strict=True)):
            first = epoch * int(count)  # how often the group was drawn before this epoch
            drawn = np.arange(first, first + int(count))
            passes, places = drawn // len(members), drawn % len(members)
            taken = np.empty(int(count), np.int64)
            for number in np.unique(passes):
                here = passes == number
                taken[here] = self._pass(g, int(number))[places[here]]
            rows[owner == g] = taken
        return rows


class Grouped:
    """Endless blocks of rows of one group, such as a language; each block is a micro-batch.

    Within an epoch, groups take turns as evenly as their shares allow: with equal shares every
    group comes once in each round. A group walks through its rows in shuffled passes and leaves out
    the last ones of a pass that do not fill a block: no block has a row twice, unless its group has
    fewer rows than a block.
    """

    most = 1  # rows of a slot

    def __init__(
        self, groups: Sequence[np.ndarray], weights: Sequence[float], seed: int, block: int
    ) -> None:
        """Takes the row numbers of each group, their shares, the run's seed, rows of a block."""
        self._groups = [np.asarray(g, np.int64) for g in groups]
        self._seed, self._block = seed, block
        rows, rounds = sum(len(g) for g in self._groups), len(self._groups)
        # Whole rounds, and at least one block of each group.
        blocks = -(-max(rows // block, 1) // rounds) * rounds
        counts = np.maximum(apportion(weights, blocks), 1)
        # Whose the blocks of an epoch are.
        self._owners = even([np.full(n, owner) for owner, n in enumerate(counts)])
        self._counts = counts
        self._numbers = np.empty(len(self._owners), np.int64)  # which of its group's each is
        for group, count in enumerate(counts):
            self._numbers[self._owners == group] = np.arange(count)
        self.epoch_slots = block * len(self._owners)
        self.endless = True
        self._pass = functools.lru_cache(maxsize=3 * rounds)(self._shuffled_pass)

    def slots(self, start: int, stop: int) -> list[Slot]:
        """Slots start..stop-1, one row each."""
        return [(int(self._rows(i // self._block)[i % self._block]),) for i in range(start, stop)]

    def _rows(self, block: int) -> np.ndarray:
        """The rows of a block."""
        epoch, place = divmod(block, len(self._owners))
        group = int(self._owners[place])
        number = epoch * int(self._counts[group]) + int(self._numbers[place])
        whole = max(len(self._groups[group]) // self._block, 1)  # blocks of a pass
        turn, at = divmod(number, whole)
        found = self._pass(group, turn)[at * self._block : (at + 1) * self._block]
        return np.resize(found, self._block)

    def _shuffled_pass(self, group: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, 4, group, number])
        return rng.permutation(self._groups[group])


class Packed:
    """Several rows a slot: each epoch of an order is packed anew by first fit, then shuffled.

    A bin closes when `open_bins` younger ones are open, which keeps the plan linear in the rows.
    The first epoch fixes `capacity` (targets a slot may hold); later ones keep to it, so that
    shapes never change.
    """

    def __init__(
        self,
        order: Shuffled,
        lengths: Sequence[int],
        targets: Sequence[int],
        length: int,
        seed: int,
        multiple: int = 16,
        open_bins: int = 64,
    ) -> None:
        """Takes the order to pack, tokens and targets of each row and the length of a slot."""
        self._order = order
        self._lengths, self._targets = list(map(int, lengths)), list(map(int, targets))
        self._length, self._seed, self._open = length, seed, open_bins
        self.endless = True
        self.capacity = length
        first = self._pack(0)
        densest = max(sum(self._targets[r] for r in rows) for rows in first)
        # A row the first epoch's mixture did not draw may come later.
        densest = max(densest, *self._targets) if self._targets else densest
        self.capacity = min(-(-densest // multiple) * multiple, length)
        self.most = max(length // min(self._lengths), 1)  # rows of a slot, in any epoch
        self.epoch_slots = len(first)
        self._ends = [len(first)]  # slots up to the end of each epoch known so far
        self._plan = functools.lru_cache(maxsize=3)(self._pack)

    def slots(self, start: int, stop: int) -> list[Slot]:
        """Slots start..stop-1; epochs differ slightly in length, so earlier ones are planned."""
        ends = self._ends
        while ends[-1] < stop:
            ends = [*ends, ends[-1] + len(self._plan(len(ends)))]
        self._ends = ends  # replaced whole: prefetching threads read it
        out: list[Slot] = []
        epoch = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            begin = ends[epoch - 1] if epoch else 0
            end = min(stop, ends[epoch])
            out += self._plan(epoch)[start - begin : end - begin]
            start, epoch = end, epoch + 1
        return out

    def _pack(self, epoch: int) -> list[Slot]:
        shortest = min(self._lengths)
        done: list[list[int]] = []
        bins: list[list[int]] = []  # [free tokens, free targets, row, row, ...]
        for row in self._order.epoch_rows(epoch).tolist():
            need, places = self._lengths[row], self._targets[row]
            for bin_ in bins:
                if bin_[0] >= need and bin_[1] >= places:
                    break
            else:
                bin_ = [self._length, self.capacity]
                bins.append(bin_)
                if len(bins) > self._open:
                    done.append(bins.pop(0))
            bin_[0] -= need
            bin_[1] -= places
            bin_.append(row)
            if bin_[0] < shortest:
                bins.remove(bin_)
                done.append(bin_)
        slots = [tuple(b[2:]) for b in done + bins]
        # First fit closes full bins first; without this the thin ones would meet in one batch.
        rng = np.random.default_rng([self._seed, 2, epoch])
        return [slots[i] for i in rng.permutation(len(slots))]


def derangement(groups: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """For each row another row of its group: nobody keeps his place.

    Groups of one are thrown together, and with another group where even then one is alone.

    Args:
        groups: row numbers 0..n-1, each in exactly one group; n >= 2.
        seed: fixes the result.

    Returns:
        int64 [n], a permutation without a fixed point.
    """
    big = [np.asarray(g) for g in groups if len(g) > 1]
    alone = np.concatenate([np.asarray(g) for g in groups if len(g) == 1] or [np.empty(0, int)])
    if len(alone) == 1 and big:
        big[0] = np.concatenate([big[0], alone])
    elif len(alone):
        big.append(alone)
    partner = np.empty(sum(len(g) for g in big), np.int64)
    rng = np.random.default_rng([seed, 3])
    for group in big:
        cycle = rng.permutation(group)
        partner[cycle] = np.roll(cycle, 1)  # one cycle through all: no fixed point
    return partner


def choose_buckets(
    lengths: Sequence[int], size: int, most: int = 4, step: int = 0, gain: float = 0.05
) -> tuple[int, ...]:
    """At most `most` padded lengths that waste little on the batches to come.

    A batch is as long as its longest row, so the distribution to cover is that of the maximum of
    `size` rows, F(l)^size. Among multiples of `step` the set with the least expected padded length
    is taken; one more length must save something, as each is compiled.

    Args:
        lengths: tokens of every row.
        size: rows of a batch.
        most: largest number of lengths.
        step: 0: 16, or 8 where all rows are short.
        gain: the share of the padded length that one more must save.

    Returns:
        Increasing lengths; the last covers the longest row.
    """
    longest = max(lengths)
    step = step or (16 if longest > 64 else 8)
    top = -(-longest // step)
    edges = np.arange(1, top + 1) * step
    share = np.searchsorted(np.sort(lengths), edges, side="right") / len(lengths)
    mass = np.diff(share**size, prepend=0.0)  # P(the batch's longest row is below this edge)
    below = np.concatenate([[0.0], np.cumsum(mass)])
    # cost[e]: least expected length of batches up to edge e with the buckets so far, last one at e
    cost = below[1:] * edges
    back: list[np.ndarray] = []
    best: tuple[float, tuple[int, ...]] = (float(cost[-1]), (int(edges[-1]),))
    for count in range(2, min(most, top) + 1):
        last = np.arange(top)
        via = cost[None, :] + (below[1:, None] - below[None, 1:]) * edges[:, None]
        via[last[:, None] <= last[None, :]] = np.inf
        back.append(np.argmin(via, axis=1))
        cost = np.min(via, axis=1)
        if cost[-1] > best[0] * (1 - gain):
            break
        chosen, e = [int(edges[-1])], top - 1
        for table in reversed(back):
            e = int(table[e])
            chosen.append(int(edges[e]))
        assert len(chosen) == count
        best = (float(cost[-1]), tuple(reversed(chosen)))
    return best[1]
