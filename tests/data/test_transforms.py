"""Transforms: from records to records, chosen by name, with one sentence for what does not fit."""

import pytest

from jaxalign.data.languages import language_number
from jaxalign.data.pairs import to_pair
from jaxalign.data.sources import Record
from jaxalign.data.streams import pair_stream
from jaxalign.data.transforms import transformed
from jaxalign.errors import UserError
from tests.data.test_loader import config  # noqa: F401  # a fixture

RECORDS = [
    Record({"src": str(n), "tgt": f"{n}!", "src_lang": "de" if n % 3 else "tr"}, f"rows:{n}")
    for n in range(30)
]


def louder(records, options, seed):
    return [
        Record(r.fields | {"tgt": r.fields["tgt"] * options["times"]}, r.origin) for r in records
    ]


def broken(records, options, seed):
    return records[0].fields["nothing"]


def wrong(records, options, seed):
    return [record.fields for record in records]


def empty(records, options, seed):
    return []


OWN = "tests.data.test_transforms:"


def run(*entries, split="train", seed=1):
    return transformed(RECORDS, entries, "align.transforms", split, seed)


def test_sample_draws_so_many_of_each_value():
    entry = {"name": "sample", "options": {"rows": 4, "by": "src_lang"}}
    found = run(entry)
    spoken = [record.fields["src_lang"] for record in found]
    assert (spoken.count("de"), spoken.count("tr")) == (4, 4)
    numbers = [int(record.fields["src"]) for record in found]
    assert numbers == sorted(numbers) and found == run(entry) != run(entry, seed=2)
    assert len(run({"name": "sample", "options": {"rows": 1000}})) == 30


def test_swap_exchanges_the_sides():
    found = run("swap")
    assert found[1].fields == {"tgt": "1", "src": "1!", "tgt_lang": "de"}
    assert found[1].origin == "rows:1" and run("swap", "swap") == RECORDS


@pytest.mark.parametrize(
    "fields",
    [
        {"translation": {"de": "Hallo", "en": "Hello"}, "source": "opus"},
        {"src": "Hallo", "tgt": "Hello", "src_lang": "de", "tgt_lang": "en", "source": "opus"},
        {"text0": "Hallo", "text1": "Hello", "lang0": "de", "lang1": "en"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_swap_takes_every_form_of_a_pair(fields):
    (found,) = transformed([Record(fields, "rows:1")], ["swap"], "align.transforms", "train", 1)
    pair = to_pair(found)
    assert (pair.source, pair.target, pair.languages) == ("Hello", "Hallo", ("en", "de"))
    assert found.fields.get("source", "opus") == "opus"
    with pytest.raises(UserError, match=r"rows:1: no sentence pair in this row"):
        lone = [Record({"src": "a"}, "rows:1")]
        transformed(lone, ["swap"], "align.transforms", "train", 1)


def test_validation_rows_are_left_alone_unless_named():
    entry = {"name": OWN + "louder", "options": {"times": 2}}
    assert run(entry)[3].fields["tgt"] == "3!3!"
    assert run(entry, split="valid") == RECORDS
    both = entry | {"splits": ["train", "valid"]}
    assert run(both, split="valid")[3].fields["tgt"] == "3!3!"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("swop", "did you mean 'swap'"),
        (3, "should be a name, or a dict"),
        ({"name": "swap", "option": {}}, "'option' is not one of"),
        ({"name": "swap", "splits": ["test"]}, "should be a list of train, valid"),
        ({"name": "swap", "splits": 5}, "should be a list of train, valid"),
        ({"name": "swap", "splits": [["train"]]}, "should be a list of train, valid"),
        ({"name": "sample"}, "rows: None should be a whole number"),
        ({"name": "sample", "options": {"rows": 2, "of": "src_lang"}}, "of is not an option"),
        ({"name": "sample", "options": {"rows": 2, "by": "language"}}, "row has no 'language'"),
        ({"name": "swap", "options": {"rows": 2}}, "rows is not an option; swap has none"),
        (OWN + "missing", "cannot be imported"),
        (OWN + "OWN", "is not a function but"),
        (OWN + "broken", "broken fails: KeyError"),
        (OWN + "wrong", "something else than records"),
        (OWN + "empty", "leaves no row of align.train"),
    ],
)
def test_what_does_not_fit(entry, says):
    with pytest.raises(UserError) as error:
        run("swap", entry)
    assert says in str(error.value) and str(error.value).startswith("align.transforms[1]")


def test_a_stream_takes_its_transforms(config, chatml):  # noqa: F811
    config.align.transforms = ["swap", {"name": "sample", "options": {"rows": 9}}]
    stream = pair_stream(config, chatml)
    assert len(stream.rows) == 9 and {row.languages[0] for row in stream.rows} == {"en"}
    assert len(pair_stream(config, chatml, "valid").rows) == 28


def test_batches_know_their_languages(config, chatml):  # noqa: F811
    stream = pair_stream(config, chatml, "valid")
    batch = stream.batch(0)
    assert stream.languages == ("de", "en", "tr")
    german, english, turkish = map(language_number, stream.languages)
    assert batch.source_language.tolist() == [german] * 8
    assert batch.target_language.tolist() == [english] * 8
    last = stream.batch(3)  # four pairs and four empty places
    assert last.source_language.tolist() == [turkish] * 4 + [-1] * 4
