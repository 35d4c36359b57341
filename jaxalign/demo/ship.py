"""The small data files that travel with the demo, each under the licence of its source.

    ship(read_corpus('../shared/data'), '../shared/data', 'jaxalign/demo/assets/data')

It writes `train.en.jsonl` (task rows), `dev.<lang>.jsonl` and `test.<lang>.jsonl` (utterances with
intent and slots, the same id in every language), `pairs_xsid.jsonl` and `pairs_tatoeba.jsonl`
(alignment pairs), `pairs_dev.jsonl` (the dev rows as pairs, for validation), `LICENSES.md` and the
licence texts. Pairs carry no labels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from jaxalign.demo import ALIGNED, LANGUAGES
from jaxalign.demo.corpus import TASK_ROWS, Corpus

FIELDS = ("id", "lang", "utterance", "slots", "intent")
LICENCES = {
    "xsid": "LICENSE-CC-BY-SA-4.0.txt",
    "tatoeba": "LICENSE-CC-BY-2.0-FR.txt",
}  # folder of the data: our name for its licence text


def ship(corpus: Corpus, data: str | Path, out: str | Path) -> None:
    """Write the files below `out`; `data` is where the licence texts are copied from."""
    data, out = Path(data), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "train.en.jsonl", map(_task_row, corpus.task[:TASK_ROWS]))
    for split, rows in (("dev", corpus.dev), ("test", corpus.test)):
        for lang in LANGUAGES:
            kept = (_task_row(row) for row in rows if row["lang"] == lang)
            _write(out / f"{split}.{lang}.jsonl", kept)
    for source in ("xsid", "tatoeba"):
        kept = (_pair_row(pair) for pair in corpus.pairs if pair["from"].startswith(source))
        _write(out / f"pairs_{source}.jsonl", kept)
        shutil.copyfile(data / source / "LICENSE.txt", out / LICENCES[source])
    _write(out / "pairs_dev.jsonl", _dev_pairs(corpus))
    (out / "LICENSES.md").write_text(NOTICE, encoding="utf-8")


def _dev_pairs(corpus: Corpus) -> Iterable[dict]:
    english = {row["id"]: row["utterance"] for row in corpus.dev if row["lang"] == "en"}
    for row in corpus.dev:
        if row["lang"] in ALIGNED:
            text0, text1 = row["utterance"], english[row["id"]]
            yield {"lang0": row["lang"], "lang1": "en", "text0": text0, "text1": text1}


def _task_row(row: dict) -> dict:
    return {field: row[field] for field in FIELDS}


def _pair_row(pair: dict) -> dict:
    return {field: value for field, value in pair.items() if field != "from"}


def _write(path: Path, rows: Iterable[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


NOTICE = """\
# Licences of the demo's data

These files are not under the Apache licence of the code.

| files | source | licence |
|---|---|---|
| `train.en.jsonl`, `dev.*.jsonl`, `test.*.jsonl`, `pairs_xsid.jsonl`, \
`pairs_dev.jsonl` | xSID 0.7, \
github.com/mainlp/xsid, commit 761d926c3f2e9f6bea13192d2f39cec1d04d9777 | CC BY-SA 4.0 \
(`LICENSE-CC-BY-SA-4.0.txt`) |
| `pairs_tatoeba.jsonl` | Tatoeba (tatoeba.org), snapshot of 2018-11-17, by way of \
github.com/facebookresearch/LASER, commit 74bc6ae7ffb7cba670fe0f428d0ede9f666fb821, \
`data/tatoeba/v1` | CC BY 2.0 FR (`LICENSE-CC-BY-2.0-FR.txt`) |
| `../base/` (weights and tokenizer) | trained on xSID, on Tatoeba, and on NTREX-128, \
github.com/MicrosoftTranslator/NTREX, commit 8561f6a622db9edad1217683e5c83daefd8bb2bf \
(CC BY-SA 4.0) | CC BY-SA 4.0 |

## Attribution

- xSID: van der Goot et al. 2021, "From Masked Language Modeling to Translation: Non-English
  Auxiliary Tasks Improve Zero-shot Spoken Language Understanding" (NAACL); South Tyrolean by the
  same; later languages by Aepli et al. 2023, Winkler et al. 2024, Krückl et al. 2025 and
  Mæhlum & Scherrer 2024. English text from Snips and from Facebook's multilingual task-oriented
  dialogue data.
- Tatoeba: the contributors of tatoeba.org; test pairs chosen by Artetxe & Schwenk 2019
  (arXiv 1812.10464).
- NTREX-128: Federmann et al. 2022; source texts from WMT19 (Barrault et al. 2019). No line of it
  is in these files.

## Changes made

- xSID: BIO tags repaired and broken label names mended, spans cut from the raw text, NFC; of the
  English training rows 3,000, about the same number per intent, none equal to a validation or test
  utterance; the even-numbered half of the test rows; every third validation row as `dev`, the
  others paired with English by their id, without labels.
- Tatoeba: rows with crude or sensitive words and rows equal to a dev or test utterance left out;
  written as JSON lines.
"""
