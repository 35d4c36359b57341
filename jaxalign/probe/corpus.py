"""Parallel text as it is found: sentences of several languages, line by line the same.

    (corpus,) = read_parallel('data/ntrex')            # am.txt, ar.txt, ...: one file a language
    corpus.sentences['cy'][7]                          # says what corpus.sentences['en'][7] says
    read_parallel('data/tatoeba')                      # de-en.tsv, ...: one corpus a pair

Also FLORES folders (`dev/eng_Latn.dev`, `dev.de.txt`), rows of JSONL, hub datasets or TFDS with a
`translation` of several languages, and rows of one language that share an `id`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data import sources
from jaxalign.data.files import text_lines
from jaxalign.data.languages import find_language
from jaxalign.data.transforms.parallel import second
from jaxalign.errors import UserError

# de.txt | dev.de.txt | de-st.txt | pt-BR.txt | es-419.txt | zh-Hans-CN.txt | deu_Latn.devtest
LINES = (
    re.compile(
        r"(?!dev\.txt)(?:(?:dev|devtest|test|valid|train)\.)?"  # a split alone is no language
        r"([a-z]{2,3}(?:-[a-z]{2})?(?:[-_][A-Z][a-z]{3})?(?:[-_](?:[A-Z]{2}|[0-9]{3}))?)\.txt"
    ),
    re.compile(r"([a-z]{3}_[A-Z][a-z]{3})\.(?:dev|devtest)"),
)
SIMILAR = re.compile(r"[a-z].*\.(?:txt|dev|devtest|tsv)")  # might be meant; LICENSE.txt is not
TEXTS = ("text", "sentence", "utterance")

# Language -> what its translations share (a line, a row or an id) -> sentence, in their order.
Texts = Mapping[str, Mapping[Any, str]]


@dataclass(frozen=True)
class Parallel:
    """Sentences that say the same in every language, in one order."""

    sentences: dict[str, list[str]]  # language -> N sentences
    name: str  # where they come from
    notes: tuple[str, ...] = ()  # sentences on what is there and was left out

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, sorted."""
        return tuple(sorted(self.sentences))

    def __len__(self) -> int:
        return len(next(iter(self.sentences.values())))

    def same(self, language: str) -> np.ndarray:
        """[N] int: equal numbers where the sentences of this language are equal."""
        numbers: dict[str, int] = {}  # an array of texts would be as wide as the longest of them
        texts = self.sentences[language]
        return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int32)

    def told_by(self, pivot: str) -> tuple[str, ...]:
        """The languages whose texts say which sentences say the same: one for all, or each.

        Of several languages it is the pivot: what translates one sentence says the same. Of two, or
        without it, each tells its own: a sentence of either may have several translations, and
        finding any of them is finding one.
        """
        several = pivot in self.sentences and len(self.sentences) > 2
        return (pivot,) if several else self.languages


def read_parallel(
    source: str, languages: Sequence[str] = (), rows: int = 0, pivot: str = "en"
) -> list[Parallel]:
    """The corpora of a folder, a file, or an `hf:`/`tfds:` name.

    Args:
      source: see the module text.
      languages: keep only these; empty: all.
      rows: keep only the first ones that these languages have; 0: all.
      pivot: must be there; the language that others are compared with.

    Returns:
      One corpus where all languages are parallel, one for each pair of languages otherwise.

    Raises:
      UserError: files of unequal length, an empty line, an unknown language, fewer than two; an id
        that a language has twice, or none that all of them have; a negative number of rows.
    """
    if rows < 0:
        raise UserError(f"--rows: {rows} should be 0 (all) or more")
    found, left = _folder(Path(source)) if Path(source).is_dir() else ({source: _rows(source)}, ())
    have = sorted({language for texts in found.values() for language in texts})
    languages = [find_language(language, have) for language in languages]
    pivot = find_language(pivot, have)
    for language in languages:
        if language not in have:
            raise UserError(
                f"{source} has no {language!r} (it has: {', '.join(have)})"
                f"{sources.nearest(language, have)}"
            )
    kept: list[Parallel] = []
    for name, texts in found.items():
        chosen = {a: texts[a] for a in texts if not languages or a in languages}
        if len(chosen) > 1:
            kept.append(_shared(chosen, name, rows, () if kept else left))
    if not kept:
        raise UserError(
            f"{source}: one language alone ({', '.join(languages or have)}) has nothing to be "
            "aligned with; give at least two"
        )
    if not any(pivot in corpus.sentences for corpus in kept):
        raise UserError(
            f"{source} has no pivot language {pivot!r} (it has: {', '.join(have)}); name another "
            "with --pivot"
        )
    return kept


def _shared(texts: Texts, name: str, rows: int, notes: tuple[str, ...]) -> Parallel:
    """The first sentences that all of these languages have."""
    shared, left = shared_ids(texts, name)
    shared = shared[: rows or None]
    return Parallel({a: [one[i] for i in shared] for a, one in texts.items()}, name, notes + left)


def shared_ids(
    texts: Mapping[str, Mapping[Any, Any]], name: str
) -> tuple[list[Any], tuple[str, ...]]:
    """What all of these languages have, in the order of the first, and a note on what is left out.

    Raises:
      UserError: they share none.
    """
    everything = set().union(*texts.values())
    shared = [i for i in next(iter(texts.values())) if all(i in one for one in texts.values())]
    if not shared:
        raise UserError(
            f"{name}: no id occurs in all of {', '.join(texts)}; name languages that share ids "
            "with --languages"
        )
    lost = len(everything) - len(shared)
    ids = f"{lost:,} of {len(everything):,}"
    note = f"{name}: ids that some languages lack were left out: {ids}."
    return shared, (note,) if lost else ()


def _folder(folder: Path) -> tuple[dict[str, Texts], tuple[str, ...]]:
    """What its files hold, by name: all in one, or each pair; and a sentence on those left out."""
    files = _line_files(folder)
    pairs = [] if files else sorted(folder.glob("*-*.tsv"))
    if not files and not pairs:
        raise UserError(
            f"{folder} holds no parallel text; it should hold LANGUAGE.txt, SPLIT.LANGUAGE.txt "
            "or FLORES files, or XX-YY.tsv"
        )
    read = {*files.values(), *pairs}
    left = [f.name for f in sorted(folder.iterdir()) if SIMILAR.fullmatch(f.name) and f not in read]
    notes = (f"{folder}: not read, since the name is not that of a language: {', '.join(left)}.",)
    found = {str(folder): _by_line(files)} if files else {str(f): _rows(str(f)) for f in pairs}
    return found, notes if left else ()


def _line_files(folder: Path) -> dict[str, Path]:
    """Language -> its text file, directly in the folder."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        match = next((m for pattern in LINES if (m := pattern.fullmatch(file.name))), None)
        if not match:
            continue
        if match[1] in files:
            raise UserError(
                f"{folder} holds two files of {match[1]} ({files[match[1]].name}, {file.name}); "
                "move one of them away"
            )
        files[match[1]] = file
    return files


def _by_line(files: Mapping[str, Path]) -> Texts:
    sentences = {language: _lines(file) for language, file in files.items()}
    lengths = {language: len(lines) for language, lines in sentences.items()}
    usual = max(set(lengths.values()), key=list(lengths.values()).count)
    odd = [language for language, length in lengths.items() if length != usual]
    if odd:
        raise UserError(
            f"{files[odd[0]]} has {lengths[odd[0]]} lines, the other languages {usual}; line i of "
            "every file must say the same, so remove the file or repair it"
        )
    return {language: dict(enumerate(lines)) for language, lines in sentences.items()}


def _lines(file: Path) -> list[str]:
    lines = text_lines(file)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(
                f"{file}:{number}: an empty line; remove this line from the files of all languages"
            )
    if not lines:
        raise UserError(f"{file} is empty")
    return lines


def _rows(source: str) -> Texts:
    """Rows of pairs, of a `translation` dict, or of one language with a shared id."""
    records = sources.read(source)
    first = records[0].fields
    if isinstance(first.get("translation"), Mapping):
        read = _from_dicts
    elif {"text0", "text1", "lang0", "lang1"} <= first.keys():
        read = _from_pairs
    elif "id" in first:
        return _from_ids(records)
    else:
        raise UserError(
            f"{records[0].origin}: parallel rows need text0, text1, lang0, lang1, or a "
            f"translation of several languages, or lang, id and a text; this row has: "
            f"{sources.names(first)}"
        )
    sentences: dict[str, dict[int, str]] = {}
    for number, record in enumerate(records):
        found = read(record)
        for language, text in found.items():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{record.origin}: the {language} side is empty; remove the row")
            column = sentences.setdefault(language, {})
            if len(column) != number:
                raise UserError(
                    f"{record.origin}: rows before this one have no {language}; all rows of "
                    f"{source} must hold the same languages"
                )
            column[number] = text
        if len(found) != len(sentences):
            missing = sorted(sentences.keys() - found.keys())
            raise UserError(f"{record.origin}: this row has no {', '.join(missing)}")
    return sentences


def _from_dicts(record: sources.Record) -> dict[str, str]:
    sides = record.fields.get("translation")
    if not isinstance(sides, Mapping):
        raise UserError(f"{record.origin}: this row has no translation of several languages")
    return dict(sides)


def _from_pairs(record: sources.Record) -> dict[str, str]:
    fields = record.fields
    missing = {"text0", "text1", "lang0", "lang1"} - fields.keys()
    if missing:
        raise UserError(f"{record.origin}: this row has no {', '.join(sorted(missing))}")
    languages = [fields["lang0"], fields["lang1"]]
    if not all(isinstance(name, str) and name for name in languages) or len(set(languages)) < 2:
        raise UserError(f"{record.origin}: lang0 and lang1 should be the codes of two languages")
    return dict(zip(languages, (fields["text0"], fields["text1"]), strict=True))


def _from_ids(records: Sequence[sources.Record]) -> Texts:
    """Texts by language and id, in the order in which the ids first come."""
    found: dict[str, dict[str, str]] = {}
    order: dict[str, None] = {}
    origins: dict[tuple[str, str], str] = {}
    for record in records:
        fields = record.fields
        text = next((fields[name] for name in TEXTS if name in fields), None)
        language = fields.get("lang") or fields.get("language")
        if text is None or not isinstance(language, str) or "id" not in fields:
            raise UserError(
                f"{record.origin}: a row with an id needs lang and one of {', '.join(TEXTS)}"
            )
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{record.origin}: the text is empty; remove the row")
        texts, name = found.setdefault(language, {}), str(fields["id"])
        if name in texts:
            raise second(record.origin, name, language, origins[language, name])
        texts[name], origins[language, name], order[name] = text, record.origin, None
    return {a: {i: texts[i] for i in order if i in texts} for a, texts in found.items()}
