"""Sentence pairs of every layout, their tokens, and the shuffled control."""

import numpy as np
import pytest

from jaxalign.data.pairs import Pair, encode_pairs, shuffle_targets, to_pair
from jaxalign.data.sources import Record
from jaxalign.errors import UserError


@pytest.mark.parametrize(
    "fields, language",
    [
        ({"text0": "Ja", "text1": "Yes", "lang0": "de", "lang1": "en"}, "de-en"),
        ({"text_parallel_0": "Ja", "text_parallel_1": "Yes", "prefix": "p", "text": "t"}, ""),
        (
            {"text_parallel_0": "Ja", "text_parallel_1": "Yes", "lang_0": "de", "lang_1": "en"},
            "de-en",
        ),
        ({"source": "Ja", "target": "Yes", "source_lang": "de", "target_lang": "en"}, "de-en"),
        ({"src": "Ja", "tgt": "Yes", "src_lang": "de", "tgt_lang": "en"}, "de-en"),
        ({"translation": {"de": "Ja", "en": "Yes"}}, "de-en"),
    ],
)
def test_layouts(fields, language):
    pair = to_pair(Record(fields, "p:1"))
    assert (pair.source, pair.target, pair.language) == ("Ja", "Yes", language)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"text0": "Ja", "text1": " "}, r"p\.tsv:3: the target side of this pair is empty"),
        ({"text0": None, "text1": "Yes"}, r"p\.tsv:3: the source side of this pair is empty"),
        (
            {"text0": "Ja", "text_1": "Yes"},
            r"p\.tsv:3: no sentence pair.*'text1' is missing.*mean 'text_1'",
        ),
        ({"a": "Ja"}, r"'text0' is missing \(it has: a\)"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(UserError, match=message):
        to_pair(Record(fields, "p.tsv:3"))


def test_encoding_uses_the_default_special_tokens(llama, chatml):
    pair = Pair("Regnet es", "will it rain", "de", "en", "p:1")
    (row,) = encode_pairs([pair], llama, 99)
    assert row.source.tolist() == llama("Regnet es")["input_ids"]
    assert row.source[0] == row.target[0] == llama.bos_token_id
    (row,) = encode_pairs([pair], chatml, 99)
    assert row.source.tolist() == chatml("Regnet es", add_special_tokens=False)["input_ids"]
    (cut,) = encode_pairs([pair], chatml, 2)
    assert cut.source.tolist() == row.source[:2].tolist()
    assert cut.whole == max(len(row.source), len(row.target))


def test_a_side_without_tokens(chatml):
    with pytest.raises(UserError, match=r"p:9: one side of this pair is empty"):
        encode_pairs([Pair("", "x", origin="p:9")], chatml, 9)


def test_shuffled_control():
    pairs = [
        Pair(f"{a}{i}", f"{a}{i} en", a, "en") for a, n in (("de", 5), ("tr", 4)) for i in range(n)
    ]
    moved = shuffle_targets(pairs, seed=3)
    assert moved == shuffle_targets(pairs, seed=3) != shuffle_targets(pairs, seed=4)
    assert [p.source for p in moved] == [p.source for p in pairs]
    assert sorted(p.target for p in moved) == sorted(p.target for p in pairs)
    for before, after in zip(pairs, moved, strict=True):
        assert before.target != after.target
        assert after.target.startswith(before.source_language)
        assert after.language == before.language


def test_shuffled_control_with_lonely_languages():
    lonely = [Pair("a", "A", "x", "en"), Pair("b", "B", "de", "en"), Pair("c", "C", "de", "en")]
    moved = shuffle_targets(lonely, seed=1)
    assert sorted(p.target for p in moved) == ["A", "B", "C"]
    assert all(before.target != after.target for before, after in zip(lonely, moved, strict=True))
    with pytest.raises(UserError, match="at least two pairs"):
        shuffle_targets(lonely[:1], seed=1)


def test_targets_carry_their_language():
    """Between languages, the moved target's language goes with it."""
    moved = shuffle_targets([Pair("a", "A", "x", "fr"), Pair("b", "B", "y", "en")], seed=1)
    assert [p.language for p in moved] == ["x-en", "y-fr"]
    assert np.all([p.target for p in moved] == np.array(["B", "A"]))
