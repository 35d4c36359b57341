"""Where tokens, segments, positions and targets land."""

import numpy as np

from jaxalign.data.batch import Encoded, EncodedPair, collate_pairs, collate_tasks, cover


def row(tokens, prompt):
    return Encoded(np.array(tokens, np.int32), prompt)


def test_unpacked():
    batch = collate_tasks([[row([5, 6, 7, 8], 2)], []], length=6, capacity=3, pad_id=9)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 9], [9] * 6]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 0, 0], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch.answers.tolist() == [[7, 8, -100], [-100] * 3]
    assert batch.answer_at.tolist() == [[1, 2, 0], [0] * 3]
    assert batch.roles.tolist() == [[1, 1, 3, 3, 0, 0], [0] * 6]  # where the user speaks: unsaid
    assert all(array.dtype == np.int32 for array in batch[:5])


def test_packed_targets_stay_in_their_segment():
    batch = collate_tasks(
        [[row([1, 2, 3], 1), row([4, 5, 6, 7], 3)]], length=9, capacity=4, pad_id=0
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0, 0]]
    assert batch.positions[0, :7].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.answers.tolist() == [[2, 3, 7, -100]]
    assert batch.answer_at.tolist() == [[0, 1, 5, 0]]


def test_the_first_token_is_never_a_target():
    """Nothing stands before it, also in the middle of a packed sequence."""
    rows = [row([1, 2], 0), row([3, 4], 0)]
    assert [r.targets for r in rows] == [1, 1]
    batch = collate_tasks([rows], length=4, capacity=4, pad_id=0)
    assert batch.answers.tolist() == [[2, 4, -100, -100]]
    assert batch.answer_at.tolist() == [[0, 2, 0, 0]]


def test_pairs_share_their_length():
    pair = EncodedPair(np.array([1, 2, 3], np.int32), np.array([4], np.int32))
    batch = collate_pairs([pair, None], length=4, pad_id=7)
    assert batch.source.tolist() == [[1, 2, 3, 7], [7] * 4]
    assert batch.source_mask.tolist() == [[1, 1, 1, 0], [0] * 4]
    assert batch.target.tolist() == [[4, 7, 7, 7], [7] * 4]
    assert batch.target_mask.tolist() == [[1, 0, 0, 0], [0] * 4]


def test_cover():
    assert [cover(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
