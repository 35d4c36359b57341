"""Rows of data and the files that hold them."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jaxalign.data.pairs import to_pair
from jaxalign.data.prompts import two_prompts
from jaxalign.data.sources import Record, read
from jaxalign.data.tasks import TASKS, render
from jaxalign.probe.corpus import read_parallel
from tests.fuzz.odd import changed, damaged, some, texts, values, written

words = some(st.sampled_from(["wake me up", "nine am", "time", "Grüße", "weather/find", "de"]))
spans = some(
    st.one_of(
        st.lists(st.tuples(words, words).map(list), max_size=3),
        st.lists(st.fixed_dictionaries({"type": words, "text": words}), max_size=2),
        st.fixed_dictionaries({"type": st.lists(words, max_size=2), "text": st.lists(words)}),
    )
)
annotated = some(
    st.lists(st.sampled_from(["wake me ", "[time : nine]", "[time : ", "]", "[", "[:]", ":"])).map(
        "".join
    )
)
FIELDS = {
    "utterance": words, "text": words, "prefix": words, "target": words, "intent": words,
    "lang": words, "slots": spans, "entities": spans, "annot_utt": annotated, "src": words,
    "tgt": words, "src_lang": words, "tgt_lang": words, "text0": words, "text1": words,
    "lang0": words, "lang1": words,
    "question": words,
    "choices": some(
        st.lists(words, min_size=2, max_size=3)
        | st.fixed_dictionaries({"text": st.lists(words, max_size=3), "label": st.just(["A"])})
    ),
    "answer": some(st.integers(0, 2) | words),
    "translation": some(st.dictionaries(st.sampled_from(["de", "en", "pt-BR"]), words, max_size=3)),
}  # fmt: skip
NEEDED = {
    "rows": ("text",), "slots": ("utterance", "slots"), "intent": ("utterance", "intent"),
    "intent_slots": ("utterance", "intent", "slots"), "ner": ("text", "entities"),
    "translation": ("src", "tgt", "src_lang", "tgt_lang"),
    "choice": ("question", "choices", "answer"), "text": ("text",),
}  # fmt: skip


def _rows_of(kind: str) -> st.SearchStrategy[tuple[str, dict]]:
    needed = {name: FIELDS[name] for name in NEEDED[kind]}
    more = {name: FIELDS[name] for name in ("lang", "annot_utt", "target", "translation", "prefix")}
    return st.tuples(
        st.just(kind),
        st.fixed_dictionaries(needed)
        | st.fixed_dictionaries(needed, optional={"lang": words})
        | st.fixed_dictionaries({}, optional=needed | more),
    )


records = st.sampled_from(sorted(NEEDED)).flatmap(_rows_of)


def read_record(value: tuple[str, dict], _: Path) -> None:
    kind, fields = value
    example = render(kind, Record(fields, "rows.jsonl:1"))
    assert example.answer.strip() and isinstance(example.prompt, str)
    assert isinstance(example.language, str)
    if kind == "text":
        assert example.finished and not example.prompt and example.answer == fields["text"]
    if kind == "choice":
        given = fields["choices"]
        given = given["text"] if isinstance(given, dict) else given
        assert list(example.choices) == list(given) and example.answer in given
        if type(fields["answer"]) is int:
            assert example.answer == given[fields["answer"]]
    if kind == "ner":
        assert all(t.strip() and w.strip() for t, w in TASKS[kind].parse(example.answer))
    if kind in ("slots", "intent_slots") and fields.get("target") is None:
        given = fields.get("slots")
        plain = isinstance(given, list) and all(isinstance(item, list) for item in given)
        if plain and not any(mark in str(given) for mark in (";", ":", "\\", "None", "none")):
            said = TASKS[kind].parse(example.answer)
            got = said.slots if kind == "intent_slots" else said
            if kind == "slots" or not set(":;") & set(str(fields["intent"])):
                assert got == [(t.strip(), w.strip()) for t, w, *_ in given], example.answer


def _command(place: tuple[str, str]) -> dict:
    lang, item = place
    return {"id": item, "lang": lang, "utterance": "wake me up", "intent": "alarm/set"}


pivots = [("en", "1"), ("en", "2")]
translated = st.lists(
    st.sampled_from([(lang, item) for lang in ("de", "it") for item in ("1", "2")]), unique=True
).map(lambda places: list(map(_command, [*pivots, *places])))
odd_command = st.fixed_dictionaries(
    {"lang": some(st.sampled_from(["de", "it"]))},
    optional={"id": some(st.sampled_from(["1", 2])), "utterance": words, "intent": words},
)
behind_two = st.tuples(
    st.one_of(
        translated,
        changed(list(map(_command, pivots))),
        st.tuples(translated, st.lists(odd_command, max_size=2)).map(
            lambda both: [*both[0], *both[1]]
        ),
    ),
    st.sampled_from(["en", "en", "de", "", "fr"]),
)


def read_prompts(value: tuple[list, str], _: Path) -> None:
    given, pivot = value
    given = [fields for fields in given if isinstance(fields, dict)]  # as a reader gives them
    records = [Record(fields, f"rows.jsonl:{line}") for line, fields in enumerate(given, start=1)]
    found = two_prompts(records, "intent", pivot)
    assert len(found) == sum(not pivot or fields["lang"] != pivot for fields in given)
    for row in found:
        assert row.student.answer == row.teacher.answer
        assert row.languages == (row.student.language, row.teacher.language)
        assert row.teacher.language == pivot or row.student is row.teacher


SIDES = {name: FIELDS[name] for name in ("text0", "text1")}
pair_fields = st.one_of(
    st.fixed_dictionaries(SIDES, optional={name: FIELDS[name] for name in ("lang0", "lang1")}),
    st.fixed_dictionaries({"translation": FIELDS["translation"]}, optional=SIDES),
    st.fixed_dictionaries({}, optional=FIELDS),
)


def read_pair(fields: dict, _: Path) -> None:
    pair = to_pair(Record(fields, "pairs.jsonl:1"))
    assert pair.source.strip() and pair.target.strip() and isinstance(pair.language, str)


# --- files ----------------------------------------------------------------------------------------

ROWS = [
    {"utterance": "wake me up at nine", "slots": [["time", "nine"]], "lang": "en", "id": 1},
    {"utterance": "wie wird das Wetter", "slots": [], "lang": "de", "id": 2, "n": 1.5},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
json_lines = st.one_of(
    damaged(LINES),
    st.lists(st.one_of(values, changed(ROWS[0])).map(written), max_size=4).map(
        lambda lines: "\n".join(lines).encode()
    ),
)


def read_lines(content: bytes, folder: Path) -> None:
    file = folder / "rows.jsonl"
    file.write_bytes(content)
    found = [record.fields for record in read(str(file))]
    # With a carriage return within a line, which ends one for Python, there are more of them.
    lines = re.split("\r\n?|\n", content.decode("utf-8-sig"))
    assert repr(found) == repr([json.loads(line) for line in lines if line.strip()])
    json.dumps(found, ensure_ascii=False).encode("utf-8")


def read_list(document: Any, folder: Path) -> None:
    file = folder / "rows.json"
    file.write_text(written(document), "utf-8")
    assert len(read(str(file))) == len(document)


def read_zipped(value: tuple[bytes, str], folder: Path) -> None:
    content, name = value
    (folder / name).write_bytes(content)
    found = read(str(folder / name))
    whole = gzip.decompress(content) if name.endswith(".gz") else content
    if name.startswith("rows.jsonl"):
        assert len(found) == sum(1 for line in whole.split(b"\n") if line.strip())


cells = st.one_of(texts, st.sampled_from(["a,b", "a\tb", '"a"', "text0", "de", "Nein.", "x\ny"]))


def _row(line: list[str], delimiter: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerow(line)
    return out.getvalue()


tables = st.tuples(
    st.sampled_from(["rows.csv", "rows.tsv", "de-en.tsv", "pt-BR-en.tsv", "rows.csv.gz"]),
    st.one_of(
        st.lists(st.lists(cells, min_size=2, max_size=2), max_size=4),
        st.lists(st.lists(cells, max_size=3), max_size=4),
    ),
    st.sampled_from([",", "\t"]),
    st.booleans(),
)


def read_table(value: tuple[str, list[list[str]], str, bool], folder: Path) -> None:
    name, rows, delimiter, quoted = value
    text = "".join(
        _row(row, delimiter) if quoted else delimiter.join(row) + "\n" for row in rows
    ).encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    found = [record.fields for record in read(str(folder / name))]
    pairs = "-" in name
    for fields in found:
        assert all(isinstance(cell, str) for cell in fields.values())
        assert not pairs or {"lang0", "lang1", "text0"} <= fields.keys()
    if name == "rows.csv" and quoted and delimiter == ",":  # as it was written
        as_written = [row for row in rows if row]
        assert [list(fields.values()) for fields in found] == as_written[1:]


@functools.cache
def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = pa.BufferOutputStream()
    columns = {
        "text": ["a", "b"], "at": pa.array([2**62, None], pa.timestamp("ns")), "n": [[1], [2, 3]],
        "raw": [b"\xff", b""], "d": [{"x": 1}, None],
    }  # fmt: skip
    pq.write_table(pa.table(columns), out)
    return out.getvalue().to_pybytes()


def read_parquet(content: bytes, folder: Path) -> None:
    (folder / "rows.parquet").write_bytes(content)
    assert all(isinstance(record.fields, dict) for record in read(str(folder / "rows.parquet")))


lines = st.lists(texts.filter(lambda t: "\n" not in t), min_size=1, max_size=4)


def read_corpus(value: tuple[list[str], list[str], str], folder: Path) -> None:
    german, english, end = value
    for name, rows in (("de.txt", german), ("en.txt", english)):
        text = "".join(row + end for row in rows)
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    (corpus,) = read_parallel(str(folder))
    for name, rows in (("de", german), ("en", english)):
        rows = [rows[0].removeprefix("\ufeff"), *rows[1:]]
        assert [r.removesuffix("\r") for r in rows] == corpus.sentences[name]
