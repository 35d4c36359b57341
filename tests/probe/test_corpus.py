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
    assert corpus.sentences == {"de": ["zwei", "eins"], "en": ["two", "one"]}  # as they come
    assert corpus.notes == (f"{path}: ids that some languages lack were left out: 1 of 3.",)


def test_ids_of_the_wanted_languages_are_shared(tmp_path):
    """Whatever a third language lacks; the first rows are those of the file, 2 before 10."""
    path = tmp_path / "all.jsonl"

    def write(texts):
        rows = [json.dumps({"id": i, "lang": name, "text": f"{name} {i}"}) for name, i in texts]
        path.write_text("\n".join(rows) + "\n")

    texts = [(name, i) for i in range(12) for name in ("en", "de")]
    write([*texts, ("cy", 5), ("cy", 3)])
    (corpus,) = read_parallel(str(path), ["de", "en"])
    assert corpus.sentences["de"] == [f"de {i}" for i in range(12)] and not corpus.notes
    (corpus,) = read_parallel(str(path), ["de", "en"], rows=3)
    assert corpus.sentences["en"] == ["en 0", "en 1", "en 2"]
    (corpus,) = read_parallel(str(path))
    assert corpus.sentences["cy"] == ["cy 3", "cy 5"]
    assert corpus.notes == (f"{path}: ids that some languages lack were left out: 10 of 12.",)
    write([*texts, ("cy", 99)])
    with pytest.raises(UserError, match=r"all.jsonl: no id occurs in all of en, de, cy; name"):
        read_parallel(str(path))
    assert len(read_parallel(str(path), ["de", "en"])[0]) == 12


def test_files_in_a_folder_are_read_or_named(tmp_path):
    """A region in digits, and a script with a region; a split alone is no language."""
    names = ("de", "de-st", "dev", "doc_ids", "en", "es-419", "sr-Latn", "zh-Hans-CN")
    for name in (*names, "LICENSE"):
        (tmp_path / f"{name}.txt").write_text("a\nb\n")
    (tmp_path / "README.md").write_text("not text")
    (tmp_path / "de-en.tsv").write_text("Hallo\tHello\n")
    (corpus,) = read_parallel(str(tmp_path), pivot="es")
    assert corpus.languages == ("de", "de-st", "en", "es-419", "sr-Latn", "zh-Hans-CN")
    assert corpus.notes == (
        f"{tmp_path}: not read, since the name is not that of a language: de-en.tsv, dev.txt, "
        "doc_ids.txt.",
    )


def test_translation_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"translation": {"de": "a", "en": "b", "cs": "c"}}\n' * 2)
    (corpus,) = read_parallel(str(path), ["de", "en"])
    assert corpus.sentences == {"de": ["a", "a"], "en": ["b", "b"]}


def test_equal_sentences_are_one():
    corpus = Parallel({"en": ["a", "b", "a"], "de": ["x", "y", "z"]}, "")
    same = corpus.same("en")
    assert same[0] == same[2] != same[1]


def test_which_texts_say_what_is_equal():
    """Of pairs both sides do, whatever their names and order; of several languages the pivot."""
    texts = ["a", "b"]
    pair = Parallel({"fr": texts, "en": texts}, "")
    assert pair.told_by("en") == pair.told_by("") == ("en", "fr")
    several = Parallel({"fr": texts, "en": texts, "de": texts}, "")
    assert several.told_by("en") == ("en",) and several.told_by("") == ("de", "en", "fr")


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
