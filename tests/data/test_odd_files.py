"""Files as strangers write them: right rows, or one sentence with file and line; never a third."""

import gzip
import json

import pytest

from jaxalign.data.files import read_files, text_lines
from jaxalign.data.sources import read
from jaxalign.errors import UserError
from jaxalign.probe.corpus import read_parallel

GOOD = b'{"text": "a"}\n'


@pytest.fixture
def refused(tmp_path):
    """(name, bytes) -> the one sentence with which the file is refused."""

    def run(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read(str(tmp_path / name))
        sentence = str(error.value).replace(str(tmp_path), "T")
        assert "\n" not in sentence and len(sentence) < 500
        return sentence

    return run


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (rb'{"text": "\ud800"}', "T/f.jsonl:2: half of a character"),
        (rb'{"te\udc00xt": "a"}', "T/f.jsonl:2: half of a character"),
        (b'{"text": ' + b"[" * 100_000, "T/f.jsonl:2: JSON that cannot be read (RecursionError"),
        (b'{"n": ' + b"9" * 5000 + b"}", "T/f.jsonl:2: JSON that cannot be read (ValueError"),
        (b'{"text": "a", "text": "b"}', "T/f.jsonl:2: 'text' occurs twice in one object"),
        (b'{"a": {"x": 1, "x": 2}}', "T/f.jsonl:2: 'x' occurs twice"),
        (b'{"text": "a\x00"}', "T/f.jsonl:2: broken JSON"),
        (b"\xff\xfe", "T/f.jsonl is not UTF-8 text"),
        (b'"text"', "T/f.jsonl:2: a JSON str where a row must be an object"),
        (b"null", "T/f.jsonl:2: a JSON NoneType"),
    ],
)
def test_json_lines(refused, content, sentence):
    assert refused("f.jsonl", GOOD + content).startswith(sentence)


def test_whole_characters_in_escapes_are_fine(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(rb'{"text": "\ud83d\ude00 \u00fc"}')
    assert read(str(tmp_path / "f.jsonl"))[0].fields == {"text": "😀 ü"}


def test_a_line_without_end_is_not_read_whole(refused, monkeypatch):
    monkeypatch.setattr("jaxalign.data.files.LONGEST", 1000)
    assert refused("f.jsonl", GOOD + b"x" * 5000).startswith("T/f.jsonl:2: a line of 1000")
    assert refused("f.csv", b"text\n" + b"x" * 5000).startswith("T/f.csv:2: a line of 1000")
    assert refused("f.jsonl.gz", gzip.compress(b" " * 10**6)).startswith("T/f.jsonl.gz:1: a line")


def test_damaged_gzip(refused):
    whole = gzip.compress(GOOD * 3000)
    assert refused("f.jsonl.gz", whole[:-9]).startswith("T/f.jsonl.gz cannot be read (")
    assert refused("f.jsonl.gz", b"not gzip").startswith("T/f.jsonl.gz cannot be read (")
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    assert refused("f.jsonl.gz", bytes(broken)).startswith("T/f.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("f.csv", b"text,lang,text\na,b,c\n", "T/f.csv:1: two columns are called 'text'"),
        ("f.tsv", b"a\ta\n1\t2\n", "T/f.tsv:1: two columns are called 'a'"),
        ("f.csv", b'a,b\n1,"2\n3,4\n', "T/f.csv:3: broken table (unexpected end of data)"),
        ("f.csv", b"a,b\n1\n", "T/f.csv:2: 1 columns where 2 belong"),
        ("f.json", b'[{"a": 1},\n {"a": }]', "T/f.json:2: broken JSON"),
        ("f.json", b'[{"a": 1}, 3]', "T/f.json item 2: a JSON int"),
        ("f.json", b"[" * 100_000, "T/f.json: JSON that cannot be read (RecursionError"),
        ("f.json", rb'[{"a": "\ud800"}]', "T/f.json: half of a character"),
        ("f.parquet", b"PAR1 and nothing", "T/f.parquet is not a Parquet file"),
        ("f.jsonl", b"", "T/f.jsonl holds no rows"),
        ("f.jsonl", b"\xef\xbb\xbf\n", "T/f.jsonl holds no rows"),
        ("f.txt", b"a", "T/f.txt: unknown file type"),
    ],
)
def test_other_files(refused, name, content, sentence):
    assert refused(name, content).startswith(sentence)


def test_long_fields_of_a_table_are_read(tmp_path):
    (tmp_path / "f.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(str(tmp_path / "f.csv"))[0].fields["text"]) == 200_000


def test_parquet_with_times(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    times = pa.array([2**62, None], pa.timestamp("ns"))
    table = pa.table({"text": ["a", "b"], "at": times, "day": pa.array([1, 2], pa.date32())})
    pq.write_table(table, tmp_path / "f.parquet")
    rows = [record.fields for record in read(str(tmp_path / "f.parquet"))]
    assert [row["text"] for row in rows] == ["a", "b"]
    assert rows[0]["at"].startswith("2116-02-20 23:53:38.427387904") and rows[1]["at"] is None


def test_a_folder_with_the_name_of_a_file(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(UserError, match=r"unknown file type"):
        read(str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="cannot be read as rows"):
        read("x" * 5000 + ".jsonl")


PAIR = "Hallo Welt.\tHello world.\n"


@pytest.mark.parametrize(
    ("name", "first", "rows"),
    [
        ("de-en.tsv", "", 1),
        ("de-en.tsv", "text0\ttext1\n", 1),
        ("de-en.tsv", "source\ttarget\n", 1),
        ("de-en.tsv", "SRC\ttgt\n", 1),
        ("de-en.tsv", "de\ten\n", 1),
        ("de-en.tsv", "Nein.\tNo.\n", 2),
        ("pt-BR-en.tsv", "", 1),
        ("en-pt-BR.tsv", "", 1),
        ("es-419-en.tsv", "", 1),
        ("en-zh-Hans-CN.tsv", "", 1),
        ("deu_Latn-eng_Latn.tsv", "deu_Latn\teng_Latn\n", 1),
    ],
)
def test_headers_of_pair_files(tmp_path, name, first, rows):
    (tmp_path / name).write_text(first + PAIR, "utf-8")
    found = [record.fields for record in read(str(tmp_path / name))]
    assert len(found) == rows
    assert found[-1]["text0"] == "Hallo Welt."
    assert f"{found[0]['lang0']}-{found[0]['lang1']}.tsv" == name
    known = {"de", "en", "pt-BR", "es-419", "zh-Hans-CN", "deu_Latn", "eng_Latn"}
    assert {found[0]["lang0"], found[0]["lang1"]} <= known


@pytest.mark.parametrize("first", ["German\tEnglish", "sentence_de\tsentence_en", "text_0\ttext_1"])
def test_what_looks_like_a_header_is_not_a_pair(refused, first):
    sentence = refused("de-en.tsv", f"{first}\n{PAIR}".encode())
    assert sentence.startswith("T/de-en.tsv:1: ") and "look like the names of columns" in sentence


@pytest.mark.parametrize("name", ["f.tsv", "f.csv"])
@pytest.mark.parametrize("head", ["text", "text\ttext2", "text,text2"])
def test_a_carriage_return_within_a_line_of_a_table(refused, name, head):
    """Without this check one row became two, and messages named wrong lines after it."""
    rows = head.replace("text2", "x").replace("text", "hello\rthere")
    content = f"{head}\r\n{rows}\r\nbye\n".encode()
    assert "a carriage return is within a line" in refused(name, content)
    assert f"{name}:2: " in refused(name, content)


def test_a_carriage_return_in_quotes_is_text(tmp_path):
    (tmp_path / "f.csv").write_bytes(b'text,lang\r\n"hello\rthere\nyou",en\r\nbye,de\r\n')
    rows = list(read_files(str(tmp_path / "f.csv")))
    assert [fields["text"] for fields, _ in rows] == ["hello\rthere\nyou", "bye"]
    assert rows[1][1].endswith("f.csv:4")


def test_a_carriage_return_between_parts_of_json_is_a_blank(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b'{"text": "a",\r "n": 1}\r\n{"text": "b"}\r\n')
    rows = list(read_files(str(tmp_path / "f.jsonl")))
    assert [fields["text"] for fields, _ in rows] == ["a", "b"]
    assert rows[1][1].endswith("f.jsonl:2")


def test_lines_end_at_newlines_alone(tmp_path):
    """U+2028, U+0085, vertical tabs and form feeds stand within sentences."""
    odd = "one\u2028two\x85three\x0bfour\x0cfive\x1csix\rseven"
    (tmp_path / "en.txt").write_bytes(f"{odd}\r\nlast\n".encode())
    (tmp_path / "de.txt").write_text("eins\nzwei", "utf-8")
    assert text_lines(tmp_path / "en.txt") == [odd, "last"]
    (corpus,) = read_parallel(str(tmp_path))
    assert corpus.sentences == {"en": [odd, "last"], "de": ["eins", "zwei"]}
    (tmp_path / "f.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ("a\u2028b", "c"))
    )
    assert [record.fields["text"] for record in read(str(tmp_path / "f.jsonl"))] == [
        "a\u2028b",
        "c",
    ]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"id": 1, "lang": "de", "text": "a"}] * 2, "f.jsonl:2: the id '1' has a row in 'de'"),
        ([{"id": 1, "lang": "de", "text": ["a"]}], "f.jsonl:1: the text is empty"),
        ([{"id": 1, "lang": ["de"], "text": "a"}], "f.jsonl:1: a row with an id needs lang"),
        ([{"text0": "a", "text1": "b", "lang0": "de", "lang1": "de"}], "f.jsonl:1: lang0 and"),
        ([{"text0": "a", "text1": "b", "lang0": "de", "lang1": "en"}, {"text0": "a"}],
         "f.jsonl:2: this row has no lang0"),
        ([{"translation": {"de": "a", "en": "b"}}, {"translation": "a"}], "f.jsonl:2: this row"),
    ],
)  # fmt: skip
def test_parallel_rows(tmp_path, rows, sentence):
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        read_parallel(str(file))
    assert sentence in str(error.value)
