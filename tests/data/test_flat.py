"""What rows have in common is found in their tokens, and rows end to end lose nothing."""

import numpy as np
import pytest

from jaxalign.data.flat import Text, begin, lay, shared_by
from jaxalign.data.sampling import Sequential, Shuffled
from jaxalign.data.stem import LEAST_USES, MOST, Shareable, Stem, find
from jaxalign.data.streams import pair_stream, task_stream
from tests.data.test_loader import assert_same, config

__all__ = ["config"]

SYSTEM, GERMAN, CZECH = [5, 6, 7, 8, 9, 10], [20, 21, 22], [30, 31, 32, 33]


def texts(count=40, odd=()):
    """Half German, half Czech behind one system turn; then 2 to 5 own tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        own = rng.integers(100, 900, rng.integers(2, 6)).tolist()
        head = [99, 98] if i in odd else [*SYSTEM, *(GERMAN if i % 2 else CZECH)]
        tokens = np.array([*head, *own], np.int32)
        rows.append([Text(tokens, len(head) + 1, len(head) + 1)])
    return rows


def test_a_stem_and_its_branches_are_found():
    stem = shared_by(texts(odd=(3,)), 40)
    assert [list(node.words) for node in stem.nodes] == [
        [token << 2 for token in words] for words in (SYSTEM, GERMAN, CZECH)
    ]
    assert stem.tokens.tolist() == SYSTEM + GERMAN + CZECH
    assert stem.positions.tolist() == [*range(6), *range(6, 9), *range(6, 10)]
    assert stem.sees.tolist() == [1] * 6 + [3] * 3 + [5] * 4
    assert stem.bits.tolist() == [1] * 6 + [2] * 3 + [4] * 4
    starts = [stem.start(row[0].shareable) for row in texts(odd=(3,))[:4]]
    assert starts == [(5, 10), (3, 9), (5, 10), (0, 0)]


def test_only_what_pays_is_shared():
    rows = texts()
    assert len(shared_by(rows, 40).nodes) == 3
    # Of two rows in a sequence, one German and one Czech share the system turn alone.
    assert [len(node.words) for node in shared_by(rows, 2).nodes] == [6]
    assert LEAST_USES > 1 and not shared_by(rows, 1).nodes
    assert not find([Shareable(row[0].tokens, 0) for row in rows], 40, 14).nodes
    # The same tokens with another role, as the user's words instead of the template's.
    mixed = [
        Shareable(row[0].tokens, 8, np.full(len(row[0].tokens), 1 + i % 2, np.int8))
        for i, row in enumerate(rows)
    ]
    assert {node.depth for node in find(mixed, 40, 14).nodes} == {0}


def test_a_tree_has_no_more_nodes_than_bits():
    rng = np.random.default_rng(0)
    rows = [Shareable(np.array([7, 7, 7, i % 60, *[8] * 12, *rng.integers(0, 9, 3)]), 16)
            for i in range(600)]  # fmt: skip
    stem = find(rows, 600, 9)
    assert len(stem.nodes) == MOST
    assert all(node.parent is None or node.parent < n for n, node in enumerate(stem.nodes))
    assert {stem.start(row).depth for row in rows} == {3, 16}


def test_rows_that_are_starts_of_one_another():
    """As deep as they are many: no recursion."""
    rows = [Shareable(np.arange(length), length) for length in range(1, 3000)]
    stem = find(rows, 3000, 1500)
    assert stem.start(rows[-1]).depth > 500


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("endless", [False, True])
def test_every_token_is_there_once(ways, endless):
    rows = texts(42)
    stem = shared_by(rows, 8)
    order = Shuffled([np.arange(42)], [1.0], 3) if endless else Sequential(range(42))
    layout = lay(begin(rows, stem), order, 8, ways, 0, stem)
    shared = len(stem.tokens)
    for index in range(5):
        slots = order.slots(8 * index, 8 * index + 8)
        length = layout.fitting([slots])
        flat = layout.flat(slots, length)
        answer_at, answers = flat.answer_at, flat.answers
        assert flat.tokens.shape == (ways, length) and answers.shape[0] == ways
        own = (flat.segments != 0).sum()
        assert own == layout.own(slots) and length - shared - own / ways < 40
        for place, (row,) in enumerate(slot for slot in slots if slot):
            w, number = divmod(place, 8 // ways)
            here = np.flatnonzero(flat.segments[w] == number + 1)
            start = np.flatnonzero(flat.nodes[w] & flat.texts[w, number])
            whole = np.concatenate([start, here])
            assert flat.tokens[w, whole].tolist() == rows[row][0].tokens.tolist()
            assert flat.positions[w, whole].tolist() == list(range(len(whole)))
            assert (flat.sees[w, here] == flat.texts[w, number]).all()
            mine = np.isin(answer_at[w], here - 1) & (answers[w] != -100)
            wanted = rows[row][0].tokens[rows[row][0].first :]
            assert answers[w, mine].tolist() == wanted.tolist()
            assert flat.tokens[w, answer_at[w, mine] + 1].tolist() == wanted.tolist()


@pytest.mark.parametrize("make", [task_stream, pair_stream])
def test_streams_lay_the_rows_that_they_would_pad(config, chatml, make):
    padded = make(config, chatml)
    config.batch.pack = "auto"
    stream = make(config, chatml)
    assert stream.batch(5).rows.tolist() == padded.batch(5).rows.tolist()
    assert stream.share() > 0.85 and stream.tokens(3)[1] < 0.8 * padded.tokens(3)[1]
    counted, computed = stream.tokens(3)
    assert computed == stream.batch(3).flat.tokens.size
    real = stream.batch(3).flat
    assert counted == (real.segments != 0).sum() + real.nodes.size
    assert "rows end to end" in stream.shape and "padded lengths" in padded.shape


@pytest.mark.parametrize("make", [task_stream, pair_stream])
def test_a_process_makes_its_sequences_alone(config, chatml, make):
    config.batch.pack = "auto"
    stream = make(config, chatml, ways=4)
    whole = stream.stack([2, 3])
    mine = stream.stack([2, 3], np.array([2, 3, 6, 7]))  # the second and the fourth share
    assert (whole.flat.tokens[:, [1, 3]] == mine.flat.tokens).all()
    assert (whole.flat.texts[:, [1, 3]] == mine.flat.texts).all()
    assert_same(whole, stream.stack([2, 3], np.arange(8)))
    blank = stream.blank(stream.lengths[0], 2)
    assert blank.flat.tokens.shape == (2, 4, stream.lengths[0])


def test_long_rows_stay_padded_unless_asked(config, chatml, monkeypatch):
    from jaxalign.data import streams

    config.batch.pack = "auto"
    monkeypatch.setattr(streams, "LONGEST", 5)
    assert task_stream(config, chatml).layout is None
    config.batch.pack = "flatten"
    assert task_stream(config, chatml).layout is not None
    config.batch.pack, config.mesh.seq = "auto", 2
    assert pair_stream(config, chatml).layout is None


@pytest.mark.parametrize("block", [0, 8, 2, 1])
def test_shares_are_about_equally_long(block):
    """Within a block alone; one that fits into a share stays where it is."""
    rng = np.random.default_rng(1)
    rows = [[Text(np.arange(n, dtype=np.int32), 0, n)] for n in rng.integers(1, 40, 64)]
    order = Shuffled([np.arange(64)], [1.0], 3)
    layout = lay(begin(rows, Stem()), order, 16, 4, 0, Stem(), block=block)
    length = lambda share: sum(len(rows[row][0].tokens) for slot in share for row in slot)  # noqa: E731
    plain = found = 0
    for index in range(8):
        slots = order.slots(16 * index, 16 * index + 16)
        moved = layout.balanced(slots)
        step = block or 16
        for first in range(0, 16, step):
            assert sorted(moved[first : first + step]) == sorted(slots[first : first + step])
        plain += max(map(length, layout.shares(slots)))
        found += max(map(length, layout.shares(moved)))
    assert found == plain if block in (1, 2) else found < 0.95 * plain
