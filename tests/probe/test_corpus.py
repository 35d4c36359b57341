"""Parallel text in the layouts that lie around, and what is wrong with it."""

import json

import pytest

from jaxalign.errors import UserError
from jaxalign.probe.corpus import Parallel, read_parallel


@pytest.mark.parametrize("names", [("de.txt", "en.txt"), ("dev.de.txt", "dev.en.txt")])
def test_a_file_a_language(tmp_path, names):
    for name, text in zip(names, ("eins\nzwei\n", "one\ntwo\n"), strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not text")
    (tmp_path / "doc_ids.txt").write_text("d1\nd2\n")
    (corpus,) = read_parallel(str(tmp_path))
    assert corpus.sentences == {"de": ["eins", "zwei"], "en": ["one", "two"]}
    assert corpus.languages == ("de", "en") and len(corpus) == 2


def test_flores_files(tmp_path):
    for name in ("eng_Latn", "deu_Latn"):
        (tmp_path / f"{name}.devtest").write_text("a\nb\n")
    (corpus,) = read_parallel(str(tmp_path), pivot="eng_Latn")
    assert corpus.languages == ("deu_Latn", "eng_Latn")
    (same,) = read_parallel(str(tmp_path), ["de", "en"])  # the pivot, too, by its usual code
    assert same.sentences == corpus.sentences


def test_pairs_of_languages(tmp_path):
    (tmp_path / "de-en.tsv").write_text("Hallo\tHello\n")
    (tmp_path / "it-en.tsv").write_text("Ciao\tHello\nNo\tNo\n")
    corpora = read_parallel(str(tmp_path))
    assert [c.sentences for c in corpora] == [
        {"de": ["Hallo"], "en": ["Hello"]},
        {"it": ["Ciao", "No"], "en": ["Hello", "No"]},
    ]
    (only,) = read_parallel(str(tmp_path), ["it", "en"], rows=1)
    assert only.sentences == {"it": ["Ciao"], "en": ["Hello"]}


def test_rows_with_shared_ids(tmp_path):
    rows = [
        ("de", 2, "zwei"),
        ("de", 1, "eins"),
        ("en", 1, "one"),
        ("en", 2, "two"),
        ("en", 3, "x"),
    ]
    path = tmp_path / "all.jsonl"
    path.write_text(
        "".join(json.dumps({"lang": a, "id": i, "utterance": t}) + "\n" for a, i, t in rows)
    )
    (corpus,) = read_parallel(str(path))
    assert corpus.sentences == {"de": ["eins", "zwei"], "en": ["one", "two"]}


def test_translation_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"translation": {"de": "a", "en": "b", "cs": "c"}}\n' * 2)
    (corpus,) = read_parallel(str(path), ["de", "en"])
    assert corpus.sentences == {"de": ["a", "a"], "en": ["b", "b"]}


def test_equal_sentences_are_one():
    corpus = Parallel({"en": ["a", "b", "a"], "de": ["x", "y", "z"]}, "")
    same = corpus.same("en")
    assert same[0] == same[2] != same[1]


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ({"de.txt": "a\n", "en.txt": "a\nb\n", "it.txt": "a\nb\n"}, {},
         "de.txt has 1 lines"),
        ({"de.txt": "a\n\n", "en.txt": "a\nb\n"}, {}, "de.txt:2: "),
        ({"de.txt": "a\n", "en.txt": "a\n"}, {"languages": ["en", "dee"]},
         "'dee' (it has: de, en)"),
        ({"en.txt": "a\n"}, {}, "(en)"),
        ({"de.txt": "a\n", "it.txt": "a\n"}, {}, "'en' (it has: de, it)"),
        ({"de.txt": "a\n", "dev.de.txt": "a\n"}, {}, "(de.txt, dev.de.txt)"),
        ({"notes.md": "a"}, {}, "holds no parallel text"),
        ({"de-en.tsv": "a\t\n"}, {}, "de-en.tsv:1: the en side"),
    ],
)  # fmt: skip
def test_bad_text_is_told(tmp_path, files, words, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_parallel(str(tmp_path), **words)
    assert message in str(error.value)
