"""What the demo's base model reads before it is fine-tuned, and the data shipped with it.

Real text only: xSID, NTREX and Tatoeba, in English and the demo's languages. Three rules keep the
demo honest. No xSID test row is read, nor any sentence equal to one: test rows measure intent and
retrieval. Every third xSID validation row (`is_dev`) is kept for choosing hyper-parameters and is
neither read nor used as a pair. No label of the task ever stands next to words that mean it: the
answer format is read with random labels, in English only.

    corpus = read_corpus('../shared/data')
    len(corpus.sentences['de'])            # monolingual sentences
    documents = compose(corpus, count=1000, seed=0)
    documents[0]                           # Document(system=None, user=None, text='Es regnet.')
    corpus.test[0]["id"]                   # 'test-0'
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxalign.data.files import text_lines
from jaxalign.demo import ALIGNED, LANGUAGES
from jaxalign.errors import UserError

NAMES = {
    "en": "English",
    "da": "Danish",
    "de": "German",
    "de-st": "South Tyrolean",
    "id": "Indonesian",
    "it": "Italian",
    "nl": "Dutch",
    "sr": "Serbian",
    "tr": "Turkish",
}
NTREX_HELD_OUT = 200  # the first lines stay unread, for retrieval outside the task's domain
TASK_ROWS = 3000  # of xSID's English training rows, shipped

# Tokens are not known here, so the shares count documents.
SHARES = {"sentence": 0.40, "translation": 0.30, "copy": 0.15, "format": 0.15}


class Document(NamedTuple):
    """One pre-training text: a plain sentence, or a turn of user and assistant."""

    system: str | None
    user: str | None
    text: str  # the sentence, or the assistant's words


@dataclass(frozen=True)
class Corpus:
    """The text of the demo, each part with its use."""

    sentences: dict[str, list[str]]  # language: monolingual text
    parallel: dict[str, list[tuple[str, str]]]  # language: (sentence, English), for pre-training
    pairs: list[dict[str, str]]  # alignment pairs, ALIGNED with English
    task: list[dict]  # English rows with labels
    dev: list[dict]  # validation rows of all languages, for hyper-parameters
    test: list[dict]  # test rows of all languages
    intents: list[str]
    slots: list[str]


def is_dev(row_id: str) -> bool:
    """Whether a validation row is for choosing hyper-parameters (`valid-2`, `valid-5`, ...)."""
    return int(row_id.rsplit("-", 1)[1]) % 3 == 2


def normal(text: str) -> str:
    """The text with case, punctuation and blanks folded, to find equal sentences."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def read_corpus(data: str | Path) -> Corpus:
    """Everything the recipe takes from the data folder.

    Raises:
        UserError: when the folder lacks xsid/, tatoeba/ or ntrex/.
    """
    data = Path(data)
    for part in ("xsid", "tatoeba", "ntrex"):
        if not (data / part).is_dir():
            raise UserError(f"{data} has no folder {part}/; give the folder that holds the data")
    test = [row for lang in LANGUAGES for row in _rows(data / "xsid" / f"test.{lang}.jsonl")]
    valid = [row for lang in LANGUAGES for row in _rows(data / "xsid" / f"valid.{lang}.jsonl")]
    # xSID repeats some test utterances in its validation part: such rows are left out.
    tested = {normal(row["utterance"]) for row in test}
    repeated = {row["id"] for row in valid if normal(row["utterance"]) in tested}
    dev = [row for row in valid if is_dev(row["id"]) and row["id"] not in repeated]
    forbidden = {normal(row["utterance"]) for row in test + dev}

    def allowed(*texts: str) -> bool:
        return not any(normal(text) in forbidden for text in texts)

    task = [row for row in _rows(data / "xsid" / "train.en.jsonl") if allowed(row["utterance"])]
    read = [row for row in valid if not is_dev(row["id"]) and allowed(row["utterance"])]
    in_domain: dict[str, dict[str, str]] = {lang: {} for lang in LANGUAGES}
    for row in read:
        in_domain[row["lang"]][row["id"]] = row["utterance"]

    sentences = {lang: list(in_domain[lang].values()) for lang in LANGUAGES}
    sentences["en"] += [row["utterance"] for row in task]
    parallel: dict[str, list[tuple[str, str]]] = {lang: [] for lang in LANGUAGES[1:]}
    pairs = []
    english = text_lines(data / "ntrex" / "en.txt")[NTREX_HELD_OUT:]
    sentences["en"] += english
    for path in sorted((data / "tatoeba").glob("*-en.tsv")):  # English of every language's file
        sentences["en"] += [line.split("\t")[1] for line in text_lines(path)]
    for lang in LANGUAGES[1:]:
        ntrex, tatoeba = data / "ntrex" / f"{lang}.txt", data / "tatoeba" / f"{lang}-en.tsv"
        if ntrex.exists():
            lines = text_lines(ntrex)[NTREX_HELD_OUT:]
            sentences[lang] += lines
            parallel[lang] += zip(lines, english, strict=True)
        if tatoeba.exists():
            rows = [line.split("\t") for line in text_lines(tatoeba)]
            both = [(a, b) for a, b, *_ in rows if allowed(a, b) and not _cyrillic(a)]
            sentences[lang] += [a for a, _ in both]
            parallel[lang] += both[::2]
            if lang in ALIGNED:
                pairs += [_pair(lang, a, b, "tatoeba") for a, b in both]
        if lang in ALIGNED:
            shared = in_domain[lang].keys() & in_domain["en"].keys()
            pairs += [
                _pair(lang, in_domain[lang][i], in_domain["en"][i], "xsid-valid")
                for i in sorted(shared, key=lambda i: int(i.rsplit("-", 1)[1]))
            ]
    sentences = {
        lang: [text for text in dict.fromkeys(texts) if allowed(text)]
        for lang, texts in sentences.items()
    }
    return Corpus(
        sentences=sentences,
        parallel=parallel,
        pairs=pairs,
        task=task,
        dev=dev,
        test=test,
        intents=sorted({row["intent"] for row in task}),
        slots=sorted({label for row in task for label, _ in row["slots"]}),
    )


def compose(corpus: Corpus, count: int, seed: int) -> list[Document]:
    """`count` pre-training documents, their kinds drawn by `SHARES`."""
    draw = random.Random(seed)
    kinds, weights = list(SHARES), list(SHARES.values())
    return [
        _DOCUMENTS[kind](corpus, draw) for kind in draw.choices(kinds, weights=weights, k=count)
    ]


def _sentence(corpus: Corpus, draw: random.Random) -> Document:
    return Document(None, None, draw.choice(corpus.sentences[_language(corpus, draw)]))


def _translation(corpus: Corpus, draw: random.Random) -> Document:
    lang = draw.choice([lang for lang, pairs in corpus.parallel.items() if pairs])
    foreign, english = draw.choice(corpus.parallel[lang])
    if draw.random() < 0.5:
        return Document("English", foreign, english)
    return Document(NAMES[lang], english, foreign)


def _copy(corpus: Corpus, draw: random.Random) -> Document:
    text = draw.choice(corpus.sentences[_language(corpus, draw)])
    return Document("copy", text, "; ".join(_spans(text, draw)))


def _format(corpus: Corpus, draw: random.Random) -> Document:
    """An answer with labels drawn at random: the words of the format, nothing of the task."""
    text = draw.choice(corpus.sentences["en"])
    parts = [f"intent: {draw.choice(corpus.intents)}"]
    parts += [f"{draw.choice(corpus.slots)}: {span}" for span in _spans(text, draw)]
    return Document("labels", text, "; ".join(parts))


_DOCUMENTS = {
    "sentence": _sentence,
    "translation": _translation,
    "copy": _copy,
    "format": _format,
}


def _language(corpus: Corpus, draw: random.Random) -> str:
    if draw.random() < 0.4:
        return "en"
    # Square root: a language of 200 sentences is not repeated as often as one of 1,800.
    others = LANGUAGES[1:]
    return draw.choices(others, weights=[len(corpus.sentences[o]) ** 0.5 for o in others])[0]


def _spans(text: str, draw: random.Random) -> list[str]:
    words = text.split()
    starts = sorted(draw.sample(range(len(words)), min(len(words), draw.randint(1, 3))))
    ends = [*starts[1:], len(words)]
    return [
        " ".join(words[a : min(b, a + draw.randint(1, 3))])
        for a, b in zip(starts, ends, strict=True)
    ]


def _pair(lang: str, foreign: str, english: str, source: str) -> dict[str, str]:
    return {"lang0": lang, "lang1": "en", "text0": foreign, "text1": english, "from": source}


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in text_lines(path)]


def _cyrillic(text: str) -> bool:
    return re.search("[\u0400-\u04ff]", text) is not None
