"""Orders are pure functions of seed and position; mixtures and packings keep their promises."""

from collections import Counter

import numpy as np
import pytest

from jaxalign.data.sampling import (
    Grouped,
    Packed,
    Sequential,
    Shuffled,
    apportion,
    choose_buckets,
    derangement,
    even,
    mixture,
)


def rows_of(order, start, stop):
    return [row for slot in order.slots(start, stop) for row in slot]


def test_mixture():
    counts = {"a": 900, "b": 100}
    assert mixture(counts, "proportional") == {"a": 0.9, "b": 0.1}
    assert mixture(counts, "uniform") == {"a": 0.5, "b": 0.5}
    assert mixture(counts, "temperature", 2.0) == {"a": 0.75, "b": 0.25}
    assert mixture(counts, "temperature", 1.0) == {"a": 0.9, "b": 0.1}
    assert mixture(counts, "temperature", 1e-3) == {"a": 1.0, "b": 0.0}


def test_apportion():
    assert apportion([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert apportion([0.9, 0.1], 7).tolist() == [6, 1]


def test_every_row_once_an_epoch_in_a_new_order():
    order = Shuffled([np.arange(37)], [1.0], seed=5)
    epochs = [rows_of(order, e * 37, (e + 1) * 37) for e in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert rows_of(Shuffled([np.arange(37)], [1.0], seed=5), 30, 80) == rows_of(order, 30, 80)
    assert rows_of(Shuffled([np.arange(37)], [1.0], seed=6), 0, 37) != epochs[0]


def test_groups_get_their_share_and_repeat_late():
    groups = [np.arange(90), np.arange(90, 100)]
    order = Shuffled(groups, [0.5, 0.5], seed=1)
    drawn = rows_of(order, 0, 200)
    small = [row for row in drawn if row >= 90]
    assert len(small) == 100
    # Ten rows drawn a hundred times: ten whole passes, each row once in each.
    assert all(sorted(small[i : i + 10]) == list(range(90, 100)) for i in range(0, 100, 10))
    assert set(Counter(row for row in drawn if row < 90).values()) == {1, 2}


def test_proportional_shares_keep_every_row_once():
    order = Shuffled([np.arange(30), np.arange(30, 37)], [30 / 37, 7 / 37], seed=2)
    for epoch in range(3):
        assert sorted(rows_of(order, epoch * 37, (epoch + 1) * 37)) == list(range(37))


def test_a_small_share_is_not_none():
    order = Shuffled([np.arange(3000), np.arange(3000, 3100)], [0.99999, 0.00001], seed=1)
    epochs = [sorted(rows_of(order, e * 3100, (e + 1) * 3100))[-1] for e in range(3)]
    assert all(row >= 3000 for row in epochs) and len(set(epochs)) == 3


def test_every_stretch_has_its_share_of_each():
    groups = [np.arange(300), np.arange(300, 330), np.arange(330, 340)]
    rows = even(groups)
    assert sorted(rows) == list(range(340))
    for group in groups:
        assert list(rows[np.isin(rows, group)]) == list(group)  # in their order
    counts = [np.isin(rows[:68], group).sum() for group in groups]
    assert counts == [60, 6, 2]
    assert list(even(groups[:1])) == list(range(300))


def test_sequential_pads_with_empty_slots():
    assert Sequential(range(3)).slots(2, 5) == [(2,), (), ()]


@pytest.fixture
def packed():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 300)
    targets = lengths // 4
    return (
        lambda: Packed(
            Shuffled([np.arange(300)], [1.0], seed=3), lengths, targets, length=128, seed=3
        ),
        lengths,
        targets,
    )


def test_packing(packed):
    make, lengths, targets = packed
    order = make()
    first = order.epoch_slots
    slots = order.slots(0, first)
    assert sorted(row for slot in slots for row in slot) == list(range(300))
    assert all(0 < sum(lengths[list(slot)]) <= 128 for slot in slots)
    assert first <= 1.1 * lengths.sum() / 128
    assert order.capacity % 16 == 0
    many = order.slots(0, 5 * first)
    assert all(sum(targets[list(slot)]) <= order.capacity for slot in many)
    counts = Counter(row for slot in many for row in slot)
    assert set(counts) == set(range(300)) and set(counts.values()) <= {4, 5, 6}


def test_packing_from_anywhere_is_the_same(packed):
    make, *_ = packed
    order = make()
    straight = order.slots(0, 400)
    assert make().slots(250, 300) == straight[250:300]
    assert [make().slots(i, i + 1)[0] for i in (0, 399, 100)] == [
        straight[i] for i in (0, 399, 100)
    ]


def test_derangement():
    groups = [np.array([0, 2, 4]), np.array([1]), np.array([3, 5])]
    partner = derangement(groups, seed=1)
    assert sorted(partner) == list(range(6))
    assert all(partner[i] != i for i in range(6))
    assert {int(partner[3]), int(partner[5])} == {3, 5}


def waste(buckets, lengths, size, seed=0):
    rng = np.random.default_rng(seed)
    longest = rng.choice(lengths, (2000, size)).max(axis=1)
    padded = np.array(buckets)[np.searchsorted(buckets, longest)]
    return padded.mean() / longest.mean()


def test_buckets_cover_the_longest_row_with_little_padding():
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(3.5, 0.8, 5000).astype(int) + 1, 700)
    buckets = choose_buckets(lengths, size=8)
    assert 1 < len(buckets) <= 4
    assert list(buckets) == sorted(set(buckets))
    assert all(bucket % 16 == 0 for bucket in buckets)
    assert buckets[-1] - 16 < lengths.max() <= buckets[-1]
    assert waste(buckets, lengths, 8) < 0.75 * waste([buckets[-1]], lengths, 8)


def test_buckets_are_the_best_of_their_number():
    """The dynamic programme agrees with trying every set."""
    import itertools

    lengths = np.array([3] * 50 + [17] * 20 + [30] * 5 + [60])
    size = 4
    edges = np.arange(8, 65, 8)
    mass = np.diff((np.searchsorted(np.sort(lengths), edges, side="right") / 76) ** size, prepend=0)

    def cost(buckets):
        return sum(m * min(b for b in buckets if b >= e) for e, m in zip(edges, mass, strict=True))

    chosen = choose_buckets(lengths, size)
    best = min(cost((*s, 64)) for s in itertools.combinations(edges[:-1], len(chosen) - 1))
    assert cost(chosen) == pytest.approx(best)


def test_buckets_of_equal_and_short_rows():
    assert choose_buckets([40] * 9, size=4) == (40,)
    assert choose_buckets([5], size=4) == (8,)
    assert choose_buckets([100] * 9, size=4) == (112,)


def blocks(order, size, number):
    """The rows of each of the first blocks, in sets where no row comes twice."""
    return [rows_of(order, i * size, (i + 1) * size) for i in range(number)]


def test_grouped_blocks_are_of_one_group_and_take_turns():
    groups = [np.arange(0, 19), np.arange(19, 100), np.arange(100, 131)]
    order = Grouped(groups, [1 / 3] * 3, seed=4, block=8)
    owner = lambda row: sum(row >= g[0] for g in groups) - 1  # noqa: E731
    found = blocks(order, 8, 60)
    assert all(len(set(block)) == 8 and len({*map(owner, block)}) == 1 for block in found)
    assert [owner(block[0]) for block in found] == [0, 1, 2] * 20  # also from epoch to epoch
    small = [set(block) for block in found[::3]]
    assert not small[0] & small[1] and len(set().union(*small)) == 19
    # A pure function of the position.
    again = Grouped(groups, [1 / 3] * 3, seed=4, block=8)
    assert rows_of(again, 300, 330) == rows_of(order, 300, 330)
    assert blocks(Grouped(groups, [1 / 3] * 3, seed=5, block=8), 8, 60) != found
    assert order.epoch_slots % 24 == 0 and abs(order.epoch_slots - 131) < 24


def test_grouped_shares_are_kept_and_no_group_is_forgotten():
    groups = [np.arange(0, 960), np.arange(960, 1000)]
    order = Grouped(groups, [0.96, 0.04], seed=1, block=10)
    owners = [block[0] >= 960 for block in blocks(order, 10, 100)]
    assert sum(owners) == 4
    tiny = Grouped([np.arange(0, 990), np.arange(990, 993)], [0.997, 0.003], seed=1, block=10)
    number = tiny.epoch_slots // 10
    last = [block for block in blocks(tiny, 10, number) if block[0] >= 990]
    assert len(last) == 1 and len(last[0]) == 10 and set(last[0]) == {990, 991, 992}
