"""The rows of the studies on real models; the same ones each time.

    python experiments/real_llm/data.py DATA runs/real_llm/data

DATA holds `xsid/{train,valid,test}.LANGUAGE.jsonl` (commands with intents and slots, from
github.com/mainlp/xsid), `tatoeba/LANGUAGE-en.tsv` (sentence, tab, its English; tatoeba.org),
`uner/{train,valid,test}.LANGUAGE.jsonl` (named entities, github.com/UniversalNER) and
`mt_open/{train,valid,test}.jsonl` (translations: FLORES and NTREX).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

ALIGNED = ("ar", "da", "de", "it", "ja", "nl", "sr", "tr", "zh")  # of xSID, with Tatoeba pairs
LONGEST = 60  # characters of a sentence: short sequences, quick updates
PAIRS, HELD_OUT = 300, 16  # of each language
AMOUNTS = (10, 30, 100, 600)  # further files: pairs.AMOUNT.jsonl
MORE = ("cs", "es", "fr", "hi", "pt", "ru")  # with the aligned ones: pairs.wide.jsonl
TRANSLATED = ("cs", "de", "is", "ru", "zh", "he", "uk")  # of mt_open, but for Japanese


def main() -> None:
    """Writes commands, pairs and held-out pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of xsid and tatoeba")
    parser.add_argument("out", type=Path, help="the folder to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("train.en", "valid.*", "test.*"):
        for file in sorted((args.data / "xsid").glob(f"{split}.jsonl")):
            shutil.copyfile(file, args.out / file.name)
    for task, files in {"uner": ("train.en", "test.*"), "mt_open": ("train", "test")}.items():
        for file in (
            file for name in files for file in sorted((args.data / task).glob(f"{name}.jsonl"))
        ):
            (args.out / task).mkdir(exist_ok=True)
            shutil.copyfile(file, args.out / task / file.name)
    rng = random.Random(1)
    content: dict[str, list[str]] = {"pairs_held_out": [], "pairs": []}
    content |= {f"pairs.{amount}": [] for amount in AMOUNTS}
    seen: set[str] = set()
    for language in ALIGNED:
        found = pairs(args.data / "tatoeba" / f"{language}-en.tsv", language, seen)
        rng.shuffle(found)
        content["pairs_held_out"] += found[:HELD_OUT]
        content["pairs"] += found[HELD_OUT : HELD_OUT + PAIRS]
        for amount in AMOUNTS:
            content[f"pairs.{amount}"] += found[HELD_OUT : HELD_OUT + amount]
    content["mt_open/pairs"] = []
    for language in TRANSLATED:
        found = pairs(args.data / "tatoeba" / f"{language}-en.tsv", language, set())
        rng.shuffle(found)
        content["mt_open/pairs"] += found[:PAIRS]
    content["pairs.wide"] = [*content["pairs"]]
    for language in MORE:
        found = pairs(args.data / "tatoeba" / f"{language}-en.tsv", language, seen)
        rng.shuffle(found)
        content["pairs.wide"] += found[:PAIRS]
    for name, rows in content.items():
        (args.out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
        print(f"{args.out / name}.jsonl: {len(rows)} pairs")


def pairs(file: Path, language: str, seen: set[str]) -> list[str]:
    """Short pairs as JSON, none whose English is in `seen`, which grows."""
    found = []
    for line in file.read_text("utf-8").splitlines():
        text, english = line.split("\t")
        # No English sentence twice: each has one translation, and none is in both halves.
        if max(len(text), len(english)) <= LONGEST and english.lower() not in seen:
            seen.add(english.lower())
            pair = {"text0": text, "text1": english, "lang0": language, "lang1": "en"}
            found.append(json.dumps(pair, ensure_ascii=False))
    return found


if __name__ == "__main__":
    main()
