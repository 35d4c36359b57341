"""Every source gives the same records, and every mistake names its place."""

import gzip
import json

import numpy as np
import pytest

from jaxalign.checksums import file_digest, text_digest
from jaxalign.data.sources import digest_of, read, read_all
from jaxalign.errors import UserError

ROWS = [{"text": "Grüße\u2028!", "n": 1}, {"text": "b; c", "n": 2}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def fields(records):
    return [record.fields for record in records]


def test_json_lines(tmp_path):
    for name in ("a.jsonl", "a.json"):
        path = tmp_path / name
        path.write_text("\ufeff" + LINES + "\n", "utf-8")
        records = read(str(path))
        assert fields(records) == ROWS
        assert [r.origin for r in records] == [f"{path}:1", f"{path}:2"]


def test_compressed_json_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    assert fields(read(str(path))) == ROWS


def test_json_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n" + json.dumps(ROWS, indent=1), "utf-8")
    records = read(str(path))
    assert fields(records) == ROWS
    assert records[1].origin == f"{path} item 2"


def test_tables(tmp_path):
    (tmp_path / "a.csv").write_text('text,lang\n"one, two",en\nthree,de\n', "utf-8")
    assert fields(read(str(tmp_path / "a.csv"))) == [
        {"text": "one, two", "lang": "en"},
        {"text": "three", "lang": "de"},
    ]
    for said in ('said "no', '"no"', '"no" and "no"', '""', '"a" ""b""'):  # quotes are text
        (tmp_path / "a.tsv").write_text(f"text\tlang\n{said}\ten\n", "utf-8")
        assert fields(read(str(tmp_path / "a.tsv"))) == [{"text": said, "lang": "en"}]


def test_names_of_files(tmp_path):
    """JSON lines have two names, and capitals change no type of file."""
    for name in ("a.ndjson", "b.NDJSON", "c.JSONL"):
        (tmp_path / name).write_text('{"text": "x"}\n', "utf-8")
        assert fields(read(str(tmp_path / name))) == [{"text": "x"}]
    (tmp_path / "de-en.TSV").write_text("Ja.\tYes.\n", "utf-8")
    (record,) = read(str(tmp_path / "de-en.TSV"))
    assert record.fields == {"text0": "Ja.", "text1": "Yes.", "lang0": "de", "lang1": "en"}


def test_headerless_pair_file(tmp_path):
    (tmp_path / "de-en.tsv").write_text('Ja.\tYes.\n"Nein\tNo.\n', "utf-8")
    (tmp_path / "pt-BR-en.tsv").write_text("text0\ttext1\nSim.\tYes.\n", "utf-8")
    records = read(str(tmp_path / "*-en.tsv"))
    assert fields(records) == [
        {"text0": "Ja.", "text1": "Yes.", "lang0": "de", "lang1": "en"},
        {"text0": '"Nein', "text1": "No.", "lang0": "de", "lang1": "en"},
        {"text0": "Sim.", "text1": "Yes.", "lang0": "pt-BR", "lang1": "en"},
    ]
    assert records[1].origin.endswith("de-en.tsv:2")


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    records = read(str(path))
    assert fields(records) == ROWS
    assert records[1].origin == f"{path} row 2"
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"b.parquet is not a Parquet file"):
        read(str(tmp_path / "b.parquet"))


def test_hub_layout_folder(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        pq.write_table(
            pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    assert fields(read(f"hf:{folder}@train")) == ROWS
    assert fields(read(f"hf:{folder}@test")) == ROWS[:1]
    assert fields(read(f"hf:{folder}@train[1:]")) == ROWS[1:]
    with pytest.raises(UserError, match=r"cannot be loaded.*hf:NAME"):
        read(f"hf:{folder}@nosuchsplit")

    # Rows that change behind the same name are noticed, as are other splits.
    names = [f"hf:{folder}@{split}" for split in ("train", "test", "train[1:]")]
    before = [digest_of([name]) for name in names]
    assert before == [digest_of([name]) for name in names] and len(set(before)) == 3
    assert digest_of([f"hf:{folder}@nosuchsplit"]) == digest_of([*names, "gone.jsonl"]) == ""
    file = folder / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS[::-1]), file)
    after = [digest_of([name]) for name in names]
    assert after[0] not in before and after[2] not in before


def test_a_digest_holds_what_names_say(tmp_path):
    """Languages and readers come from names; folders and other parts of a name say nothing."""

    def digest(name, text="Ja\tYes\n"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
        return digest_of([str(file)])

    assert digest("da-en.tsv") == digest("moved/da-en.TSV") != digest("nl-en.tsv")
    assert digest("da-en.tsv") != digest("en-da.tsv") != digest("pairs.tsv")
    assert digest("pairs.tsv") == digest("other.tsv") != digest("pairs.csv")
    assert digest("a.jsonl") == digest("b.ndjson") != digest("a.json")
    # Of two files, which is which.
    (one, other), (text, more) = ("da-en.tsv", "nl-en.tsv"), ("Ja\tYes\n", "Nej\tNo\n")
    digest(one, text), digest(other, more)
    before = digest_of([f"{tmp_path}/{name}" for name in (one, other)])
    digest(one, more), digest(other, text)
    assert digest_of([f"{tmp_path}/{name}" for name in (other, one)]) != before
    # Of JSON lines, and where names are to be left out, it is that of the content alone.
    lines = digest("a.jsonl")
    assert lines == text_digest(file_digest(tmp_path / "a.jsonl"))
    names = [f"{tmp_path}/{name}" for name in ("nl-en.tsv", "pairs.csv", "a.jsonl")]
    assert {digest_of([name], names=False) for name in names} == {lines}


def test_tfds_without_tensorflow(tmp_path):
    """A prepared array_record folder is read; TensorFlow is not installed in our environments."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path / "toy" / "1.0.0"
    folder.mkdir(parents=True)
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {
            "utt": text,
            "n": np.int64,
            "intent": tfds.features.ClassLabel(names=["alarm", "weather"]),
            "slots": tfds.features.Sequence({"type": text, "words": text}),
        }
    )
    features.save_config(str(folder))
    rows = [
        {"utt": "grüße 0", "n": 0, "intent": "weather", "slots": []},
        {"utt": "grüße 1", "n": 1, "intent": "alarm", "slots": [{"type": "a", "words": "ü"}]},
    ]
    encoded = [features.serialize_example(row) for row in rows]
    writer = ArrayRecordWriter(
        str(folder / "toy-train.array_record-00000-of-00001"), "group_size:1"
    )
    for example in encoded:
        writer.write(example)
    writer.close()
    split = {
        "name": "train",
        "shardLengths": ["2"],
        "numBytes": str(sum(map(len, encoded))),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "toy", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))

    records = read(f"tfds:toy@train?data_dir={tmp_path}", {"utterance": "utt"})
    assert records[1].fields == {
        "utt": "grüße 1",
        "utterance": "grüße 1",
        "n": 1,
        "intent": "alarm",
        "slots": {"type": ["a"], "words": ["ü"]},
    }
    assert records[0].fields["intent"] == "weather"
    assert type(records[0].fields["n"]) is int
    assert records[1].origin.endswith("row 2")

    names = [f"tfds:toy@{split}?data_dir={tmp_path}" for split in ("train", "train[1:]")]
    before = [digest_of([name]) for name in names]
    assert before == [digest_of([name]) for name in names]
    assert all(before) and before[0] != before[1] and not digest_of(["tfds:toyy@train"])
    (file,) = folder.glob("toy-train*")
    whole = file.read_bytes()
    file.write_bytes(whole.replace("grüße 0".encode(), "grüße 9".encode()))
    assert file.read_bytes() != whole and not {digest_of([name]) for name in names} & {*before}
    file.write_bytes(whole)

    from jaxalign.data.tasks import TASKS

    assert TASKS["intent_slots"].render(records[1]).answer == "intent: alarm; a: ü"
    with pytest.raises(UserError, match=r"cannot be loaded.*tfds:NAME"):
        read(f"tfds:toyy@train?data_dir={tmp_path}")


def test_columns(jsonl):
    path = jsonl("a.jsonl", [{"sentence": "x", "translation": {"de": "Ja", "en": "Yes"}}])
    (record,) = read(path, {"text": "sentence", "src": "translation.de"})
    assert record.fields["text"] == "x"
    assert record.fields["src"] == "Ja"
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: no column 'sentense'.*did you mean 'sentence'"
    ):
        read(path, {"text": "sentense"})
    with pytest.raises(UserError, match=r"no column 'translation\.fr'"):
        read(path, {"src": "translation.fr"})


def test_several_sources(jsonl):
    a, b = jsonl("a.jsonl", ROWS), jsonl("b.jsonl", ROWS[:1])
    assert fields(read_all([b, a])) == ROWS[:1] + ROWS


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: a JSON list where a row must be"),
        ("a.json", '[{"text": "x"},\n {]', r"a\.json:2: broken JSON"),
        ("a.json", '[{"text": "x"}, 3]', r"a\.json item 2: a JSON int"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: 1 columns where 2 belong"),
        ("a.csv", "a,b\n1,2\n\ufeffa,b\n3,4\n", r"a\.csv:3: the column names are repeated here"),
        ("a.tsv", 'a\tb\nx\t"play ""jude"" now"\n', r"a\.tsv:2: .* is quoted as in a CSV file"),
        ("de-en.tsv", "Ja.\tYes.\nNein.\n", r"de-en\.tsv:2: 1 columns where 2 belong"),
        ("a.xlsx", "x", r"unknown file type '\.xlsx'; known are \.jsonl, "),
        ("a", "x", "unknown file type 'a'"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.jsonl.gz", "x", r"a\.jsonl\.gz cannot be read"),
    ],
)
def test_mistakes_name_their_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / name))


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(UserError, match=r"no file matches '.*nowhere\*\.jsonl'"):
        read(str(tmp_path / "nowhere*.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "Grüße"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl is not UTF-8"):
        read(str(tmp_path / "latin.jsonl"))
