"""Batches are pure functions of their index, the same on every host; mistakes are told."""

import itertools
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest

from jaxalign.data.batch import NO_TARGET
from jaxalign.data.loader import each, prefetch
from jaxalign.data.streams import pair_stream, task_stream
from jaxalign.errors import UserError
from jaxalign.settings import Config
from jaxalign.train.same import digest_of

WORDS = ["wake", "me", "up", "at", "nine", "tomorrow", "rain", "in", "Berlin", "play", "music"]


def task_rows(count):
    rng = np.random.default_rng(0)
    return [
        {
            "utterance": " ".join(rng.choice(WORDS, rng.integers(1, 12))) + f" {i}",
            "slots": [["datetime", " ".join(rng.choice(WORDS, rng.integers(1, 5)))]],
            "lang": "en" if i % 4 else "de",
        }
        for i in range(count)
    ]


def pair_rows(counts):
    return [
        {
            "text0": f"{lang} {WORDS[i % len(WORDS)]} {i}",
            "text1": f"en {i}",
            "lang0": lang,
            "lang1": "en",
        }
        for lang, count in counts.items()
        for i in range(count)
    ]


@pytest.fixture
def config(jsonl):
    config = Config()
    config.task.kind = "slots"
    config.task.train = config.task.valid = [jsonl("task.jsonl", task_rows(50))]
    config.align.train = config.align.valid = [jsonl("pairs.jsonl", pair_rows({"de": 20, "tr": 8}))]
    config.batch.size = config.batch.pairs = 8
    config.batch.pack = "none"  # tests/data/test_flat.py has the other layout
    return config


def assert_same(a, b):
    assert type(a) is type(b)
    for name, x, y in zip(a._fields, a, b, strict=True):
        if isinstance(x, tuple):
            assert_same(x, y)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)


def texts(batch, tokenizer):
    """Utterance numbers of a task batch, in order: they end the user's turn."""
    found = []
    for tokens in batch.tokens:
        text = tokenizer.decode(tokens)
        found += [int(part.split("<|im_end|>")[0].split()[-1]) for part in text.split("user\n")[1:]]
    return found


STREAMS = [task_stream, pair_stream]


@pytest.mark.parametrize("make", STREAMS)
def test_a_batch_is_a_function_of_its_index(config, chatml, make):
    stream, again = make(config, chatml), make(config, chatml)
    for index in (0, 3, 1000):
        assert_same(stream.batch(index), again.batch(index))
    straight = [stream.batch(i) for i in range(9)]
    for i in (8, 2, 5):
        assert_same(make(config, chatml).batch(i), straight[i])
    config.seed = 2
    other = make(config, chatml).batch(0)
    assert any(
        x.shape != y.shape or (x != y).any() for x, y in zip(other, straight[0], strict=True)
    )


def test_the_same_batch_in_another_process_without_torch(config, chatml, chatml_folder):
    code = (
        "import sys, zlib; sys.modules['torch'] = None; from jaxalign.settings import Config\n"
        "from jaxalign.data.chat import load_tokenizer\n"
        "from jaxalign.data.streams import task_stream\n"
        "c = Config(); c.task.kind = 'slots'; c.task.train = [sys.argv[1]]; c.batch.size = 8\n"
        "c.batch.pack = 'none'\n"
        "b = task_stream(c, load_tokenizer(sys.argv[2])).batch(11)\n"
        "assert sys.modules['torch'] is None\n"
        "print([zlib.crc32(x.tobytes()) for x in b if x is not None])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, config.task.train[0], chatml_folder],
        capture_output=True,
        text=True,
        check=True,
    )
    batch = task_stream(config, chatml).batch(11)
    here = [zlib.crc32(x.tobytes()) for x in batch if x is not None]
    assert out.stdout.strip() == str(here)


@pytest.mark.parametrize("make", STREAMS)
def test_places_of_the_whole(config, chatml, make):
    """As three hosts may hold them: not neighbours, not equally many, and one place twice."""
    stream = make(config, chatml)
    for indices in ([0], [4, 5, 6]):
        whole = stream.stack(indices)
        for places in ([0, 5], [2, 3, 4, 6, 7], [1, 5]):
            part = stream.stack(indices, np.array(places))
            assert_same(part, each(lambda x: x[:, places], whole))  # noqa: B023


@pytest.mark.parametrize("split", ["train", "valid"])
def test_batches_know_their_rows(config, chatml, split):
    stream = task_stream(config, chatml, split)
    for index in (0, 6):
        batch = stream.batch(index)
        for (number,), tokens, segments in zip(
            batch.rows, batch.tokens, batch.segments, strict=True
        ):
            row = stream.rows[number].tokens if number >= 0 else []
            np.testing.assert_array_equal(tokens[segments > 0], row)
    assert (split == "valid") == (-1 in batch.rows)
    pairs = pair_stream(config, chatml, split)
    for index in (0, 3):
        batch = pairs.batch(index)
        for number, target, mask in zip(batch.rows, batch.target, batch.target_mask, strict=True):
            row = pairs.rows[number].target if number >= 0 else []
            np.testing.assert_array_equal(target[mask > 0], row)
    assert (split == "valid") == (-1 in batch.rows)


def test_every_task_row_once_an_epoch(config, chatml):
    stream = task_stream(config, chatml)
    assert stream.len_rows == 50 and stream.epoch_batches == 7 and stream.endless
    seen = [n for i in range(25) for n in texts(stream.batch(i), chatml)]
    epochs = [seen[e * 50 : (e + 1) * 50] for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_uniform_sampling_of_pairs(config, chatml):
    stream = pair_stream(config, chatml)
    assert stream.report.languages == {"de-en": 20, "tr-en": 8}
    languages = [stream.rows[i].language for (i,) in stream._order.slots(0, 28 * 10)]
    assert languages.count("tr-en") == 140
    config.align.sampling = "proportional"
    stream = pair_stream(config, chatml)
    assert sorted(i for (i,) in stream._order.slots(28, 56)) == list(range(28))


def test_shapes(config, chatml):
    stream = task_stream(config, chatml)
    for i in range(20):
        batch = stream.batch(i)
        rows, length = batch.tokens.shape
        assert rows == 8 and length in stream.buckets
        assert batch.answers.shape == (8, stream.capacities[length])
        longest = int((batch.segments > 0).sum(axis=1).max())
        assert length == min(b for b in stream.buckets if b >= longest)
    assert all(a <= t for t, a in stream.capacities.items())
    stack = stream.stack(range(6))
    assert stack.tokens.shape[:2] == (6, 8)
    assert stack.tokens.shape[2] == max(stream.batch(i).tokens.shape[1] for i in range(6))
    pairs = pair_stream(config, chatml)
    assert {len({x.shape for x in pairs.batch(i)[:4]}) for i in range(5)} == {1}


def test_fixed_buckets(config, chatml):
    config.batch.buckets = [512, 256]
    stream = task_stream(config, chatml)
    assert stream.buckets == (256, 512)
    assert {stream.batch(i).tokens.shape[1] for i in range(9)} <= {256, 512}
    config.batch.buckets = [16]
    with pytest.raises(UserError, match=r"batch\.buckets end at 16.*batch\.max_length=16"):
        task_stream(config, chatml)


@pytest.mark.parametrize("make", STREAMS)
def test_prefetched_batches_are_the_batches(config, chatml, make):
    stream = make(config, chatml)
    items = prefetch(stream.batch, 5, 2**40)
    for index, item in enumerate(itertools.islice(items, 6), start=5):
        assert_same(item, stream.batch(index))
    items.close()
    assert len(list(prefetch(stream.batch, 3, 10))) == 7


def test_an_input_that_ends_early_is_no_end():
    """Grain takes a StopIteration for the end, and a run would be finished."""

    def item(number):
        return next(iter([number] if number < 5 else []))

    items = prefetch(item, 2, 9)
    assert list(itertools.islice(items, 3)) == [2, 3, 4]
    with pytest.raises(RuntimeError, match="ended at item 5 of 9"):
        next(items)


@pytest.mark.parametrize("pack", ["none", "segments"])
def test_a_row_longer_than_the_last_bucket(config, chatml, pack):
    config.batch.pack, config.batch.share_prefix = pack, "off"
    config.batch.buckets = [16]
    with pytest.raises(UserError, match=r"buckets end at 16, but the longest row has \d+ tokens"):
        task_stream(config, chatml)


def test_validation_goes_through_once_in_order(config, chatml):
    stream = task_stream(config, chatml, "valid")
    assert not stream.endless and stream.epoch_batches == 7
    batches = [stream.batch(i) for i in range(7)]
    assert [n for b in batches for n in texts(b, chatml)] == list(range(50))
    assert [stream.real_rows(i) for i in range(7)] == [8] * 6 + [2]
    last = batches[-1]
    assert last.tokens.shape[0] == 8
    assert not last.segments[2:].any()
    assert (last.answers[2:] == NO_TARGET).all()
    with pytest.raises(IndexError):
        stream.batch(7)
    pairs = pair_stream(config, chatml, "valid")
    assert [pairs.real_rows(i) for i in range(4)] == [8, 8, 8, 4]
    assert not pairs.batch(3).source_mask[4:].any()


@pytest.mark.parametrize("make", [task_stream, pair_stream])
def test_validation_files_count_once_and_training_files_as_often_as_named(config, chatml, make):
    name = "task" if make is task_stream else "align"
    part = getattr(config, name)
    once = len(make(config, chatml).rows)
    (file,) = part.train
    part.train = part.valid = [file, f"{file[:-1]}?"]
    assert len(make(config, chatml).rows) == 2 * once
    with pytest.raises(
        UserError, match=rf"{name}\.valid: .* is named by .* rows would count twice"
    ):
        make(config, chatml, "valid")


@pytest.mark.parametrize("make", [task_stream, pair_stream])
def test_rows_that_stand_in_both_streams_are_known(config, chatml, jsonl, make):
    part = config.task if make is task_stream else config.align
    own = task_rows(50) if make is task_stream else pair_rows({"de": 20})
    other = {**own[0], **({"slots": []} if make is task_stream else {"text0": "anders"})}
    part.valid = [jsonl("valid.jsonl", [other, own[3], own[5]])]
    train = make(config, chatml)
    assert make(config, chatml, "valid").also_in(train) == 2


def test_a_part_of_the_validation_has_every_language(config, chatml, jsonl):
    """Files come one after the other, and often each is one language."""
    files = [[row | {"lang": lang} for row in task_rows(n)] for lang, n in (("en", 60), ("cy", 20))]
    config.task.valid = [jsonl(f"{number}.jsonl", rows) for number, rows in enumerate(files)]
    config.batch.size = 8
    first = lambda: [  # noqa: E731
        stream.rows[row].language for row in stream.batch(0).rows.ravel() if row >= 0
    ]
    stream = task_stream(config, chatml, "valid")
    assert set(first()) == {"en"}
    config.train.eval_batches = 1
    stream = task_stream(config, chatml, "valid")
    assert Counter(first()) == {"en": 6, "cy": 2}


def test_packed_batches_hold_the_same_rows(config, chatml):
    plain = task_stream(config, chatml)
    config.batch.pack, config.batch.max_length, config.batch.size = "segments", 512, 4
    config.batch.share_prefix = "off"
    stream = task_stream(config, chatml)
    assert stream.buckets == (512,)
    seen = {}
    for i in range(stream.epoch_batches):
        batch = stream.batch(i)
        assert batch.answers.shape == (4, stream.capacities[512])
        for b in range(4):
            for segment in range(1, batch.segments[b].max() + 1):
                at = np.flatnonzero(batch.segments[b] == segment)
                assert (np.diff(at) == 1).all()
                assert batch.positions[b, at].tolist() == list(range(len(at)))
                here = np.isin(batch.answer_at[b], at) & (batch.answers[b] != NO_TARGET)
                places = batch.answer_at[b, here]
                assert places.max() + 1 in at  # the predicted token lies in the same segment
                tokens = batch.tokens[b]
                assert tokens[places + 1].tolist() == batch.answers[b, here].tolist()
                seen[tuple(tokens[at])] = tuple(batch.answers[b, here])
                assert (
                    tokens[at].tolist() == stream.rows[batch.rows[b, segment - 1]].tokens.tolist()
                )
            assert (batch.rows[b, batch.segments[b].max() :] == -1).all()
    wanted = {tuple(r.tokens): tuple(r.tokens[r.first :]) for r in plain.rows}
    assert wanted.items() <= seen.items()
    assert_same(stream.batch(40), task_stream(config, chatml).batch(40))
    assert not task_stream(config, chatml, "valid").endless


def test_packed_rows_do_not_depend_on_the_devices(config, chatml):
    """What an update trains is that of the run, which may go on with more or fewer devices."""
    config.batch.pack, config.batch.max_length, config.batch.size = "segments", 256, 8
    config.batch.share_prefix = "auto"

    def rows_of(stream):
        batches = [stream.batch(index).rows for index in range(3)]
        return stream.epoch_batches, [sorted(batch[batch >= 0].tolist()) for batch in batches]

    one = task_stream(config, chatml)
    assert one.layout is not None and one.layout.stem.nodes
    assert rows_of(task_stream(config, chatml, ways=8)) == rows_of(one)


def test_packing_little_data_makes_short_sequences(config, chatml):
    config.batch.pack = "segments"
    stream = task_stream(config, chatml)
    total = sum(len(r.tokens) for r in stream.rows)
    assert stream.buckets[-1] * config.batch.size < total + 8 * config.batch.size


def test_cut_and_dropped_rows_are_counted(config, chatml):
    whole = task_stream(config, chatml)
    limit = sorted(r.prompt for r in whole.rows)[40] + 1
    config.batch.max_length = limit
    stream = task_stream(config, chatml)
    assert stream.report.dropped == sum(r.prompt >= limit for r in whole.rows) > 0
    assert stream.report.cut == sum(r.prompt < limit < len(r.tokens) for r in whole.rows) > 0
    assert stream.len_rows == 50 - stream.report.dropped
    assert f"{stream.report.dropped} dropped" in str(stream.report)
    assert stream.report.shortened and not whole.report.shortened
    config.batch.max_length = 5
    with pytest.raises(UserError, match=r"task\.train: in all 50 rows.*raise batch\.max_length"):
        task_stream(config, chatml)


@pytest.mark.parametrize("pack", ["none", "segments", "flatten"])
def test_the_whole_row_is_predicted_where_asked(config, chatml, pack):
    """Each token but a row's first, once, by the one before it; roles stay what they are."""
    config.batch.pack = pack
    answers = task_stream(config, chatml)
    config.task.loss = "all"
    stream = task_stream(config, chatml)
    assert stream.report == answers.report
    batch = stream.batch(0)
    numbers = batch.rows[batch.rows >= 0]
    if pack != "segments":  # which rows share a sequence depends on how many targets they have
        np.testing.assert_array_equal(batch.rows, answers.batch(0).rows)
    expected = sorted(token for i in numbers for token in stream.rows[i].tokens[1:])
    assert sorted(batch.answers[batch.answers != NO_TARGET]) == expected
    seen = batch.flat or batch
    if batch.flat:
        assert not batch.flat.nodes.shape[-1]  # a shared token would be predicted once for all
    for one in (batch, seen):
        for b, a in zip(*np.nonzero(one.answers != NO_TARGET), strict=True):
            at = one.answer_at[b, a]
            assert one.tokens[b, at + 1] == one.answers[b, a]
            assert one.segments[b, at + 1] == one.segments[b, at]
    assert digest_of(stream) == digest_of(answers)  # rows of runs before there was a choice
    row = stream.rows[0]
    assert row.first == 1 and answers.rows[0].first == row.prompt
    np.testing.assert_array_equal(row.roles, answers.rows[0].roles)


def test_rows_without_an_answer_are_dropped_whatever_is_predicted(config, chatml):
    lengths = sorted(row.prompt for row in task_stream(config, chatml).rows)
    config.batch.max_length = lengths[len(lengths) // 2]
    config.task.loss = "all"
    cut = task_stream(config, chatml)
    config.task.loss = "answer"
    assert cut.report.dropped and cut.report == task_stream(config, chatml).report


def test_one_file_of_the_paper_feeds_both_streams(jsonl, llama):
    rows = [
        {
            "prefix": f"say {i} ",
            "text": "ok<|eot_id|>",
            "text_parallel_0": f"a {i}",
            "text_parallel_1": f"b {i}",
        }
        for i in range(6)
    ]
    config = Config()
    config.task.train = config.align.train = [jsonl("paper.json", rows)]
    config.batch.size = config.batch.pairs = 6
    tasks, pairs = task_stream(config, llama), pair_stream(config, llama)
    assert (
        tasks.batch(0).answers[0, :3].tolist() == [*llama("ok")["input_ids"][1:], 3, NO_TARGET][:3]
    )
    assert {llama.decode(r.target, skip_special_tokens=True) for r in pairs.rows} == {
        f"b {i}" for i in range(6)
    }


def test_shuffled_control_keeps_the_stream_otherwise(config, chatml):
    plain = pair_stream(config, chatml)
    config.align.control = "shuffled"
    moved = pair_stream(config, chatml)
    for a, b in zip(plain.rows, moved.rows, strict=True):
        assert a.source.tolist() == b.source.tolist()
        assert a.target.tolist() != b.target.tolist()


def test_languages(config, chatml):
    config.task.languages = ["de"]
    assert task_stream(config, chatml).report.languages == {"de": 13}
    config.task.languages = ["de", "eng"]
    with pytest.raises(UserError, match=r"task\.languages: .* is in eng; present: de, en"):
        task_stream(config, chatml)
    assert task_stream(config, chatml, "valid").report.languages == {"de": 13}
    config.align.languages = ["tr", "en"]
    assert pair_stream(config, chatml).report.languages == {"tr-en": 8}
    config.align.languages = ["fr", "en"]
    with pytest.raises(UserError, match=r"align\.languages: .*; present: de, en, tr"):
        pair_stream(config, chatml)


def test_the_line_of_a_stream_says_what_was_left_out(config, chatml, jsonl):
    row = {"utterance": "play music", "slots": []}
    spoken = [{"lang": "en"}] * 3 + [{}] * 5 + [{"lang": "en-US"}] * 5
    config.task.train = [jsonl("mixed.jsonl", [row | named for named in spoken])]
    assert str(task_stream(config, chatml).report) == "13 rows (en 3, en-US 5)"
    config.task.languages = ["en"]
    said = "3 of 13 rows (en 3); 10 in other languages or none"
    assert str(task_stream(config, chatml).report) == said
    config.task.transforms = [{"name": "sample", "options": {"rows": 11}}]
    said = str(task_stream(config, chatml).report)
    assert " of 11 rows (en " in said and "; transforms made 11 of 13; " in said
    config.align.languages = ["tr", "en"]
    said = "8 of 28 rows (tr-en 8); 20 in other languages or none"
    assert str(pair_stream(config, chatml).report) == said


def test_translation_directions(config, chatml, jsonl):
    rows = [
        {"src": "a", "tgt": "b", "src_lang": s, "tgt_lang": t}
        for s, t in (("de", "en"), ("en", "de"), ("cs", "en"))
    ]
    config.task.kind, config.task.train = "translation", [jsonl("mt.jsonl", rows)]
    config.task.languages = ["de", "en"]
    assert task_stream(config, chatml).report.languages == {"de-en": 1, "en-de": 1}
    config.task.languages = ["cs-en"]
    assert task_stream(config, chatml).report.languages == {"cs-en": 1}


def test_mistakes(config, chatml, jsonl):
    config.batch.pairs = 64
    with pytest.raises(UserError, match=r"28 pairs, fewer than batch.pairs=64"):
        pair_stream(config, chatml)
    config.batch.pairs, config.align.rule, config.align.every = 8, "cached", "joint"
    config.align.negatives, config.align.group = "global", 8
    with pytest.raises(UserError, match=r"28 pairs, fewer than the 32 of an update \(align\.rule"):
        pair_stream(config, chatml)  # the four micro-batches are one batch to the loss
    config.align.negatives = "group"  # a pair meets its group alone
    assert len(pair_stream(config, chatml).rows) == 28
    config.align.train = []
    with pytest.raises(UserError, match=r"align\.train names no data"):
        pair_stream(config, chatml)
    config.task.kind = "rows"
    with pytest.raises(UserError, match=r"task\.jsonl:1: this row has no 'text'"):
        task_stream(config, chatml)
    # The tokenizer makes nothing of it: the prefix's tokens are the whole row's.
    silent = jsonl("silent.jsonl", [{"prefix": "tomorro", "text": "w"}])
    config.task.train = [silent]
    with pytest.raises(UserError, match=r"silent\.jsonl:1: the answer adds no token"):
        task_stream(config, chatml)


def test_imports_stay_light():
    code = (
        "import sys, jaxalign.data.loader, jaxalign.data.chat, jaxalign.data.sources\n"
        "heavy = ('torch', 'tensorflow', 'transformers', 'datasets', 'tensorflow_datasets',"
        " 'grain', 'jax', 'pyarrow', 'rich')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
